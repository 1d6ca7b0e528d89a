import math

import pytest

from memfit.report.units import (
    bytes_text,
    finite,
    number_text,
    seconds_text,
    setting_text,
    share_text,
    significant,
    time_text,
)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(12, "12 B"), (3277, "3.20 KiB"), (812 * 2**20, "812 MiB"), (1.3125 * 2**30, "1.31 GiB"), (2**41, "2.00 TiB")],
)
def test_writes_bytes_in_binary_units(num_bytes, text):
    assert bytes_text(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.042, "42 ms"),
        (3.14, "3.1 s"),
        (59.4, "59 s"),
        (252, "4 min 12 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_writes_durations_as_people_say_them(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (1.23456, "1.235"), (0.5, "0.5000"), (-0.01, "-0.0100"), (123456, "123,456"), (2e-7, "2.000e-07")],
)
def test_writes_measured_numbers_with_four_digits(number, text):
    assert number_text(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(15.0, "15"), (0.25, "0.25"), (1000, "1,000"), (3e-5, "3e-05"), (0.0003, "0.0003"), (100, "100")],
)
def test_writes_chosen_numbers_without_zeros_at_the_end(number, text):
    assert setting_text(number) == text


def test_rounding_up_to_the_next_power_keeps_the_number_right():
    assert significant(9.9996, 4) == "10.000"
    assert share_text(0.99996) == "100.0 %"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "3", True, [], {}, 10**400])
def test_takes_only_finite_numbers(value):
    assert finite(value) is None


def test_shortens_times_to_the_minute():
    assert time_text("2013-10-29T01:00:00+00:00") == "2013-10-29 01:00 UTC"
    assert time_text("2013-10-29T01:00:00+02:00") == "2013-10-29 01:00"
    assert time_text("yesterday") == "yesterday"
