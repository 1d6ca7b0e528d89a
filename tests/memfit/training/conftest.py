"""Stages of the tiny series, trained in this process: quick, and open to injected stops."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from memfit.errors import Resumable
from memfit.memory import enforcement
from memfit.memory.plan import Plan
from memfit.training import loop, worker

VOLATILE = ("seconds", "stall_seconds", "memory", "samples_per_second", "eta_seconds", "time")


@pytest.fixture(autouse=True)
def no_limits(monkeypatch):
    """A budget is enforced on a child; this process is pytest's own."""
    monkeypatch.setattr(enforcement, "enforce_budget", lambda _budget_bytes, _device: None)


def make_plan(**changes) -> Plan:
    settings = {
        "stage": "first",
        "device": "cpu",
        "budget_bytes": 2**31,
        "global_batch_size": 16,
        "micro_batch_size": 6,
        "accumulation_steps": 3,
        "precision": "fp32",
        "checkpointing": "none",
        "variant": "light",
        "measured_peak_bytes": None,
        "eval_batch_size": 32,
        "step_seconds": None,
        "samples_per_second": None,
        "verified": True,
        "levers": (),
        "probes": (),
        "fingerprint": "0" * 16,
        "reason": "",
    }
    return Plan(**{**settings, **changes})


def make_stage(**changes) -> dict:
    settings = {
        "name": "first",
        "epochs": 3,
        "global_batch_size": 16,
        "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup_steps": 4, "final_factor": 0.1, "every_steps": 9, "factor": 0.5},
        "train": ["*"],
        "monitor": "total",
        "monitor_mode": "min",
        "patience": 15,
        "clip": 1.0,
        "skip_spikes": 0.0,
        "checkpoint_every_steps": 0,
        "checkpoint_every_minutes": 0,
        "keep_checkpoints": 1,
        "checkpoint_every_epochs": 0,
        "max_steps": None,
        "epoch_steps": None,
        "keep_optimizer": None,
    }
    schedule = {**settings["schedule"], **changes.pop("schedule", {})}
    return {**settings, "schedule": {**schedule, "patience": 0}, **changes}


class Attempts:
    """Trains a stage in a folder, as often as it takes, stopping where it is told to."""

    def __init__(self, folder: Path, job: dict, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.job, self._patch = folder, {**job, "stage_dir": str(folder)}, monkeypatch
        self.emitted: list[dict] = []

    def run(self, stop_after: int | None = None, ask: Callable[[], bool] | None = None) -> dict:
        """Train to the end, or up to a stop asked for after so many optimizer steps of this attempt."""
        steps = iter(range(1, 10**6))
        self._patch.setattr(loop, "stop_requested", ask or (lambda: next(steps) == stop_after))
        return worker.run(self.job, self.emitted.append)

    def run_interrupted(self, *stops: int) -> dict:
        for stop in stops:
            with pytest.raises(Resumable, match="checkpoint written"):
                self.run(stop_after=stop)
        return self.run()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def weights(self, link: str) -> bytes:
        return (self.checkpoints / link / "model.safetensors").read_bytes()

    def events(self) -> list[dict]:
        """The event log without what a clock or the machine decides."""
        lines = (self.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in VOLATILE} for line in lines]

    def of_kind(self, kind: str) -> list[dict]:
        return [event for event in self.events() if event["event"] == kind]


@pytest.fixture
def attempts(tmp_path, prepared, tiny_model, monkeypatch):
    """`attempts(name, stage=..., plan=..., **job)`: a stage in a folder of its own."""

    def build(name: str = "stage", stage: dict | None = None, plan: dict | None = None, **changes) -> Attempts:
        job = {
            "workload": "series",
            "data_dir": str(prepared),
            "model": tiny_model,
            "loss": {"class_balance": True},
            "stage": make_stage(**(stage or {})),
            "stage_index": 0,
            "seed": 5,
            "plan": make_plan(**(plan or {})).to_dict(),
            "fingerprint": "abc",
            "initial_weights": None,
        }
        return Attempts(tmp_path / name, {**job, **changes}, monkeypatch)

    return build
