import numpy as np
import pandas as pd
import pytest

from memfit.data.clock import read_clock
from memfit.data.gaps import close_gaps
from memfit.data.source import RawSeries
from memfit.data.spec import GapPolicy
from memfit.errors import DataError

HOUR = 3_600_000_000_000
NAN = np.nan


def hours(*ticks):
    return np.array(ticks, np.int64) * HOUR


def close(times, values, extra=None, frequency="auto", **policy):
    extras = np.zeros((len(values), 0)) if extra is None else np.array(extra, float)[:, None]
    names = ["value"] if extra is None else ["value", "extra"]
    return close_gaps(RawSeries(times, np.array(values, float), extras), names, frequency, GapPolicy(**policy))


def test_forward_fill_repeats_the_last_observation():
    closed = close(hours(0, 1, 2, 5, 6), [1, 2, NAN, 4, 5], policy="forward_fill", limit=3)
    assert closed.values.tolist() == [1, 2, 2, 2, 2, 4, 5]
    assert closed.filled.tolist() == [False, False, True, True, True, False, False]
    np.testing.assert_array_equal(closed.eligible, ~closed.filled)
    assert closed.times.tolist() == hours(*range(7)).tolist()
    assert closed.frequency == "1h"


def test_interpolation_is_linear_and_the_end_of_a_gap_is_no_target():
    closed = close(hours(0, 1, 2, 5, 6), [1, 2, NAN, 6, 5], policy="interpolate", limit=3)
    assert closed.values.tolist() == [1, 2, 3, 4, 5, 6, 5]
    assert closed.filled.tolist() == [False, False, True, True, True, False, False]
    assert closed.eligible.tolist() == [True, True, False, False, False, False, True]


def test_interpolating_an_extra_column_excludes_the_targets_that_would_look_ahead():
    extra = [0, 1, NAN, NAN, 4, 5, 6]
    closed = close(hours(*range(7)), [1, 2, 3, 4, 5, 6, 7], extra, policy="interpolate")
    assert closed.extras[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert not closed.filled.any()
    assert closed.eligible.tolist() == [True, True, True, False, False, True, True]


def test_forward_filling_an_extra_column_excludes_no_target():
    closed = close(hours(*range(4)), [1, 2, 3, 4], [0, NAN, NAN, 3], policy="forward_fill")
    assert closed.extras[:, 0].tolist() == [0, 0, 0, 3]
    assert closed.eligible.all()


def test_a_gap_as_long_as_the_limit_is_filled_and_a_longer_one_is_an_error():
    times = hours(0, 1, 2, 6)
    assert close(times, [1, 2, 3, 4], policy="forward_fill", limit=3).filled.sum() == 3
    with pytest.raises(DataError, match=r"rows: 3 from 1970-01-01T03.* \(row 4\); expected gaps of at most 2; raise"):
        close(times, [1, 2, 3, 4], policy="forward_fill", limit=2)


def test_a_missing_value_beside_a_missing_row_makes_the_gap_longer():
    with pytest.raises(DataError, match=r"observations of 'value': 3 from 1970-01-01T02"):
        close(hours(0, 1, 2, 5), [1, 2, NAN, 4], policy="forward_fill", limit=2)


def test_under_the_policy_error_every_gap_is_one():
    with pytest.raises(DataError, match=r"missing rows: 2 from 1970-01-01T02.*limit of 2"):
        close(hours(0, 1, 4, 5), [1, 2, 3, 4])
    with pytest.raises(DataError, match=r"missing observations of 'value': 1 from 1970-01-01T01"):
        close(hours(0, 1, 2, 3), [1, NAN, 3, 4])
    with pytest.raises(DataError, match=r"missing observations of 'extra': 1 from 1970-01-01T02"):
        close(hours(0, 1, 2, 3), [1, 2, 3, 4], [1, 2, NAN, 4])


def test_many_gaps_are_summed_up():
    with pytest.raises(DataError, match="and 3 more gaps"):
        close(hours(*range(20)), [NAN if i % 2 and i < 16 else i for i in range(20)])


@pytest.mark.parametrize("policy", ["forward_fill", "interpolate"])
def test_a_gap_at_the_start_has_nothing_to_be_filled_from(policy):
    with pytest.raises(DataError, match="'value' has nothing to be filled from before 1970-01-01T02"):
        close(hours(0, 1, 2, 3), [NAN, NAN, 3, 4], policy=policy)


def test_a_gap_at_the_end_can_only_be_filled_forward():
    times, values = hours(0, 1, 2, 3), [1, 2, NAN, NAN]
    assert close(times, values, policy="forward_fill").values.tolist() == [1, 2, 2, 2]
    with pytest.raises(DataError, match="'value' has nothing to interpolate to after 1970-01-01T01"):
        close(times, values, policy="interpolate")


def test_a_gap_of_centuries_is_refused_before_it_takes_memory():
    times = np.array([0, 1, 2, 9_000_000_000]) * 1_000_000_000
    with pytest.raises(DataError, match="a clock of 1s has 9000000001 rows"):
        close(times, [1, 2, 3, 4], policy="forward_fill")
    with pytest.raises(DataError, match="missing rows: 999999997 from"):
        close(np.array([0, 1, 2, 10**9]), [1, 2, 3, 4], frequency="1ns", policy="forward_fill")


def test_an_irregular_series_keeps_its_times_and_fills_missing_values():
    times = np.array([0, 5, 7, 100, 101])
    closed = close(times, [1, 2, NAN, 4, 5], frequency="irregular", policy="interpolate")
    assert closed.frequency == "irregular"
    assert closed.times.tolist() == times.tolist()
    assert closed.values.tolist() == [1, 2, 3, 4, 5]
    assert closed.eligible.tolist() == [True, True, False, False, True]


@pytest.mark.parametrize(("frequency", "name"), [("1h", "1h"), ("60min", "60min"), ("auto", "1h"), ("h", "1h")])
def test_resolves_the_frequency(frequency, name):
    assert close(hours(0, 1, 2), [1, 2, 3], frequency=frequency).frequency == name


@pytest.mark.parametrize("frequency", ["MS", "B", "YS"])
def test_calendar_offsets_have_uneven_steps(frequency):
    stamps = pd.date_range("2024-01-01", periods=12, freq=frequency, tz="UTC").as_unit("ns")
    kept = np.delete(np.arange(12), [4, 5])
    closed = close(stamps.asi8[kept], kept, frequency=frequency, policy="interpolate")
    assert closed.times.tolist() == stamps.asi8.tolist()
    assert closed.values.tolist() == list(range(12))


def test_refuses_times_off_the_clock():
    with pytest.raises(DataError, match=r"row 3 of the series \(1970-01-01T02:30.*not on the clock of 1h"):
        read_clock(np.array([0, HOUR, 5 * HOUR // 2]), "1h")
    with pytest.raises(DataError, match=r"row 1 of the series .* not on the clock of 1MS"):
        read_clock(hours(30, 5000, 9000), "MS")


def test_refuses_to_guess_a_frequency():
    with pytest.raises(DataError, match=r'no frequency fits the times.*"irregular"'):
        read_clock(hours(0, 1, 3, 6, 10, 15), "auto")
    with pytest.raises(DataError, match="no frequency fits"):
        read_clock(np.array([0, 10, 20, 30, 35]), "auto")
    with pytest.raises(DataError, match="one row shows no frequency"):
        read_clock(hours(0), "auto")
