"""The event log of a stage: one JSON object per line, cut back to a checkpoint on resume."""

import json
import os
from pathlib import Path
from typing import Any

from memfit.process import Emit


class EventLog:
    """Append events to a file and pass them on to the parent process."""

    def __init__(self, path: Path, emit: Emit, keep_bytes: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not keep_bytes:
            path.unlink(missing_ok=True)  # not emptied: an earlier run may have a link to it
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(min(keep_bytes, path.stat().st_size))
        self._file.seek(0, os.SEEK_END)
        self._emit = emit

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event; NaN and infinity become null, as JSON has neither."""
        event = {"event": kind, **_finite(fields)}
        self._file.write(json.dumps(event).encode() + b"\n")
        self._file.flush()
        self._emit(event)

    def sync(self) -> int:
        """Make the log durable and return its length in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
