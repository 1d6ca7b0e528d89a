"""The child's side of planning: run candidates for real under the enforced budget."""

import importlib
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memfit.memory import budget
from memfit.memory.checks import check_loss
from memfit.memory.devices import find_device, read_devices
from memfit.memory.forecast import Forecast, Prediction
from memfit.memory.plan import Candidate, Probe
from memfit.memory.search import grid, ranking, sweep
from memfit.memory.simulate import CannotSimulateError
from memfit.process import Emit, is_out_of_memory
from memfit.step import (
    Batch,
    StepLayout,
    TrainingProgram,
    TrainingStep,
    autocast,
    map_tensors,
    materialize_state,
)

HEADROOM = 0.03
"""Share of the budget that a plan leaves free: a long run fragments a little more than a probe."""
EVALUATION_FACTOR = 4
"""Evaluation keeps no activations, so its batches may be this many micro-batches large."""
_MIN_TIMED_SECONDS = 0.3
_MAX_TIMED_STEPS = 4
_EXACT_TRIES = 8


def evaluation_batch_size(candidate: Candidate, global_batch_size: int) -> int:
    """Choose the batch that evaluation runs with, and that the probe measures."""
    return max(candidate.micro_batch_size, min(global_batch_size, EVALUATION_FACTOR * candidate.micro_batch_size))


def load_program(description: dict[str, Any]) -> TrainingProgram:
    """Build the program that `{"factory": "module:function", "arguments": {...}}` or `{"pickle": path}` describes."""
    if "pickle" in description:
        loaded = pickle.loads(Path(description["pickle"]).read_bytes())  # noqa: S301  (written by the parent just now)
        assert isinstance(loaded, TrainingProgram)
        return loaded
    module, name = description["factory"].split(":")
    program = getattr(importlib.import_module(module), name)(description["arguments"])
    assert isinstance(program, TrainingProgram)
    return program


