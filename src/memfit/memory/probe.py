"""The child's side of planning: run candidates for real under the enforced budget."""

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memfit.errors import ConfigError
from memfit.memory import budget
from memfit.memory.plan import Candidate, Probe
from memfit.memory.search import sweep
from memfit.process import Emit, is_out_of_memory
from memfit.step import Batch, TrainingProgram, TrainingStep, autocast, map_tensors, num_samples

HEADROOM = 0.03
"""Share of the budget that a plan leaves free: a long run fragments a little more than a probe."""
EVALUATION_FACTOR = 4
"""Evaluation keeps no activations, so its batches may be this many micro-batches large."""
_MIN_TIMED_SECONDS = 0.3
_MAX_TIMED_STEPS = 4


@dataclass(frozen=True)
class _ProbeLayout:
    accumulation_steps: int
    precision: str
    checkpointing: str
    device: str


def evaluation_batch_size(candidate: Candidate, global_batch_size: int) -> int:
    """Choose the batch that evaluation runs with, and that the probe measures."""
    return max(candidate.micro_batch_size, min(global_batch_size, EVALUATION_FACTOR * candidate.micro_batch_size))


def load_program(description: dict[str, Any]) -> TrainingProgram:
    """Build the program that `{"factory": "module:function", "arguments": {...}}` describes."""
    module, name = description["factory"].split(":")
    program = getattr(importlib.import_module(module), name)(description["arguments"])
    assert isinstance(program, TrainingProgram)
    return program


def run(payload: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Measure a ladder of candidates that share precision, checkpointing and variant; emit each probe."""
    program = load_program(payload["program"])
    ladder = [Candidate(**candidate) for candidate in payload["candidates"]]
    budget.enforce_budget(payload["budget_bytes"], payload["device"])
    prober = Prober(
        program, payload["device"], payload["budget_bytes"], payload["global_batch_size"], payload["clip"], emit
    )
    for probe in sweep(ladder, prober.measure, int(payload["budget_bytes"] * (1 - HEADROOM))):
        emit({"event": "probe", "probe": asdict(probe)})
    return {}


@dataclass
class Prober:
    """Measures candidates in this process."""

    program: TrainingProgram
    device: str
    budget_bytes: int
    global_batch_size: int
    clip: float | None
    emit: Emit

    def measure(self, ladder: Sequence[Candidate], _verifying: bool) -> Iterator[Probe]:
        """Yield a probe per candidate. Only the last one may have run out of memory."""
        self._phase("build")
        first = ladder[0]
        model = self.program.build(first.variant).to(self.device).train()
        optimizer = self.program.optimizer(model)
        self._phase("optimizer_state")
        materialize_state(model, optimizer)
        for index, candidate in enumerate(ladder):
            self.emit({"event": "trying", "candidate": asdict(candidate)})
            yield self._one(candidate, model, optimizer, warm_up=index == 0)

    def _phase(self, name: str) -> None:
        self.emit({"event": "phase", "phase": name})

    def _one(self, candidate: Candidate, model: nn.Module, optimizer: torch.optim.Optimizer, *, warm_up: bool) -> Probe:
        budget.reset_peak(self.device)
        message = ""
        try:
            micro_seconds, update_seconds = self._phases(candidate, model, optimizer, warm_up)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            message = str(error)[:300]
        if message:  # outside the handler: a live traceback pins the tensors
            return Probe(**asdict(candidate), outcome="oom", message=message)
        peak = budget.peak_bytes(self.device)
        fits = peak <= self.budget_bytes * (1 - HEADROOM)
        probe = Probe(
            **asdict(candidate),
            outcome="fits" if fits else "over_budget",
            peak_bytes=peak,
            micro_seconds=micro_seconds,
            update_seconds=update_seconds,
        )
        return probe.at(candidate, self.global_batch_size)

    def _phases(
        self, candidate: Candidate, model: nn.Module, optimizer: torch.optim.Optimizer, warm_up: bool
    ) -> tuple[float, float]:
        """Run a step, an evaluation batch and a checkpoint write; return seconds per full global step."""
        micro_steps = min(2, candidate.accumulation_steps)  # two, so that gradients and activations coexist
        layout = _ProbeLayout(micro_steps, candidate.precision, candidate.checkpointing, self.device)
        step = TrainingStep(layout, self.program, model, optimizer, clip=self.clip)
        batch = self._batch(candidate.micro_batch_size * micro_steps)
        self._phase("train_step")
        if warm_up:
            step(batch)
        seconds = self._time(step, batch, micro_steps)
        if self.program.evaluate is not None:
            self._phase("evaluate")
            size = evaluation_batch_size(candidate, self.global_batch_size)
            self._evaluate(model, self.program.evaluate, self._batch(size), candidate)
        if self.program.save is not None:
            self._phase("save")
            with tempfile.TemporaryDirectory() as folder:
                self.program.save(model, optimizer, Path(folder))
        return seconds

    def _batch(self, size: int) -> Batch:
        batch = self.program.make_batch(size, None)
        if num_samples(batch) != size:
            raise ConfigError(
                f"make_batch: expected {size} samples, got {num_samples(batch)}. Return as many as asked for."
            )
        return batch

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


def materialize_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its state before the first forward pass, as a resumed run has it.

    Parameters move (weight decay), so this is for a model that is thrown away.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
