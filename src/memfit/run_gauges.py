"""How the last run of a config stands, as Prometheus text: <name>.prom for node_exporter's textfile collector."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from memfit.errors import MemfitError, Resumable, RunStateError
from memfit.files import read_if_whole, write_text
from memfit.process import Emit
from memfit.run_directory import RECORD, RunDirectory

FOLDER = "MEMFIT_METRICS"
"""The environment variable that names the folder; default: `metrics` in the folder of runs."""
BEAT_SECONDS = 30.0
"""How old the file may grow while a step tells of its progress."""
STATES = ("running", "finished", "failed", "stopped")
GAUGES = {
    "state": "1 for the state of the last run of a config, 0 for the others. One that was killed stays running: "
    "alert where running is 1 and last_update_time_seconds is older than your longest step.",
    "start_time_seconds": "When the run took its directory, in seconds since 1970; one that goes on starts anew.",
    "end_time_seconds": "When the run ended, in seconds since 1970; absent while it is running.",
    "last_update_time_seconds": "When these figures were written, in seconds since 1970.",
    "duration_seconds": "From the start to the end, or to the last update.",
    "exit_status": "0, or what memfit's command ends with: 2 config, 3 data, 4 does not fit, 75 stopped and resumable.",
    "step_duration_seconds": "What a finished step took; 0 where its result was taken over from an earlier run.",
    "stage_budget_bytes": "The memory budget of a stage.",
    "stage_planned_peak_bytes": "Peak of the process, measured under the enforced budget before the stage was trained.",
    "stage_peak_bytes": "Peak of the process, measured while the stage was trained.",
    "score": "A score of the model on the test rows.",
    "baseline_score": "The same score of a baseline, on the same rows.",
    "gate_passed": "1 where the model is better than its baselines and within the config's limits, else 0.",
}
Samples = Iterable[tuple[dict[str, str], float | None]]
"""Labels and value; a value that is not known leaves the sample out."""


class RunGauges:
    """Keeps the file true while a run works: at its beginning, after every step, now and then, and at its end."""

    def __init__(self, run: RunDirectory, labels: dict[str, str], on_event: Emit) -> None:
        self._run, self._labels, self._on_event = run, labels, on_event
        self._beat = 0.0

    def begin(self, runs: Path) -> "RunGauges":
        """Note in the run's record when this attempt began, and where whoever performs its steps writes."""
        folder = Path(os.environ.get(FOLDER) or runs / "metrics").resolve()
        file = folder / f"{self._labels['config']}.prom"
        self._run.record["attempt"] = {"started": time.time(), "gauges": str(file)}
        self._run.save()
        return self

    def __enter__(self) -> None:
        try:
            self._write("running")
        except OSError as error:
            raise RunStateError(
                f"metrics: expected to write {self._run.record['attempt']['gauges']}, got: {error}. Set {FOLDER} to a "
                "folder that this user can write."
            ) from error

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: TracebackType | None) -> None:
        self._try_to_write(*_ending(error))

    def update(self) -> None:
        """Show what the steps so far came to."""
        self._try_to_write("running")

    def beat(self) -> None:
        """Show that the run is alive, if the last word is old."""
        if time.monotonic() - self._beat > BEAT_SECONDS:
            self.update()

    def _try_to_write(self, state: str, exit_status: int | None = None) -> None:
        try:
            self._write(state, exit_status)
        except OSError as error:  # figures for those who watch are not worth a training
            self._on_event({"event": "warning", "message": f"metrics were not written: {error}"})

    def _write(self, state: str, exit_status: int | None = None) -> None:
        self._beat = time.monotonic()
        attempt = self._run.record.get("attempt")
        if attempt is None or _started(Path(attempt["gauges"])) > attempt["started"]:
            return  # nobody began it, or a later run of this name has begun
        snapshot = Snapshot(self._run.path, self._labels, state, attempt["started"], exit_status)
        registry = CollectorRegistry()
        registry.register(snapshot)
        write_text(Path(attempt["gauges"]), generate_latest(registry).decode())


