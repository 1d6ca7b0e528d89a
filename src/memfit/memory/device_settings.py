"""Reads a card that a user describes in the config, and says what is wrong with it."""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from memfit.errors import ConfigError
from memfit.memory.units import parse_bytes

PRECISIONS = ("fp32", "bf16", "fp16")
ATTENTION_KERNELS = ("flash", "efficient", "math")
_RESERVED = r"cpu|cuda|mps|rocm|hip|xpu|tpu"
_BYTES = "bytes as a whole number above 0, or text such as '24GiB'"


def read_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check a user's description of a card; return what was given, as the fields of a `Device`. Raises: ConfigError."""
    label = f"device {settings.get('name', '?')!r:.60}"
    for key in settings:
        if key not in _READERS:
            near = difflib.get_close_matches(str(key), _READERS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{label}: {key!r} is an unknown key; the nearest valid one is {near!r}.")
    if missing := [key for key in ("name", "memory", "compute_capability") if key not in settings]:
        raise ConfigError(f"{label}: expected {', '.join(missing)}, which it lacks. Add what the driver reports.")
    return {
        {"memory": "memory_bytes", "context": "context_bytes"}.get(key, key): _READERS[key](value, f"{label}: {key}")
        for key, value in settings.items()
    }


def _fault(where: str, expected: str, value: object) -> ConfigError:
    return ConfigError(f"{where}: expected {expected}, got {value!r:.80}. Correct it in the config.")


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", value):
        raise _fault(where, "lower-case letters, digits, '.', '_' and '-', such as 'rtx-5090'", value)
    if re.fullmatch(_RESERVED, value):
        raise _fault(where, "a name other than a kind of device", value)
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _fault(where, "text", value)
    return value


def _bytes(value: Any, where: str) -> int:
    if isinstance(value, str):
        return parse_bytes(value, where, _BYTES)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _fault(where, _BYTES, value)
    return value


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _fault(where, "a whole number above 0", value)
    return value


def _rate(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise _fault(where, "a number above 0", value)
    return float(value)


def _rates(value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, Mapping) or not set(value) <= set(PRECISIONS):
        raise _fault(where, f"TFLOP/s by precision, of {', '.join(PRECISIONS)}", value)
    return {precision: _rate(rate, f"{where}.{precision}") for precision, rate in value.items()}


def _capability(value: Any, where: str) -> tuple[int, int]:
    text = ".".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    match = re.fullmatch(r"([0-9]{1,2})\.([0-9])", text)
    if match is None or int(match[1]) < 5:
        raise _fault(where, "the card's compute capability from 5.0 on, such as '8.6'", value)
    return int(match[1]), int(match[2])


def _some_of(words: tuple[str, ...]) -> Callable[[Any, str], tuple[str, ...]]:
    def read(value: Any, where: str) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not value or any(word not in words for word in value):
            raise _fault(where, f"a list of some of {', '.join(words)}", value)
        return tuple(word for word in words if word in value)

    return read


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "name": _name,
    "memory": _bytes,
    "compute_capability": _capability,
    "title": _text,
    "multiprocessors": _count,
    "context": _bytes,
    "precisions": _some_of(PRECISIONS),
    "attention_kernels": _some_of(ATTENTION_KERNELS),
    "tflops": _rates,
    "bandwidth_gbs": _rate,
    "notes": _text,
}
