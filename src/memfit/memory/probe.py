"""The child's side of planning: run candidates for real under the enforced budget."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from memfit.errors import MemfitError
from memfit.memory import enforcement
from memfit.memory.checks import check_loss
from memfit.memory.forecast import Forecast, Prediction
from memfit.memory.outlook import forecaster, hopeless, load_program, most_saving, relief
from memfit.memory.plan import HEADROOM, Candidate, Probe, evaluation_batch_size
from memfit.memory.search import HOPELESS, contenders, grid, sweep
from memfit.memory.simulate import CannotSimulateError
from memfit.process import Emit, is_out_of_memory
from memfit.step import (
    Batch,
    StepLayout,
    TrainingProgram,
    TrainingStep,
    evaluating,
    map_tensors,
    materialize_state,
)

_MIN_TIMED_SECONDS = 0.2
_LONG_STEP_SECONDS = 2.0
_AGAIN_SECONDS = 2.0
_MAX_TIMED_STEPS = 4


def run(payload: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Measure a ladder of candidates that share everything but the micro-batch; emit each probe.

    With `verifying` there is one candidate, and no other work before it. Where all `smallest` candidates are predicted
    to be far beyond the budget, nothing is run: they are emitted with the "relief" that would make one fit.
    """
    program = load_program(payload["program"])
    ladder = [Candidate(**candidate) for candidate in payload["candidates"]]
    limit = int(payload["budget_bytes"] * (1 - HEADROOM))
    forecast = forecaster(program, payload)
    if ladder[0].precision not in forecast.device.precisions:
        has = f"expected one that {payload['device']} has, of {list(forecast.device.precisions)}"
        message = f"{has}, got {ladder[0].precision!r}"
        emit({"event": "probe", "probe": asdict(Probe(**asdict(ladder[0]), outcome="unsupported", message=message))})
        return {"timeline": {}}
    if payload["check"]:
        check_loss(program, ladder[0])
    predicted = {} if payload["verifying"] else _predict(forecast, ladder)
    expected = [predicted[candidate].peak_bytes for candidate in ladder if candidate in predicted]
    emit({"event": "predicted", "bytes": expected, "usable": sorted(forecast.usable)})
    if ladder[0] in predicted and predicted[ladder[0]].peak_bytes > limit * (1 + HOPELESS):
        smallest = [most_saving(Candidate(**candidate), forecast.usable) for candidate in payload["smallest"]]
        if (refused := hopeless(forecast, smallest, limit, payload["global_batch_size"])) is not None:
            for probe in refused:
                emit({"event": "probe", "probe": asdict(probe)})
            return {"timeline": {}, "relief": relief(forecast, refused)}
    enforcement.enforce_budget(payload["budget_bytes"], payload["device"])
    prober = Prober(
        program,
        payload["device"],
        payload["budget_bytes"],
        payload["global_batch_size"],
        payload["clip"],
        emit,
        payload.get("device_batch_size", 0),
    )

    def expect(candidate: Candidate) -> int:
        return predicted[candidate].peak_bytes if candidate in predicted else 0

    probes: list[Probe] = []
    try:
        for probe in sweep(
            ladder, prober, limit, expect, lambda: prober.batch_norm or payload.get("fewest_cuts", False)
        ):
            known = predicted.get(probe.candidate) or _predict(forecast, [probe.candidate]).get(probe.candidate)
            if known is not None:
                probe = replace(probe, predicted_bytes=known.peak_bytes, upper_bytes=known.upper_bytes)
            probes.append(probe)
            emit({"event": "probe", "probe": asdict(probe)})
    except (ValueError, RuntimeError) as error:
        if isinstance(error, MemfitError) or probes or len(ladder) == 1 or ladder[0].micro_batch_size > 1:
            raise
        return {"timeline": {}, "single_sample_fails": f"{type(error).__name__}: {error}"}
    if probes[-1].outcome != "oom":
        for probe in prober.again(contenders(probes)):
            emit({"event": "timed", "probe": asdict(probe)})
    return {"timeline": forecast.timeline(ladder[0])}


def _predict(forecast: Forecast, ladder: Sequence[Candidate]) -> dict[Candidate, Prediction]:
    try:
        layouts = grid(ladder) if len(ladder) > 2 else list(ladder)
        return dict(zip(layouts, forecast.line(ladder, layouts), strict=True))
    except CannotSimulateError:
        return {}


