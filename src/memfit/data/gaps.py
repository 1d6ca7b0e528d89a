"""Missing observations of a series, closed by the gap policy without letting the future leak."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memfit.data.clock import read_clock, runs
from memfit.data.limits import Room
from memfit.data.source import RawSeries, iso
from memfit.data.spec import GapPolicy
from memfit.errors import DataError

SHOWN_GAPS = 5
Gaps = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ClosedSeries:
    """A series without gaps: times [N], values [N], extras [N, E].

    `filled` [N] are the rows whose value was not observed; `eligible` [N] those that may be targets. No target
    is a filled row: its truth is invented. Under "interpolate" a filled row is made from the observation that
    ends its gap, so it is knowledge of that later time. A target whose inputs would reach a filled row before
    that observation was made is not eligible; the observation itself is one, for it would find a value made
    from itself in its own history. Once the gap's end lies in the past, nothing leaks, and the filled rows
    serve as history. The same holds for a gap of an extra column. A forward-filled row only repeats the past.
    """

    times: NDArray[np.int64]
    values: NDArray[np.float64]
    extras: NDArray[np.float64]
    filled: NDArray[np.bool_]
    eligible: NDArray[np.bool_]
    frequency: str


def close_gaps(raw: RawSeries, names: Sequence[str], frequency: str, policy: GapPolicy) -> ClosedSeries:
    """Put a series on its clock and fill what is missing.

    `names` are the value column and the extra ones. Raises DataError for times off the clock, for any gap under
    the policy "error", for gaps longer than the limit, and for gaps that have nothing to be filled from.
    """
    clock = read_clock(raw.times, frequency)
    # Before the ticks are laid out: a gap of a century must not take memory.
    _check_lengths(clock.gaps(), clock.tick, "rows", policy)
    Room(1 + len(names)).take(int(clock.positions[-1]) + 1, f"a clock of {clock.frequency}, gaps filled")
    times = clock.times()
    numbers = np.full((len(times), len(names)), np.nan)
    numbers[clock.positions, 0] = raw.values
    numbers[clock.positions, 1:] = raw.extras
    filled = np.isnan(numbers[:, 0])
    eligible = ~filled
    for index, name in enumerate(names):
        gaps = runs(np.isnan(numbers[:, index]))
        _check_lengths(gaps, lambda row: int(times[row]), f"observations of {name!r}", policy)
        _check_ends(gaps, times, name, policy)
        if policy.policy == "interpolate":
            for start, stop in gaps:
                eligible[start + 1 : stop + 1] = False
        numbers[:, index] = _fill(numbers[:, index], policy.policy)
    return ClosedSeries(times, numbers[:, 0], numbers[:, 1:], filled, eligible, clock.frequency)


def _check_lengths(gaps: Gaps, tick: Callable[[int], int], what: str, policy: GapPolicy) -> None:
    limit = 0 if policy.policy == "error" else policy.limit
    too_long = [gap for gap in gaps if gap[1] - gap[0] > limit]
    if not too_long:
        return
    shown = [f"{stop - start} from {iso(tick(start))} (row {start + 1})" for start, stop in too_long]
    more = f", and {len(shown) - SHOWN_GAPS} more gaps" if len(shown) > SHOWN_GAPS else ""
    longest = max(stop - start for start, stop in gaps)
    wanted, cure = f"gaps of at most {limit}", f"raise gaps.limit to {longest}, or close them in the source"
    if policy.policy == "error":
        wanted = 'none under gaps.policy "error"'
        cure = f'choose "forward_fill" or "interpolate" with a gaps.limit of {longest}'
    found = ", ".join(shown[:SHOWN_GAPS])
    raise DataError(f"missing {what}: {found}{more}; expected {wanted}; {cure}")


def _check_ends(gaps: Gaps, times: NDArray[np.int64], name: str, policy: GapPolicy) -> None:
    if gaps and gaps[0][0] == 0:
        first = iso(times[gaps[0][1]])
        raise DataError(f"{name!r} has nothing to be filled from before {first}; drop the rows before it")
    if gaps and gaps[-1][1] == len(times) and policy.policy == "interpolate":
        last = iso(times[gaps[-1][0] - 1])
        raise DataError(f"{name!r} has nothing to interpolate to after {last}; drop the rows after it")


def _fill(numbers: NDArray[np.float64], policy: str) -> NDArray[np.float64]:
    missing = np.isnan(numbers)
    rows = np.arange(len(numbers))
    if policy == "interpolate":
        numbers[missing] = np.interp(rows[missing], rows[~missing], numbers[~missing])
        return numbers
    return numbers[np.maximum.accumulate(np.where(missing, 0, rows))]
