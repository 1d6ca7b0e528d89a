"""Amounts of memory as users write them. Text only, so that a config is read without torch."""

import re
from decimal import Decimal

from memfit.errors import ConfigError

UNITS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_NUMBER = r"[0-9]+(\.[0-9]+)?"
PATTERN = rf"auto|{_NUMBER}\s*(%|[KMGT]i?B|B)"
"""What a budget looks like; `parse_bytes` and `parse_share` check its range."""
FORMS = "'14GiB', '512MiB', '80%' or 'auto'"
"""The accepted forms of a budget, for messages."""
_MOST_BYTES = 2**63


def parse_bytes(text: str, what: str = "budget", forms: str = FORMS) -> int:
    """Parse an amount with its unit, such as '14GiB', into bytes; a unit is written exactly as in `UNITS`.

    Raises: ConfigError that begins with `what` and names the accepted `forms`.
    """
    match = re.fullmatch(rf"({_NUMBER})\s*([KMGT]i?B|B)", text.strip())
    if match is None:
        raise ConfigError(f"{what}: expected {forms}, got {text!r:.80}. Write a number and a unit.")
    amount = int(Decimal(match[1]) * UNITS[match[3]])
    if amount <= 0:
        raise ConfigError(f"{what}: expected more than 0 bytes, got {text!r:.80}. Raise it.")
    if amount >= _MOST_BYTES:
        raise ConfigError(f"{what}: expected less than 8 EiB, got {text!r:.80}. Lower it, or check the unit.")
    return amount


def parse_share(text: str) -> Decimal:
    """Parse a share such as '80%' into a fraction above 0 and up to 1. Raises: ConfigError."""
    number = text.strip().removesuffix("%").strip()
    if not text.strip().endswith("%") or re.fullmatch(_NUMBER, number) is None or not 0 < Decimal(number) <= 100:
        raise ConfigError(
            f"budget: expected a share above 0 % and up to 100 %, got {text!r:.80}. Or write one of {FORMS}."
        )
    return Decimal(number) / 100