def _ending(error: BaseException | None) -> tuple[str, int]:
    """Return state and exit status; what is no Exception is a signal: KeyboardInterrupt, or Prefect's own."""
    if error is None:
        return "finished", 0
    if isinstance(error, Exception) and not isinstance(error, Resumable):
        return "failed", error.exit_status if isinstance(error, MemfitError) else MemfitError.exit_status
    return "stopped", Resumable.exit_status


def _started(file: Path) -> float:
    """Return the start of the run that a file tells of; 0 where there is none, or it cannot be read."""
    try:
        families = list(text_string_to_metric_families(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return 0.0
    named = (family for family in families if family.name == "memfit_run_start_time_seconds")
    return max((sample.value for family in named for sample in family.samples), default=0.0)


class Snapshot(Collector):
    """What a run's directory says at this moment."""

    def __init__(
        self, run_dir: Path, labels: dict[str, str], state: str, started: float, exit_status: int | None
    ) -> None:
        self._run_dir, self._labels = run_dir, labels
        self._state, self._started, self._exit_status = state, started, exit_status

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the families that have samples."""
        samples = self._times()
        for part in (self._steps, self._stages, self._scores):
            with suppress(LookupError, TypeError, ValueError, AttributeError):  # torn: whoever needs it will say so
                samples.update(part())
        for name, help_text in GAUGES.items():
            known = [(labels, value) for labels, value in samples.get(name, []) if value is not None]
            if known:
                names = [*self._labels, *known[0][0]]
                family = GaugeMetricFamily(f"memfit_run_{name}", help_text, labels=names)
                for labels, value in known:
                    family.add_metric([*self._labels.values(), *labels.values()], value)
                yield family

    def _times(self) -> dict[str, Samples]:
        now, ended = time.time(), self._exit_status is not None
        return {
            "state": [({"state": state}, float(state == self._state)) for state in STATES],
            "start_time_seconds": [({}, self._started)],
            "end_time_seconds": [({}, now if ended else None)],
            "last_update_time_seconds": [({}, now)],
            "duration_seconds": [({}, now - self._started)],
            "exit_status": [({}, self._exit_status)],
        }

    def _steps(self) -> dict[str, Samples]:
        steps = read_if_whole(self._run_dir / RECORD).get("steps", [])
        done = [step for step in steps if step["status"] in ("ran", "reused")]
        return {"step_duration_seconds": [({"step": step["name"]}, step["seconds"]) for step in done]}

    def _stages(self) -> dict[str, Samples]:
        plans = read_if_whole(self._run_dir / "plan.json").get("stages", [])
        named = [({"stage": plan["stage"]}, plan) for plan in plans]
        return {
            "stage_budget_bytes": [(labels, plan["budget_bytes"]) for labels, plan in named],
            "stage_planned_peak_bytes": [(labels, plan["measured_peak_bytes"]) for labels, plan in named],
            "stage_peak_bytes": [
                (labels, _peak_bytes(self._run_dir / f"stages/{number}-{plan['stage']}/events.jsonl"))
                for number, (labels, plan) in enumerate(named, 1)
            ],
        }

    def _scores(self) -> dict[str, Samples]:
        evaluation = read_if_whole(self._run_dir / "evaluation.json")
        baselines = evaluation.get("baselines") or {}
        gate = evaluation.get("gate")
        return {
            "score": [({"metric": name}, value) for name, value in (evaluation.get("metrics") or {}).items()],
            "baseline_score": [
                ({"baseline": baseline, "metric": name}, value)
                for baseline, scores in baselines.items()
                for name, value in scores.items()
            ],
            "gate_passed": [({}, float(gate["passed"]) if gate else None)],
        }


def _peak_bytes(log: Path) -> int | None:
    """Return the highest peak among a stage's epochs."""
    if not log.exists():
        return None
    with log.open("rb") as lines:
        epochs = [json.loads(line) for line in lines if line.startswith(b'{"event": "epoch"') and line.endswith(b"\n")]
    return max((epoch["memory"]["peak_bytes"] for epoch in epochs), default=None)
