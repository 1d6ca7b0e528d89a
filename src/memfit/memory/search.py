"""Choose among candidates: pure functions over a `measure` callable, so they need no device."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from memfit.memory.plan import Candidate, Probe

TIE = 0.03
"""Plans whose throughput differs by no more than this share are equal; the smaller peak wins."""
BETWEEN = 0.02
"""Share of the budget that a micro-batch between two rungs must leave by expectation, as peaks vary."""
FORECAST_SLACK = 0.15
"""A rung is left out only if it is predicted to pass the budget by more than this share."""
NOISE = 0.25
"""Share by which timings of the same layout differ on a machine that others use too."""
PATIENCE_SECONDS = 5.0
"""A rung that would take longer than this is not run for a gain that noise alone could hide."""
HOPELESS = 0.3
"""What is predicted to pass the budget by more than this share is not run at all."""
RECOMPUTING_COSTS = 4 / 3
"""Checkpointing runs every block's forward pass twice: forward, forward, backward in place of forward, backward."""
Measure = Callable[[Candidate], Probe]
Predict = Callable[[Candidate], int]
"""candidate -> predicted peak in bytes; 0 where nothing is known."""


def candidates(
    global_batch_size: int,
    *,
    precision: str,
    checkpointing: str,
    variant: str | None,
    seq_len: int | None = None,
    chunked_loss: bool = False,
    foreach: bool = True,
    min_micro_batch_size: int = 1,
) -> list[Candidate]:
    """List layouts from the smallest micro-batch to the whole batch, each about twice the one before it.

    Every micro-batch is accumulated in as few steps as it takes.
    """
    largest_steps = max(1, global_batch_size // min_micro_batch_size)
    steps = {min(2**i, largest_steps) for i in range(largest_steps.bit_length() + 1)}
    sizes = sorted({math.ceil(global_batch_size / k) for k in steps})
    shared = (precision, checkpointing, variant, seq_len, chunked_loss, foreach)
    return [Candidate(n, math.ceil(global_batch_size / n), *shared) for n in sizes]


def grid(ladder: Sequence[Candidate]) -> list[Candidate]:
    """List every micro-batch size that a ladder spans, each at the fewest accumulation steps that give it."""
    size, steps = ladder[-1].micro_batch_size, range(1, ladder[0].accumulation_steps + 1)
    sizes = sorted({math.ceil(size / k) for k in steps})
    return [replace(ladder[0], micro_batch_size=n, accumulation_steps=math.ceil(size / n)) for n in sizes]


def sweep(
    ladder: Sequence[Candidate],
    measure: Measure,
    budget_bytes: int,
    predict: Predict = lambda _candidate: 0,
    insist: Callable[[], bool] = lambda: False,
) -> Iterator[Probe]:
    """Climb the ladder until it does not fit, will not fit, or no longer gets faster.

    The climb begins at a quarter of what is predicted to fit, or at the smallest rung; it goes down from there if that
    rung was the fastest. A rung is left out when its prediction, or the last peak and the rise to be expected, passes
    the budget; what of the gap below it fits is then tried, if larger micro-batches were faster up to there. The climb
    also ends when two rungs in a row were no faster than the best before them: by more than noise, or where going on
    takes long; unless `insist`, asked when a rung has been run, says that the fewest cuts are wanted.
    """
    start, fitting, last = _start(ladder, budget_bytes, predict), list[Probe](), ""
    for probe in _climb(ladder[start:], measure, budget_bytes, predict, insist):
        yield probe
        fitting += [probe] if probe.outcome == "fits" else []
        last = probe.outcome
    if last == "oom" or not fitting:
        return
    fastest = max(_rate(probe) for probe in fitting)
    for candidate in reversed(ladder[:start]) if _rate(fitting[0]) == fastest else ():
        probe = measure(candidate)
        yield probe
        if _rate(probe) <= fastest:
            return
        fastest = _rate(probe)


def _start(ladder: Sequence[Candidate], budget_bytes: int, predict: Predict) -> int:
    fitting = [place for place, candidate in enumerate(ladder) if 0 < predict(candidate) <= budget_bytes]
    return max(0, max(fitting, default=0) - 2)


def _rate(probe: Probe) -> float:
    return probe.samples_per_second or 0.0


def _climb(
    ladder: Sequence[Candidate], measure: Measure, budget_bytes: int, predict: Predict, insist: Callable[[], bool]
) -> Iterator[Probe]:
    fitting: list[Probe] = []
    for candidate in ladder:
        hopeless = predict(candidate) > budget_bytes * (1 + FORECAST_SLACK)
        if fitting and (hopeless or _next_peak(fitting, candidate, predict) > budget_bytes):
            yield from map(measure, _between(fitting, ladder, candidate, budget_bytes, predict))
            return
        probe = measure(candidate)
        yield probe
        if probe.outcome != "fits":
            return
        fitting.append(probe)
        if _stalled(fitting) and not insist():
            return


def _between(
    fitting: Sequence[Probe], ladder: Sequence[Candidate], following: Candidate, budget_bytes: int, predict: Predict
) -> list[Candidate]:
    """Find the largest micro-batch between two rungs that is expected to fit, if larger ones were faster so far."""
    rates = [_rate(probe) for probe in fitting[-2:]]
    if len(fitting) < 2 or rates[1] <= rates[0] * (1 + TIE):
        return []
    low = fitting[-1].micro_batch_size
    inside = [c for c in grid(ladder) if low < c.micro_batch_size < following.micro_batch_size]
    return [c for c in inside if _next_peak(fitting, c, predict) <= budget_bytes * (1 - BETWEEN)][-1:]


def rungs_of(ladder: Sequence[Candidate], probes: Iterable[Probe]) -> list[Probe]:
    """Pick the probes of a climb that stand on the ladder's own rungs, the smallest first."""
    sizes = {candidate.micro_batch_size for candidate in ladder}
    found = [probe for probe in probes if probe.micro_batch_size in sizes and not probe.verifying]
    return sorted(found, key=lambda probe: probe.micro_batch_size)


def memory_bound(probes: Sequence[Probe], ladder: Sequence[Candidate], predicted: Sequence[int], budget: int) -> bool:
    """Tell whether memory, not speed, is what ends a climb here. `predicted`: bytes of each rung, or empty."""
    climbed = rungs_of(ladder, probes)
    if not climbed or climbed[-1].outcome != "fits":
        return not climbed or climbed[-1].outcome in ("oom", "over_budget")  # a timeout is not about memory
    above = [place for place, rung in enumerate(ladder) if rung.micro_batch_size > climbed[-1].micro_batch_size]
    if not above:
        return False
    known = dict(zip([rung.micro_batch_size for rung in ladder], predicted, strict=False))

    def predict(candidate: Candidate) -> int:
        return known.get(candidate.micro_batch_size, 0)

    following = ladder[above[0]]
    return predict(following) > budget * (1 + FORECAST_SLACK) or _next_peak(climbed, following, predict) > budget


def worth_recomputing(probes: Sequence[Probe], ladder: Sequence[Candidate]) -> bool:
    """Tell whether larger micro-batches could win back what recomputing activations costs.

    As far as the ladder goes, every doubling is granted the gain of the last one that was measured.
    """
    fitting = [probe for probe in rungs_of(ladder, probes) if probe.outcome == "fits"]
    rates = [_rate(probe) for probe in fitting]
    if len(rates) < 2:
        return True
    gain = rates[-1] / rates[-2] if rates[-2] else 1.0
    doublings = sum(rung.micro_batch_size > fitting[-1].micro_batch_size for rung in ladder)
    return bool(rates[-1] * max(gain, 1.0) ** doublings > max(rates) * RECOMPUTING_COSTS)


def _next_peak(fitting: Sequence[Probe], following: Candidate, predict: Predict) -> float:
    """Expect the last peak plus the predicted rise; without predictions, what the line through the last two says."""
    last = fitting[-1]
    if predict(following) and predict(last.candidate):
        return (last.peak_bytes or 0) + max(predict(following) - predict(last.candidate), 0)
    if len(fitting) < 2:
        return 0.0
    (n1, y1), (n2, y2) = ((probe.micro_batch_size, probe.peak_bytes or 0) for probe in fitting[-2:])
    slope = max(y2 - y1, 0) / max(n2 - n1, 1)
    return y2 + slope * (following.micro_batch_size - n2)


def _stalled(fitting: Sequence[Probe]) -> bool:
    if len(fitting) < 4:
        return False
    rates = [_rate(probe) for probe in fitting]
    best, latest = max(rates[:-2]), max(rates[-2:])
    next_seconds = 4 * (fitting[-1].micro_seconds or 0.0)  # two micro-steps, each twice as large
    return latest < best * (1 - NOISE) or (latest <= best and next_seconds > PATIENCE_SECONDS)


def contenders(probes: Iterable[Probe]) -> list[Probe]:
    """Pick what noise alone may have put into its order: the fastest that fit, three at most; none if it is one."""
    fitting = sorted((probe for probe in probes if probe.outcome == "fits"), key=_rate, reverse=True)
    close = [probe for probe in fitting if _rate(probe) >= _rate(fitting[0]) * (1 - NOISE)]
    return close[:3] if len(close) > 1 else []


def savings(checkpointings: Sequence[str], usable: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield exact levers in the order of their cost, each with those before it: chunked loss, foreach, checkpointing.

    `usable`: which of chunked_loss and foreach change anything; read when the second is asked for.
    """
    saving: dict[str, Any] = {"checkpointing": checkpointings[0], "chunked_loss": False, "foreach": True}
    yield dict(saving)
    for name in ("chunked_loss", "foreach"):
        if name in usable:
            saving[name] = not saving[name]
            yield dict(saving)
    for checkpointing in checkpointings[1:]:
        yield {**saving, "checkpointing": checkpointing}


def mildest(probes: Iterable[Probe]) -> Probe | None:
    """Pick what came nearest to fitting: the smallest micro-batch, and of those the smallest peak."""
    failed = [probe for probe in probes if probe.outcome not in ("fits", "predicted")]
    return min(failed, key=lambda p: (p.micro_batch_size, p.peak_bytes or p.predicted_bytes or 2**62), default=None)


def ranking(probes: Iterable[Probe], *, fewest_cuts: bool = False) -> list[Probe]:
    """Order the probes that fit, or are predicted to: fastest per sample first; within 3 % the smaller peak first.

    Where no speed is known, what recomputes nothing and accumulates least comes first. fewest_cuts: what accumulates
    least comes first in any case, as where batch statistics make the result depend on how a batch is cut.
    """
    left = [probe for probe in probes if probe.outcome in ("fits", "predicted")]
    if not any(probe.samples_per_second for probe in left):
        return sorted(left, key=_effort)
    ordered = []
    while left:
        best = max(map(_rate, left))
        tied = [probe for probe in left if _rate(probe) >= best * (1 - TIE)]
        chosen = min(tied, key=lambda probe: probe.peak_bytes or probe.predicted_bytes or 0)
        ordered.append(chosen)
        left.remove(chosen)
    return sorted(ordered, key=lambda probe: probe.accumulation_steps) if fewest_cuts else ordered


def _effort(probe: Probe) -> tuple[bool, int, int]:
    return probe.checkpointing != "none", probe.accumulation_steps, probe.peak_bytes or probe.predicted_bytes or 0


def confirm(
    probes: Iterable[Probe], measure: Measure, attempts: int = 3, *, fewest_cuts: bool = False
) -> Iterator[Probe]:
    """Run the best candidates again, each in a fresh child, until one fits."""
    for probe in ranking(probes, fewest_cuts=fewest_cuts)[:attempts]:
        verified = replace(measure(probe.candidate), verifying=True)
        yield verified
        if verified.outcome == "fits":
            return
