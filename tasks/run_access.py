"""How a task gets at its run: by the directory alone, with the run's events in the task run's log."""

import logging
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger

from memfit.config import load_config
from memfit.log_lines import EXTRA
from memfit.output import LineView, Write
from memfit.pipeline import Pipeline, open_run
from memfit.process import Emit

StepRecord = dict[str, Any]
"""A step's entry in run.json: name, fingerprint, status, from_run, seconds."""


def log_writer(logger: "logging.Logger | logging.LoggerAdapter[Any]") -> Write:
    """Return what makes a run's lines records of a logger: Prefect's log reads as the terminal does."""

    def write(level: str, message: str, facts: dict[str, Any]) -> None:
        logger.log(logging.getLevelNamesMapping()[level.upper()], "%s", message, extra={EXTRA: facts})

    return write


def perform(step: str, run_dir: str, store: str, fresh: bool, *, also: Emit | None = None) -> Pipeline:
    """Perform one step of the run in a directory; its events go to the run logger, and to `also`."""
    view = LineView(log_writer(get_run_logger()))

    def show(event: dict[str, Any]) -> None:
        view(event)
        if also is not None:
            also(event)

    pipeline = _open(run_dir, store, fresh, show)
    view.run = {"run_id": pipeline.run.run_id, "name": pipeline.config.name}
    pipeline.perform(step)
    return pipeline


def record(pipeline: Pipeline, step: str) -> StepRecord:
    """Return what run.json says of a step that was performed."""
    entry = pipeline.run.step(step)
    assert entry is not None
    return entry


def summarize(run_dir: str, store: str, fresh: bool) -> dict[str, Any]:
    """Say what there is in a run's directory now: paths, what was reused, plans, scores."""
    return _open(run_dir, store, fresh, lambda _event: None).summary()


def _open(run_dir: str, store: str, fresh: bool, on_event: Emit) -> Pipeline:
    path = Path(run_dir)
    config = load_config(path / "config.toml")
    return open_run(config, runs=path.parent, store=Path(store), run_dir=path, fresh=fresh, on_event=on_event)
