"""What layouts will take, from few simulations: bytes and seconds, each a straight line in the micro-batch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memfit import chunked_loss
from memfit.memory.devices import Device
from memfit.memory.enforcement import host_bytes
from memfit.memory.estimate import CATEGORIES, from_trace
from memfit.memory.operators import Operators
from memfit.memory.plan import Candidate, Probe
from memfit.memory.simulate import simulate
from memfit.memory.trace import Trace
from memfit.step import TrainingProgram


@dataclass(frozen=True)
class Prediction:
    """Of one layout: process bytes, and seconds where the device's rates are known."""

    peak_bytes: int
    upper_bytes: int
    micro_seconds: float = 0.0
    update_seconds: float = 0.0
    phase: str = "train_step"
    """The phase that binds."""


class Forecast:
    """Predicts layouts of one program on one device."""

    def __init__(
        self, program: TrainingProgram, device: Device, *, evaluation_factor: int, clip: float | None = None
    ) -> None:
        self.program, self.device, self.clip = program, device, clip
        self._operators = Operators(device)
        self._evaluation_factor = evaluation_factor
        self._known: dict[Candidate, Prediction] = {}
        self._rough: dict[Candidate, Prediction] = {}
        self._evaluated: dict[tuple[Any, ...], Prediction] = {}
        self._sample_bytes: dict[int | None, float] = {}
        self._timelines: dict[Candidate, dict[str, list[Any]]] = {}
        self.notes: list[str] = []
        self.usable: set[str] = set()
        """Which of the levers chunked_loss and foreach change anything, as far as was simulated."""

    def of(self, candidate: Candidate) -> Prediction:
        """Simulate one layout: its training step, and its evaluation batch if the program has one."""
        key = self._key(candidate)
        if key not in self._known:
            self._known[key] = self._train(key, quick=False)
        train = self._with_rest_of_batch(candidate, self._known[key], min(2, candidate.accumulation_steps))
        return self._with_evaluation(candidate, train)

    def take_over(self, probes: Iterable[Probe]) -> None:
        """Take what an earlier forecast of the same program said, for another global batch, on a card."""
        for probe in probes if self.device.kind != "cpu" else ():
            if probe.accumulation_steps > 1 and probe.predicted_bytes and probe.upper_bytes:
                seconds = probe.micro_seconds or 0.0, probe.update_seconds or 0.0
                known = Prediction(probe.predicted_bytes, probe.upper_bytes, *seconds, probe.phase or "train_step")
                self._rough[self._key(probe.candidate)] = known

    def _roughly(self, candidate: Candidate) -> Prediction:
        """Predict the training step alone."""
        key = self._key(candidate)
        if key not in self._rough:
            self._rough[key] = self._train(key, quick=True)
        return self._rough[key]

    def _with_rest_of_batch(self, candidate: Candidate, train: Prediction, micro_steps: int) -> Prediction:
        """Add what of the global batch was not simulated: on a CPU the loop holds all of it."""
        if self.device.kind != "cpu" or candidate.accumulation_steps <= micro_steps:
            return train
        if candidate.seq_len not in self._sample_bytes:
            few = self.program.batch(candidate.micro_batch_size, candidate.seq_len)
            self._sample_bytes[candidate.seq_len] = host_bytes(few) / candidate.micro_batch_size
        left = (candidate.accumulation_steps - micro_steps) * candidate.micro_batch_size
        rest = int(left * self._sample_bytes[candidate.seq_len])
        return replace(train, peak_bytes=train.peak_bytes + rest, upper_bytes=train.upper_bytes + rest)

    def timeline(self, candidate: Candidate) -> dict[str, list[Any]]:
        """Return the memory timeline of a layout that was simulated: "phase", and MiB by category, moment by moment."""
        return self._timelines.get(self._key(candidate), {})

    def _key(self, candidate: Candidate) -> Candidate:
        """More than two micro-steps take no more memory than two, but evaluation takes as many at once as it may."""
        different = 2 if self.program.evaluate is None else max(2, self._evaluation_factor)
        return replace(candidate, accumulation_steps=min(different, candidate.accumulation_steps))

    def _train(self, candidate: Candidate, *, quick: bool) -> Prediction:
        chunked_loss.reset_used()
        trace = self._simulate(
            candidate,
            micro_batch_size=candidate.micro_batch_size,
            accumulation_steps=candidate.accumulation_steps,
            checkpointing=candidate.checkpointing,
            chunked_loss=candidate.chunked_loss,
            foreach=candidate.foreach,
            clip=self.clip,
            quick=quick,
        )
        self.usable |= {"chunked_loss"} if chunked_loss.used() else set()
        self.usable |= {"foreach"} if any(each.op.startswith("aten::_foreach") for each in trace.storages) else set()
        self.notes += [note for note in trace.notes if note not in self.notes]
        train = from_trace(trace, self.device)
        self._timelines[candidate] = _columns(train.timeline)
        return Prediction(
            train.process_bytes,
            train.upper_bytes + self.device.context_bytes,
            trace.seconds["micro"] / (1 if quick else min(2, candidate.accumulation_steps)),
            trace.seconds["update"],
        )

    def _simulate(self, candidate: Candidate, **layout: Any) -> Trace:
        return simulate(
            self.program,
            self.device,
            precision=candidate.precision,
            variant=candidate.variant,
            seq_len=candidate.seq_len,
            operators=self._operators,
            **layout,
        )

    def _evaluate(self, candidate: Candidate, size: int) -> Prediction:
        key = (candidate.precision, candidate.variant, candidate.seq_len, size)
        if key not in self._evaluated:
            trace = self._simulate(candidate, micro_batch_size=size, phase="evaluate", num_steps=1)
            found = from_trace(trace, self.device)
            upper = found.upper_bytes + self.device.context_bytes
            self._evaluated[key] = Prediction(found.process_bytes, upper, phase="evaluate")
        return self._evaluated[key]

    def _evaluation_size(self, candidate: Candidate) -> int:
        return candidate.micro_batch_size * min(self._evaluation_factor, candidate.accumulation_steps)

    def _with_evaluation(self, candidate: Candidate, train: Prediction) -> Prediction:
        if self.program.evaluate is None:
            return train
        return _larger(train, self._evaluate(candidate, self._evaluation_size(candidate)))

    def line(self, ladder: Sequence[Candidate], layouts: Sequence[Candidate] | None = None) -> list[Prediction]:
        """Predict layouts, by default a ladder's own rungs, from simulations of two rungs and the line through them.

        The two accumulate alike and lie far apart: what tensors of a few MiB take is uneven. Evaluation has a line of
        its own, in its own batch size.
        """
        layouts = ladder if layouts is None else layouts
        if len(ladder) < 3:
            trained = [self._with_rest_of_batch(each, self._roughly(each), 1) for each in layouts]
            return [self._with_evaluation(each, train) for each, train in zip(layouts, trained, strict=True)]
        low, high = ladder[min(len(ladder) // 3, len(ladder) - 3)], ladder[-2]
        first, second = self._roughly(low), self._roughly(high)
        ends = (low.micro_batch_size, first), (high.micro_batch_size, second)
        found = [self._with_rest_of_batch(each, _on_line(each.micro_batch_size, *ends), 1) for each in layouts]
        if self.program.evaluate is None:
            return found
        small, large = self._evaluation_size(low), self._evaluation_size(ladder[-1])
        most = self._evaluate(high, large)
        if most.upper_bytes <= min(train.upper_bytes for train in found):
            return found  # the largest evaluation takes less than the smallest step
        ends = (small, self._evaluate(low, small)), (large, most)
        sizes = [self._evaluation_size(candidate) for candidate in layouts]
        return [_larger(train, _on_line(size, *ends)) for train, size in zip(found, sizes, strict=True)]


def _larger(train: Prediction, evaluation: Prediction) -> Prediction:
    upper = max(train.upper_bytes, evaluation.upper_bytes)
    if evaluation.peak_bytes <= train.peak_bytes:
        return replace(train, upper_bytes=upper)
    return replace(train, peak_bytes=evaluation.peak_bytes, upper_bytes=upper, phase="evaluate")


def _on_line(n: int, low: tuple[int, Prediction], high: tuple[int, Prediction]) -> Prediction:
    (n1, first), (n2, second) = low, high

    def at(y1: float, y2: float) -> float:
        return max(y1 + (y2 - y1) / ((n2 - n1) or 1) * (n - n1), 0.0)

    return Prediction(
        int(at(first.peak_bytes, second.peak_bytes)),
        int(at(first.upper_bytes, second.upper_bytes)),
        at(first.micro_seconds, second.micro_seconds),
        at(first.update_seconds, second.update_seconds),
        second.phase,
    )


def _columns(timeline: Sequence[tuple[str, Mapping[str, int]]]) -> dict[str, list[Any]]:
    names = [name for name in CATEGORIES if any(held[name] for _, held in timeline)]
    mib = {name: [round(held[name] / 2**20, 1) for _, held in timeline] for name in names}
    return {"phase": [phase for phase, _ in timeline], **mib}
