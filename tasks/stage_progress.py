"""A stage's progress as a Prefect artifact, from the events of its training."""

import contextvars
import re
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from memfit.console import validation_figures
from tasks.publishing import published

QUIET_SECONDS = 2.0
"""Shortest time between two updates; the last one always goes out."""
CLOSING_SECONDS = 5.0
"""What the last update gets to arrive, before the run goes on without it."""
Update = tuple[float, str]
"""Share of the work that is done, and a line on it."""


def progress_key(stage: str) -> str:
    """Return the artifact key of a stage: lower-case letters, digits and dashes."""
    return "progress-" + re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")


class Outbox:
    """Sends the newest update in a thread of its own: a server that is away does not hold up the training."""

    def __init__(self, send: Callable[[Update], None]) -> None:
        self._send, self._closed = send, False
        self._newest: Update | None = None
        self._changed = threading.Condition()
        context = contextvars.copy_context()  # the run's logger and settings
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)
        self._thread.start()

    def put(self, update: Update) -> None:
        """Send an update, in place of one that did not go out yet."""
        with self._changed:
            self._newest = update
            self._changed.notify()

    def close(self) -> None:
        """Wait for the last update, for no longer than CLOSING_SECONDS."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(CLOSING_SECONDS)

    def _run(self) -> None:
        while (update := self._next()) is not None:
            self._send(update)

    def _next(self) -> Update | None:
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self._closed)
            update, self._newest = self._newest, None
        return update


class StageProgress:
    """Keeps one progress artifact up to date. A server that does not answer costs an update, not the training."""

    def __init__(self, stage: str) -> None:
        self._stage, self._epochs, self._steps = stage, 0, 0
        self._last = time.monotonic()
        self._artifact: UUID | None = None
        with published(f"progress of stage {stage}"):
            artifact = create_progress_artifact(0.0, key=progress_key(stage), description=f"stage {stage}: starting")
            assert isinstance(artifact, UUID)  # a coroutine only where an event loop runs
            self._artifact = artifact
        self._outbox = Outbox(self._send)

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event of the training; kinds that tell nothing of progress are ignored."""
        match event["event"]:
            case "stage_start" | "resume" if "steps_per_epoch" in event:
                self._epochs, self._steps = event["epochs"], event["epochs"] * event["steps_per_epoch"]
            case "step" if self._due() and self._steps:
                self._show(event["step"] / self._steps, f"epoch {event['epoch']}/{self._epochs}, step {event['step']}")
            case "epoch" if self._due():
                self._show(self._share(event), _epoch_line(event, self._epochs))

    def close(self, entry: dict[str, Any] | None) -> None:
        """Show the stage as finished, and where it came from; or, without an entry, leave it as it stands."""
        if entry is not None:
            self._show(1.0, f"reused from {entry['from_run']}" if entry["status"] == "reused" else "finished")
        self._outbox.close()

    def _share(self, event: dict[str, Any]) -> float:
        return event["step"] / self._steps if self._steps else 0.0

    def _due(self) -> bool:
        return time.monotonic() - self._last >= QUIET_SECONDS

    def _show(self, share: float, line: str) -> None:
        self._last = time.monotonic()
        self._outbox.put((share, line))

    def _send(self, update: Update) -> None:
        share, line = update
        if self._artifact is not None:
            with published(f"progress of stage {self._stage}"):
                description = f"stage {self._stage}: {line}"
                update_progress_artifact(self._artifact, min(share, 1.0) * 100, description=description)


def _epoch_line(event: dict[str, Any], epochs: int) -> str:
    eta = f", about {event['eta_seconds']:.0f} s left" if event["eta_seconds"] else ""
    return f"epoch {event['epoch']}/{epochs or '?'}: {validation_figures(event)}{eta}"