def run(payload: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Measure a ladder of candidates that share everything but the micro-batch; emit each probe.

    With `verifying` there is one candidate, and no other work before it.
    """
    program = load_program(payload["program"])
    ladder = [Candidate(**candidate) for candidate in payload["candidates"]]
    limit = int(payload["budget_bytes"] * (1 - HEADROOM))
    device = find_device(payload["device"], read_devices(payload["user_devices"]))
    forecast = Forecast(program, device, evaluation_factor=EVALUATION_FACTOR, clip=payload["clip"])
    if payload["check"]:
        check_loss(program, ladder[0])
    predicted = {} if payload["verifying"] else _predict(forecast, ladder)
    emit({"event": "predicted", "bytes": [predicted[c].peak_bytes for c in ladder if c in predicted]})
    budget.enforce_budget(payload["budget_bytes"], payload["device"])
    prober = Prober(
        program, payload["device"], payload["budget_bytes"], payload["global_batch_size"], payload["clip"], emit
    )

    def expect(candidate: Candidate) -> int:
        return predicted[candidate].peak_bytes if candidate in predicted else 0

    for probe in sweep(ladder, prober, limit, expect):
        known = predicted.get(probe.candidate) or _predict(forecast, [probe.candidate]).get(probe.candidate)
        if known is not None:
            probe = replace(probe, predicted_bytes=known.peak_bytes, upper_bytes=known.upper_bytes)
        emit({"event": "probe", "probe": asdict(probe)})
    return {"timeline": forecast.timeline(ladder[0])}


def _predict(forecast: Forecast, ladder: Sequence[Candidate]) -> dict[Candidate, Prediction]:
    try:
        return dict(zip(ladder, forecast.line(ladder), strict=True))
    except CannotSimulateError:
        return {}


def forecast(payload: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Predict ladders on a device that need not be here; emit rungs and the best layout of all."""
    program = load_program(payload["program"])
    device = find_device(payload["device"], read_devices(payload["user_devices"]))
    oracle = Forecast(program, device, evaluation_factor=EVALUATION_FACTOR, clip=payload["clip"])
    oracle.take_over(Probe(**probe) for probe in payload["known"])
    limit, size = int(payload["budget_bytes"] * (1 - HEADROOM)), payload["global_batch_size"]
    ladders = [[Candidate(**candidate) for candidate in ladder] for ladder in payload["ladders"]]
    rungs = {candidate for ladder in ladders for candidate in ladder}
    probes, smallest = [], []
    for ladder in ladders:
        layouts = grid(ladder)
        for candidate, prediction in zip(layouts, oracle.line(ladder, layouts), strict=True):
            probes.append(_predicted(candidate, prediction, limit, size))
            if candidate in rungs:
                emit({"event": "probe", "probe": asdict(probes[-1])})
        smallest.append(probes[-len(layouts)])
    for probe in (*ranking(probes)[:_EXACT_TRIES], *smallest):
        exact = _predicted(probe.candidate, oracle.of(probe.candidate), limit, size)
        fits = exact.outcome == "predicted"
        emit({"event": "probe", "probe": asdict(replace(exact, verifying=fits))})
        if fits:
            return {"timeline": oracle.timeline(probe.candidate)}
    return {"timeline": {}}


def _predicted(candidate: Candidate, prediction: Prediction, limit: int, size: int) -> Probe:
    probe = Probe(
        **asdict(candidate),
        outcome="predicted" if prediction.upper_bytes <= limit else "over_budget",
        predicted_bytes=prediction.peak_bytes,
        upper_bytes=prediction.upper_bytes,
        micro_seconds=prediction.micro_seconds,
        update_seconds=prediction.update_seconds,
        phase=None if prediction.upper_bytes <= limit else prediction.phase,
    )
    return probe.at(candidate, size)


def relief(payload: dict[str, Any], emit: Emit) -> list[dict[str, Any]]:
    """Estimate what else would make the smallest layout fit: one change at a time, the mildest first."""
    program = load_program(payload["program"])
    device = find_device(payload["device"], read_devices(payload["user_devices"]))
    smallest = Candidate(**payload["candidate"])
    oracle = Forecast(program, device, evaluation_factor=EVALUATION_FACTOR, clip=payload["clip"])
    changes: list[tuple[str, Candidate]] = [("", smallest)]
    if program.blocks and smallest.checkpointing == "none":
        changes.append(("plan.checkpointing 'blocks'", replace(smallest, checkpointing="blocks")))
    lighter = [name for name in device.precisions if name != "fp32" and smallest.precision == "fp32"]
    changes += [(f"plan.precisions {name!r}", replace(smallest, precision=name)) for name in lighter[:1]]
    if smallest.seq_len:
        changes.append((f"seq_len {smallest.seq_len // 2}", replace(smallest, seq_len=smallest.seq_len // 2)))
    others = [name for name in program.variants if name != smallest.variant]
    changes += [(f"the variant {name!r}", replace(smallest, variant=name)) for name in others]
    found = []
    for name, candidate in changes:
        emit({"event": "phase", "phase": f"estimate {name}"})
        prediction = oracle.of(candidate)
        found.append({"change": name, "upper_bytes": prediction.upper_bytes, "phase": prediction.phase})
    return found


@dataclass
class Prober:
    """Measures candidates in this process; a model is built anew when more than the micro-batch changes."""

    program: TrainingProgram
    device: str
    budget_bytes: int
    global_batch_size: int
    clip: float | None
    emit: Emit
    _built: tuple[tuple[Any, ...], nn.Module, torch.optim.Optimizer] | None = None
    _at: str = ""
    _binding: tuple[int, str] = (0, "")
    """(peak so far, the phase that reached it)."""

    def __call__(self, candidate: Candidate) -> Probe:
        """Run a candidate's step, evaluation and checkpoint write. After an "oom", nothing more should be run."""
        warm_up = self._built is None or self._built[0] != candidate.ladder
        model, optimizer = self._build(candidate)
        self.emit({"event": "trying", "candidate": asdict(candidate)})
        return self._one(candidate, model, optimizer, warm_up=warm_up)

    def _build(self, candidate: Candidate) -> tuple[nn.Module, torch.optim.Optimizer]:
        if self._built is None or self._built[0] != candidate.ladder:
            self._built = None
            self._phase("build")
            model = self.program.build(candidate.variant).to(self.device).train()
            optimizer = self.program.optimizer(model)
            self._phase("optimizer_state")
            materialize_state(model, optimizer)
            self._built = candidate.ladder, model, optimizer
        return self._built[1:]

    def _phase(self, name: str) -> None:
        self._note_peak()
        self._at = name
        self.emit({"event": "phase", "phase": name})

    def _note_peak(self) -> None:
        peak = budget.peak_bytes(self.device)
        if peak > self._binding[0]:
            self._binding = peak, self._at

    def _one(self, candidate: Candidate, model: nn.Module, optimizer: torch.optim.Optimizer, *, warm_up: bool) -> Probe:
        budget.reset_peak(self.device)
        self._binding, message = (0, ""), ""
        try:
            micro_seconds, update_seconds = self._phases(candidate, model, optimizer, warm_up)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            message = str(error)[:300]
        if message:  # outside the handler: a live traceback pins the tensors
            return Probe(**asdict(candidate), outcome="oom", phase=self._at, message=message)
        self._note_peak()
        peak, phase = self._binding
        fits = peak <= self.budget_bytes * (1 - HEADROOM)
        probe = Probe(
            **asdict(candidate),
            outcome="fits" if fits else "over_budget",
            peak_bytes=peak,
            micro_seconds=micro_seconds,
            update_seconds=update_seconds,
            phase=None if fits else phase,
        )
        return probe.at(candidate, self.global_batch_size)

    def _phases(
        self, candidate: Candidate, model: nn.Module, optimizer: torch.optim.Optimizer, warm_up: bool
    ) -> tuple[float, float]:
        """Run a step, an evaluation batch and a checkpoint write; return seconds per full global step."""
        micro_steps = min(2, candidate.accumulation_steps)  # two, so that gradients and activations coexist
        layout = StepLayout(micro_steps, candidate.precision, candidate.checkpointing, self.device)
        step = TrainingStep(layout, self.program, model, optimizer, clip=self.clip)
        batch = self.program.batch(candidate.micro_batch_size * micro_steps, candidate.seq_len)
        self._phase("train_step")
        if warm_up:
            step(batch)
        seconds = self._time(step, batch, micro_steps)
        if self.program.evaluate is not None:
            self._phase("evaluate")
            size = evaluation_batch_size(candidate, self.global_batch_size)
            self._evaluate(model, self.program.evaluate, self.program.batch(size, candidate.seq_len), candidate)
        if self.program.save is not None:
            self._phase("save")
            with tempfile.TemporaryDirectory() as folder:
                self.program.save(model, optimizer, Path(folder))
        return seconds

    def _time(self, step: TrainingStep, batch: Batch, micro_steps: int) -> tuple[float, float]:
        """Measure the fastest of a few steps: seconds per micro-step, and seconds of the update."""
        best, spent = (float("inf"), 0.0), 0.0
        for _ in range(_MAX_TIMED_STEPS):
            stats = step(batch)
            best = min(best, ((stats.seconds - stats.update_seconds) / micro_steps, stats.update_seconds))
            spent += stats.seconds
            if spent >= _MIN_TIMED_SECONDS:
                break
        return best

    def _evaluate(
        self, model: nn.Module, evaluate: Callable[[nn.Module, Batch], Any], batch: Batch, candidate: Candidate
    ) -> None:
        model.eval()
        with torch.no_grad(), autocast(candidate.precision, self.device):
            evaluate(model, map_tensors(lambda tensor: tensor.to(self.device), batch))
        model.train()
