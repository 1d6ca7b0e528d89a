"""Choose among candidates: a pure function over a `measure` callable, so it needs no device."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from memfit.memory.plan import Candidate, Probe

TIE = 0.03
"""Plans whose throughput differs by no more than this share are equal; the smaller peak wins."""
Measure = Callable[[Sequence[Candidate], bool], Iterable[Probe]]
"""(candidates in order, verifying) -> their probes in order, as they come; the caller may stop reading."""


def candidates(
    global_batch_size: int, *, precision: str, checkpointing: str, variant: str | None, min_micro_batch_size: int = 1
) -> list[Candidate]:
    """List layouts from the smallest micro-batch to the whole batch, accumulation steps halving each time."""
    largest_steps = max(1, global_batch_size // min_micro_batch_size)
    steps = {min(2**i, largest_steps) for i in range(largest_steps.bit_length() + 1)}
    return [
        Candidate(math.ceil(global_batch_size / k), k, precision, checkpointing, variant)
        for k in sorted(steps, reverse=True)
    ]


def sweep(ladder: Sequence[Candidate], measure: Measure, budget_bytes: int) -> Iterator[Probe]:
    """Climb the ladder until it does not fit, will not fit, or no longer gets faster.

    The next rung is skipped when the line through the last two peaks passes the budget, or when two rungs in a row
    were no faster than the best before them.
    """
    fitting: list[Probe] = []
    for probe in measure(ladder, False):
        yield probe
        if probe.outcome != "fits":
            return
        fitting.append(probe)
        if len(fitting) == len(ladder):
            return
        if memory_bound(fitting, ladder, budget_bytes) or _stalled(fitting):
            return


def memory_bound(probes: Sequence[Probe], ladder: Sequence[Candidate], budget_bytes: int) -> bool:
    """Tell whether memory, not speed, is what ends a climb here."""
    if not probes or probes[-1].outcome != "fits":
        return not probes or probes[-1].outcome in ("oom", "over_budget")  # a timeout is not about memory
    return len(probes) < len(ladder) and _next_peak(probes, ladder[len(probes)]) > budget_bytes


def _next_peak(fitting: Sequence[Probe], following: Candidate) -> float:
    if len(fitting) < 2:
        return 0.0
    (n1, y1), (n2, y2) = ((probe.micro_batch_size, probe.peak_bytes or 0) for probe in fitting[-2:])
    slope = max(y2 - y1, 0) / max(n2 - n1, 1)
    return y2 + slope * (following.micro_batch_size - n2)


def _stalled(fitting: Sequence[Probe]) -> bool:
    if len(fitting) < 4:
        return False
    rates = [probe.samples_per_second or 0.0 for probe in fitting]
    return max(rates[-2:]) <= max(rates[:-2])


def ranking(probes: Iterable[Probe]) -> list[Probe]:
    """Order the fitting probes: fastest per sample first; within a tie of 3 % the smaller peak first."""
    left = [probe for probe in probes if probe.outcome == "fits"]
    ordered = []
    while left:
        best = max(probe.samples_per_second or 0.0 for probe in left)
        tied = [probe for probe in left if (probe.samples_per_second or 0.0) >= best * (1 - TIE)]
        chosen = min(tied, key=lambda probe: probe.peak_bytes or 0)
        ordered.append(chosen)
        left.remove(chosen)
    return ordered


def confirm(probes: Iterable[Probe], measure: Measure, attempts: int = 3) -> Iterator[Probe]:
    """Run the best candidates again, each in a fresh child, until one fits."""
    for probe in ranking(probes)[:attempts]:
        candidate = Candidate(
            probe.micro_batch_size, probe.accumulation_steps, probe.precision, probe.checkpointing, probe.variant
        )
        for verified in measure([candidate], True):
            yield replace(verified, verifying=True)
            if verified.outcome == "fits":
                return
