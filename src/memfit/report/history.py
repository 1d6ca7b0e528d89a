"""A stage's events.jsonl read as a stream: epochs whole, steps thinned to a bounded number of points."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from memfit.report.units import finite

MAX_POINTS = 480
STEP_SERIES = ("loss", "gradient_norm", "lr", "seconds")


@dataclass
class _Bucket:
    step: float
    total: float
    count: int
    low: float
    high: float

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1
        if value < self.low:
            self.low = value
        elif value > self.high:
            self.high = value

    def merge(self, other: Self) -> None:
        self.total += other.total
        self.count += other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


@dataclass
class ThinnedSeries:
    """A series of any length in at most `MAX_POINTS` buckets that keep their mean, lowest and highest.

    Every bucket covers the same number of values; when there are too many, neighbours merge. A single spike so
    stays visible however long the run was.
    """

    buckets: list[_Bucket] = field(default_factory=list)
    stride: int = 1
    num_undefined: int = 0

    def add(self, step: float, value: Any) -> None:
        """Take the next value; a missing, NaN or infinite one is only counted."""
        number = finite(value)
        if number is None:
            self.num_undefined += 1
            return
        if self.buckets and self.buckets[-1].count < self.stride:
            self.buckets[-1].add(number)
            return
        self.buckets.append(_Bucket(step, number, 1, number, number))
        if len(self.buckets) > MAX_POINTS:
            self._halve()

    def rewind(self, step: float) -> None:
        """Forget what came after `step`, as far as whole buckets can."""
        while self.buckets and self.buckets[-1].step > step:
            self.buckets.pop()

    def _halve(self) -> None:
        for left, right in zip(self.buckets[::2], self.buckets[1::2], strict=False):
            left.merge(right)
        self.buckets = self.buckets[::2]
        self.stride *= 2

    @property
    def steps(self) -> list[float]:
        """The first step of each bucket."""
        return [bucket.step for bucket in self.buckets]

    @property
    def means(self) -> list[float]:
        """The mean of each bucket."""
        return [bucket.total / bucket.count for bucket in self.buckets]

    @property
    def lows(self) -> list[float]:
        """The lowest value of each bucket."""
        return [bucket.low for bucket in self.buckets]

    @property
    def highs(self) -> list[float]:
        """The highest value of each bucket."""
        return [bucket.high for bucket in self.buckets]


@dataclass
class StageHistory:
    """What one stage wrote down while it trained."""

    name: str
    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    resumes: list[dict[str, Any]] = field(default_factory=list)
    spikes: list[dict[str, Any]] = field(default_factory=list)
    """Updates that were skipped."""
    health: list[dict[str, Any]] = field(default_factory=list)
    """Of each epoch, its layers' gradient norms alone in place of its layers."""
    newest_health: dict[str, Any] = field(default_factory=dict)
    """The last of those, whole."""
    steps: dict[str, ThinnedSeries] = field(default_factory=lambda: {name: ThinnedSeries() for name in STEP_SERIES})
    """`loss`, `gradient_norm`, `lr` and `seconds`."""
    num_steps: int = 0
    num_unreadable: int = 0

    @property
    def seconds(self) -> float | None:
        """The stage's duration; while it is unfinished, that of its epochs."""
        ended = finite(self.end.get("seconds"))
        if ended is not None:
            return ended
        known = [seconds for epoch in self.epochs if (seconds := finite(epoch.get("seconds"))) is not None]
        return sum(known) if known else None

    @property
    def best_index(self) -> int | None:
        """Position in `epochs` of the best one: by name at the stage's end, until then the last marked one."""
        named = self.end.get("best_epoch")
        marked = [
            index
            for index, epoch in enumerate(self.epochs)
            if (epoch.get("epoch") == named if named is not None else epoch.get("best"))
        ]
        return marked[-1] if marked else None

    def take(self, event: dict[str, Any]) -> None:
        """Add one event; kinds that are unknown are for other readers."""
        match event.get("event"):
            case "stage_start":
                self.start = event
                self.name = str(event.get("stage") or self.name)
            case "step":
                self._take_step(event)
            case "epoch":
                self.epochs.append(event)
            case "health":
                self._take_health(event)
            case "spike":
                self.spikes.append(event)
            case "resume":
                self._rewind(event)
            case "stage_end":
                self.end = event

    def _take_step(self, event: dict[str, Any]) -> None:
        step = finite(event.get("step"))
        step = self.num_steps + 1 if step is None else step
        self.num_steps = max(self.num_steps, int(step))
        losses = event.get("losses")
        self.steps["loss"].add(step, losses.get("total") if isinstance(losses, dict) else None)
        for name in STEP_SERIES[1:]:
            self.steps[name].add(step, event.get(name))

    def _take_health(self, event: dict[str, Any]) -> None:
        layers = event.get("layers")
        layers = layers if isinstance(layers, dict) else {}
        norms = {sys.intern(name): of.get("gradient_norm") for name, of in layers.items() if isinstance(of, dict)}
        self.health.append({**event, "layers": norms})
        self.newest_health = event

    def _rewind(self, event: dict[str, Any]) -> None:
        """Drop what a resumed run did again, so that no step is drawn twice."""
        self.resumes.append(event)
        self.end = {}
        step = finite(event.get("step"))
        if step is None:
            return
        self.num_steps = int(step)
        self.epochs = [epoch for epoch in self.epochs if (finite(epoch.get("step")) or -math.inf) <= step]
        self.spikes = [spike for spike in self.spikes if (finite(spike.get("step")) or -math.inf) <= step]
        for series in self.steps.values():
            series.rewind(step)
        epoch = finite(event.get("epoch")) or 0
        self.health = [health for health in self.health if (finite(health.get("epoch")) or 0) <= epoch]
        if (finite(self.newest_health.get("epoch")) or 0) > epoch:
            self.newest_health = {}


def read_history(path: Path, name: str) -> StageHistory:
    """Read an events file of any length line by line.

    A line that is no JSON object (the last one of a killed process) is counted, not fatal.
    """
    history = StageHistory(name)
    for event in _events(path):
        if event is None:
            history.num_unreadable += 1
        else:
            history.take(event)
    return history


def _events(path: Path) -> Iterator[dict[str, Any] | None]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except ValueError:
                yield None
                continue
            yield event if isinstance(event, dict) else None
