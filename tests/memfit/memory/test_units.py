"""Amounts of memory: what users may write, and what could be misread."""

import re
import subprocess
import sys
from decimal import Decimal

import pytest

from memfit.errors import ConfigError
from memfit.memory.units import PATTERN, parse_bytes, parse_share

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("14GiB", 14 * GIB),
        ("512 MiB", 512 * MIB),
        (" 1.5GiB ", 1536 * MIB),
        (" 14 GiB ", 14 * GIB),
        ("5KB", 5000),
        ("2GB", 2_000_000_000),
        ("1KiB", 1024),
        ("3TB", 3 * 10**12),
        ("7B", 7),
        ("0.1GB", 100_000_000),
        ("9007199254740993B", 9007199254740993),
    ],
)
def test_reads_amounts_with_their_unit(text, expected):
    assert parse_bytes(text) == expected


AMBIGUOUS = [
    "",
    "14",
    "GiB",
    "14gib",
    "14 Gib",
    "14gb",
    "14G",
    "14GiBs",
    "1,5GiB",
    "1_000MiB",
    "1e3MiB",
    "1e9",
    "0",
    ".5GiB",
    "5.GiB",
]
NOT_AMOUNTS = [
    "-1GiB",
    "+1GiB",
    "inf",
    "nan",
    "infGiB",
    "nanGiB",
    "-infGiB",
    "0x1GiB",
    "\u0661GiB",
    "\uff11GiB",
    "1\u00a0Gi B",
]


@pytest.mark.parametrize("text", [*AMBIGUOUS, *NOT_AMOUNTS])
def test_refuses_amounts_that_could_be_misread(text):
    with pytest.raises(ConfigError, match=r"budget: expected '14GiB', '512MiB', '80%' or 'auto', got "):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0GiB", "0.0B", "0.4B", "000MiB"])
def test_refuses_nothing(text):
    with pytest.raises(ConfigError, match="more than 0 bytes"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["8388608TiB", "9" * 500 + "GiB"])
def test_refuses_more_than_any_machine_has(text):
    with pytest.raises(ConfigError, match="less than 8 EiB"):
        parse_bytes(text)


def test_an_error_names_what_is_wrong_and_which_forms_are_right():
    with pytest.raises(ConfigError, match="memory: expected bytes, got '1 gib'"):
        parse_bytes("1 gib", "memory", "bytes")


@pytest.mark.parametrize(("text", "expected"), [("80%", "0.8"), ("12.5 %", "0.125"), ("100%", "1"), (" 1%", "0.01")])
def test_reads_shares(text, expected):
    assert parse_share(text) == Decimal(expected)


@pytest.mark.parametrize(
    "text",
    [
        "0%",
        "0.0%",
        "100.1%",
        "-5%",
        "%",
        "five%",
        "nan%",
        "inf%",
        "1e1%",
        "9" * 500 + "%",
        "101%",
        "80",
        "80%%",
        "\u0668%",
    ],
)
def test_refuses_shares_that_mean_nothing(text):
    with pytest.raises(ConfigError, match="share above 0 % and up to 100 %"):
        parse_share(text)


@pytest.mark.parametrize("text", ["auto", "80%", "12.5 %", "14GiB", "512 MiB", "7B"])
def test_the_pattern_of_forms_and_flows_accepts_what_the_parser_accepts(text):
    assert re.fullmatch(PATTERN, text)


@pytest.mark.parametrize("text", ["Auto", "all", "-5%", "nan%", *AMBIGUOUS, *NOT_AMOUNTS])
def test_the_pattern_of_forms_and_flows_refuses_what_the_parser_refuses(text):
    assert re.fullmatch(PATTERN, text) is None


def test_reading_a_config_needs_no_torch():
    program = "import sys, memfit.config, memfit.memory.devices; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