@dataclass
class Prober:
    """Measures candidates in this process; a model is built anew when more than the micro-batch changes."""

    program: TrainingProgram
    device: str
    budget_bytes: int
    global_batch_size: int
    clip: float | None
    emit: Emit
    device_batch_size: int = 0
    """The share of the global batch that this device has; 0: all of it."""
    batch_norm: bool = False
    """Whether a model that was built has layers with batch statistics."""
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

    def again(self, probes: Sequence[Probe]) -> list[Probe]:
        """Time some layouts that fit in turns, for a second or two, and return each with its fastest time."""
        best, started = list(probes), time.perf_counter()
        while best and time.perf_counter() - started < _AGAIN_SECONDS:
            for place, probe in enumerate(best):
                step, batch, micro_steps = self._step(probe.candidate, *self._build(probe.candidate))
                micro, update = self._time(step, batch, micro_steps)
                timed = replace(probe, micro_seconds=micro, update_seconds=update)
                timed = timed.at(probe.candidate, self.global_batch_size)
                best[place] = max(probe, timed, key=lambda each: each.samples_per_second or 0.0)
        return best

    def _build(self, candidate: Candidate) -> tuple[nn.Module, torch.optim.Optimizer]:
        if self._built is None or self._built[0] != candidate.ladder:
            self._built = None
            self._phase("build")
            model = self.program.build(candidate.variant).to(self.device).train()
            optimizer = self.program.optimizer(model)
            self._phase("optimizer_state")
            materialize_state(model, optimizer)
            self._built = candidate.ladder, model, optimizer
            if any(isinstance(module, _BatchNorm) for module in model.modules()):
                self.batch_norm = True
                self.emit({"event": "batch_norm"})
        return self._built[1:]

    def _phase(self, name: str) -> None:
        self._note_peak()
        self._at = name
        self.emit({"event": "phase", "phase": name})

    def _note_peak(self) -> None:
        peak = enforcement.peak_bytes(self.device)
        if peak > self._binding[0]:
            self._binding = peak, self._at

    def _one(self, candidate: Candidate, model: nn.Module, optimizer: torch.optim.Optimizer, *, warm_up: bool) -> Probe:
        enforcement.reset_peak(self.device)
        self._binding, message = (0, ""), ""
        try:
            micro_seconds, update_seconds = self._phases(candidate, model, optimizer, warm_up)
        except (RuntimeError, MemoryError, OSError, SystemError) as error:
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
        step, batch, micro_steps = self._step(candidate, model, optimizer)
        on_host = torch.device(self.device).type == "cpu"  # where training holds the whole global batch
        rest = enforcement.rest_of_batch(batch, self.device_batch_size or self.global_batch_size) if on_host else None
        self._phase("train_step")
        if warm_up:
            step(batch)
        seconds = self._time(step, batch, micro_steps)
        del rest
        if self.program.evaluate is not None:
            self._phase("evaluate")
            size = evaluation_batch_size(candidate, self.device_batch_size or self.global_batch_size)
            self._evaluate(model, self.program.evaluate, self.program.batch(size, candidate.seq_len), candidate)
        if self.program.save is not None:
            self._phase("save")
            with tempfile.TemporaryDirectory() as folder:
                self.program.save(model, optimizer, Path(folder))
        return seconds

    def _layout(self, candidate: Candidate, accumulation_steps: int) -> StepLayout:
        exact = (candidate.chunked_loss, candidate.foreach)
        return StepLayout(accumulation_steps, candidate.precision, candidate.checkpointing, self.device, *exact)

    def _step(
        self, candidate: Candidate, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[TrainingStep, Batch, int]:
        """Lay out a step of as many micro-steps as matter, and make its batch."""
        micro_steps = min(2, candidate.accumulation_steps)  # two, so that gradients and activations coexist
        layout = self._layout(candidate, micro_steps)
        step = TrainingStep(layout, self.program, model, optimizer, clip=self.clip)
        return step, self.program.batch(candidate.micro_batch_size * micro_steps, candidate.seq_len), micro_steps

    def _time(self, step: TrainingStep, batch: Batch, micro_steps: int) -> tuple[float, float]:
        """Measure the fastest of a few steps: seconds per micro-step, and seconds of the update.

        The first one touches memory that is new to the process, so it counts alone only where a step takes long.
        """
        best, spent = (float("inf"), 0.0), 0.0
        for number in range(_MAX_TIMED_STEPS):
            stats = step(batch)
            best = min(best, ((stats.seconds - stats.update_seconds) / micro_steps, stats.update_seconds))
            spent += stats.seconds
            if spent >= (_LONG_STEP_SECONDS if number == 0 else _MIN_TIMED_SECONDS):
                break
        return best

    def _evaluate(
        self, model: nn.Module, evaluate: Callable[[nn.Module, Batch], Any], batch: Batch, candidate: Candidate
    ) -> None:
        model.eval()
        with evaluating(self._layout(candidate, 1)):
            evaluate(model, map_tensors(lambda tensor: tensor.to(self.device), batch))
        model.train()
