"""Log lines for machines: one JSON object each, where $MEMFIT_LOG_FORMAT asks for it."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from memfit.errors import ConfigError, MemfitError

VARIABLE = "MEMFIT_LOG_FORMAT"
EXTRA = "memfit"
"""The attribute of a log record that holds a memfit line's own facts."""
_RUN_FACTS = ("flow_run_id", "flow_run_name", "task_run_id", "task_run_name", "worker_id", "worker_name")
"""What Prefect's loggers know of where a record comes from."""


class LogFormat(StrEnum):
    """How a command speaks: to a person, or to a container platform."""

    text = "text"
    json = "json"


def log_format() -> LogFormat:
    """Return what the environment asks for. Raises: ConfigError where that is neither text nor json."""
    wanted = os.environ.get(VARIABLE) or LogFormat.text
    try:
        return LogFormat(wanted)
    except ValueError:
        raise ConfigError(
            f"{VARIABLE}: expected {' or '.join(LogFormat)}, got {wanted!r}. Set one, or unset it."
        ) from None


def log_line(level: str, message: str, facts: Mapping[str, Any], *, created: float | None = None) -> str:
    """Write one line; `created` is in seconds since 1970, now unless given."""
    moment = datetime.fromtimestamp(time.time() if created is None else created, UTC)
    stamp = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps(_plain({"time": stamp, "level": level, "message": message, **facts}), allow_nan=False)


def _plain(value: Any) -> Any:
    """Return what JSON can hold: numbers that are not finite become null, and what it does not know its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def error_fields(error: BaseException, trace: str = "") -> dict[str, Any]:
    """Describe what ended something: its kind, memfit's exit status for it, and a traceback if there is one."""
    status = getattr(error, "exit_status", MemfitError.exit_status)
    return {"kind": type(error).__name__, "exit_status": status, **({"traceback": trace} if trace else {})}


class JsonFormatter(logging.Formatter):
    """Writes log records as such lines; `logging.config` and Prefect take it by name."""

    def __init__(self, _format: str | None = None, _date_format: str | None = None, _style: str = "%") -> None:
        super().__init__()

    def format(self, record: logging.LogRecord) -> str:
        """Write one record; an exception's kind, exit status and traceback are told as a failed command tells them."""
        facts: dict[str, Any] = {"logger": record.name}
        facts |= {name: getattr(record, name) for name in _RUN_FACTS if getattr(record, name, None)}
        facts |= getattr(record, EXTRA, {})
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            facts |= {"event": "error", "fields": error_fields(error, self.formatException(record.exc_info))}
        return log_line(record.levelname.lower(), record.getMessage(), facts, created=record.created)
