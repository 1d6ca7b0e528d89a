"""A stage's progress as a Prefect artifact, from the events of its training."""

import re
import time
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

QUIET_SECONDS = 2.0
"""Shortest time between two updates; the last one always goes out."""


def progress_key(stage: str) -> str:
    """Return the artifact key of a stage: lower-case letters, digits and dashes."""
    return "progress-" + re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")


class StageProgress:
    """Keeps one progress artifact up to date. A server that does not answer costs an update, not the training."""

    def __init__(self, stage: str) -> None:
        self._stage, self._epochs, self._steps = stage, 0, 0
        self._sent = time.monotonic()
        artifact = create_progress_artifact(0.0, key=progress_key(stage), description=f"stage {stage}: starting")
        assert isinstance(artifact, UUID)  # a coroutine only where an event loop runs
        self._artifact = artifact

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event of the training; kinds that tell nothing of progress are ignored."""
        match event["event"]:
            case "stage_start" | "resume" if "steps_per_epoch" in event:
                self._epochs, self._steps = event["epochs"], event["epochs"] * event["steps_per_epoch"]
            case "step" if self._due() and self._steps:
                self._send(event["step"] / self._steps, f"epoch {event['epoch']}/{self._epochs}, step {event['step']}")
            case "epoch" if self._due():
                self._send(self._share(event), _epoch_line(event, self._epochs))

    def close(self, entry: dict[str, Any]) -> None:
        """Show the stage as finished, and where it came from."""
        self._send(1.0, f"reused from {entry['from_run']}" if entry["status"] == "reused" else "finished")

    def _share(self, event: dict[str, Any]) -> float:
        return event["step"] / self._steps if self._steps else 0.0

    def _due(self) -> bool:
        return time.monotonic() - self._sent >= QUIET_SECONDS

    def _send(self, share: float, line: str) -> None:
        self._sent = time.monotonic()
        try:
            update_progress_artifact(self._artifact, min(share, 1.0) * 100, description=f"stage {self._stage}: {line}")
        except (httpx.HTTPError, PrefectException) as error:
            get_run_logger().warning("progress of stage %s was not shown: %r", self._stage, error)


def _epoch_line(event: dict[str, Any], epochs: int) -> str:
    validation = event["validation"]
    mae = f", mae {validation['mae']:.4g}" if validation.get("mae") is not None else ""
    eta = f", about {event['eta_seconds']:.0f} s left" if event["eta_seconds"] else ""
    return f"epoch {event['epoch']}/{epochs or '?'}: validation {validation['total']:.4g}{mae}{eta}"
