"""The clock of a series: its step found or checked, and the rows' places on it."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from memfit.data.source import iso
from memfit.errors import DataError

MAX_CLOCK_ROWS = 1 << 30


@dataclass(frozen=True)
class Clock:
    """Where the rows of a series lie on its clock: `positions` [N] count ticks from the first row."""

    frequency: str
    start: int
    step: int | None
    """Nanoseconds between ticks; None where they differ, as months do, and for a series without a clock."""
    positions: NDArray[np.int64]
    uneven: NDArray[np.int64]
    """The times of all ticks where `step` is None, else empty."""

    def times(self) -> NDArray[np.int64]:
        """Return the times of all ticks from the first row to the last."""
        if self.step is None:
            return self.uneven
        return self.start + self.step * np.arange(int(self.positions[-1]) + 1, dtype=np.int64)

    def gaps(self) -> list[tuple[int, int]]:
        """Return the half-open runs of ticks that have no row."""
        before = np.flatnonzero(np.diff(self.positions) > 1)
        return [(int(self.positions[i]) + 1, int(self.positions[i + 1])) for i in before]

    def tick(self, position: int) -> int:
        """Return the time of one tick."""
        return int(self.uneven[position]) if self.step is None else self.start + self.step * position


def read_clock(times: NDArray[np.int64], frequency: str) -> Clock:
    """Put strictly rising times on a clock: "auto", "irregular" or a pandas offset.

    Raises DataError where no clock is found, or a time is not on it.
    """
    start = int(times[0])
    if frequency == "irregular":
        return Clock("irregular", start, None, np.arange(len(times)), times)
    offset = _infer(times) if frequency == "auto" else pd.tseries.frequencies.to_offset(frequency)
    assert offset is not None
    name = offset.freqstr if offset.freqstr[0].isdigit() else f"1{offset.freqstr}"
    try:
        step = int(offset.nanos)
    except ValueError:  # months and business days have no fixed length
        return _uneven_clock(times, offset, name)
    positions, rest = np.divmod(times - start, step)
    _check_on_clock(rest == 0, times, name)
    _check_count(int(positions[-1]) + 1, name)
    return Clock(name, start, step, positions, np.empty(0, np.int64))


def _uneven_clock(times: NDArray[np.int64], offset: pd.offsets.BaseOffset, name: str) -> Clock:
    _check_count(int((times[-1] - times[0]) // 60_000_000_000), name)
    ticks = pd.date_range(iso(times[0]), iso(times[-1]), freq=offset).as_unit("ns").asi8
    positions = np.searchsorted(ticks, times)
    padded = np.append(ticks, np.iinfo(np.int64).min)
    _check_on_clock(padded[positions] == times, times, name)
    return Clock(name, int(times[0]), None, positions.astype(np.int64), ticks)


def _infer(times: NDArray[np.int64]) -> pd.offsets.BaseOffset:
    """Take the most frequent step, if at least half of the steps are it and all others are multiples of it."""
    steps, counts = np.unique(np.diff(times), return_counts=True)
    cure = 'set frequency to a pandas offset such as "1h" or "MS", or to "irregular"'
    if len(steps) == 0:
        raise DataError(f"one row shows no frequency; {cure}")
    step = int(steps[np.argmax(counts)])
    if 2 * counts.max() < counts.sum() or (steps % step).any():
        common = pd.Timedelta(step, unit="ns")
        raise DataError(
            f"no frequency fits the times: {counts.max()} of {counts.sum()} steps are {common}, and the others "
            f"are not all multiples of it; {cure}"
        )
    offset = pd.tseries.frequencies.to_offset(pd.Timedelta(step, unit="ns"))
    assert offset is not None
    return offset


def _check_on_clock(on_clock: NDArray[np.bool_], times: NDArray[np.int64], name: str) -> None:
    if not on_clock.all():
        row = int(np.argmin(on_clock))
        raise DataError(
            f"row {row + 1} of the series ({iso(times[row])}) is not on the clock of {name} that starts at "
            f'{iso(times[0])}; set frequency to the series\' own, or to "irregular"'
        )


def _check_count(count: int, name: str) -> None:
    if count > MAX_CLOCK_ROWS:
        raise DataError(f"a clock of {name} has {count} rows here; expected at most {MAX_CLOCK_ROWS}")


def runs(holds: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the half-open runs where a condition holds."""
    padded = np.concatenate(([False], holds, [False]))
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return [(int(a), int(b)) for a, b in pairwise(edges)][::2]
