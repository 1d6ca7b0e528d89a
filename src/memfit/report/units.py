"""Figures as people write them: bytes, durations, shares and numbers with sensible digits."""

import math
from typing import Any

_BYTE_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
MISSING = "–"


def finite(value: Any) -> float | None:
    """Return a finite float, or None for null, NaN, infinity and anything that is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def bytes_text(num_bytes: float) -> str:
    """Write a number of bytes in binary units: 1.31 GiB, 812 MiB."""
    for unit, size in _BYTE_UNITS:
        if abs(num_bytes) >= size:
            return f"{significant(num_bytes / size, 3)} {unit}"
    return f"{num_bytes:.0f} B"


def seconds_text(seconds: float) -> str:
    """Write a duration: 42 ms, 3.1 s, 4 min 12 s, 2 h 05 min."""
    if abs(seconds) < 0.1:
        return f"{significant(seconds * 1000, 2)} ms"
    if abs(seconds) < 60:
        return f"{significant(seconds, 2)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def share_text(share: float) -> str:
    """Write a fraction as a percentage: 0.784 is 78.4 %."""
    return f"{share * 100:.1f} %"


def count_text(count: float) -> str:
    """Write a whole number with separators: 9,812,345."""
    return f"{count:,.0f}"


def number_text(number: float) -> str:
    """Write a measured number with four significant digits, and at most four decimals from 0.01 upwards."""
    return f"{number:.4f}" if 0.01 <= abs(number) < 1 else significant(number, 4)


def setting_text(number: float) -> str:
    """Write a number that someone chose, without zeros at its end: 15, 0.25, 3e-05."""
    text = significant(number, 5)
    if "e" in text:
        return f"{number:.5g}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def significant(number: float, digits: int) -> str:
    """Write a number with so many significant digits; integers above that keep all of theirs.

    Very large and very small magnitudes use the exponent form.
    """
    if number == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(number)))
    if magnitude >= 9 or magnitude < -4:
        return f"{number:.{digits - 1}e}"
    return f"{number:,.{max(0, digits - 1 - magnitude)}f}"


def time_text(moment: Any) -> str:
    """Shorten an ISO time to the minute, and a midnight to its date; other texts stay as they are."""
    text = str(moment)
    if len(text) < 16 or text[10] not in "T ":
        return text
    clock, zone = text[11:16], " UTC" if text.endswith(("Z", "+00:00")) else ""
    return f"{text[:10]} {clock}{zone}"


def capitalized(key: str) -> str:
    """Turn a key into a label: `memory_bytes` is Memory bytes; capitals that are there stay."""
    label = key.replace("_", " ")
    return label[:1].upper() + label[1:]
