"""The clock of a series, and its missing observations closed by the gap policy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from memfit.data.source import RawSeries, iso
from memfit.data.spec import GapPolicy
from memfit.errors import DataError

SHOWN_GAPS = 5


@dataclass(frozen=True)
class ClosedSeries:
    """A series without gaps: times [N], values [N], extras [N, E].

    `filled` [N] are the rows whose value was not observed; `eligible` [N] those that may be targets. No target
    is a filled row: its truth is invented. Under "interpolate" a filled row is made from the observation that
    ends its gap, so it is knowledge of that later time. A target whose inputs would reach a filled row before
    that observation was made is not eligible; the observation itself is one, for it would find a value made
    from itself in its own history. Once the gap's end lies in the past, nothing leaks and the filled rows
    serve as history. The same holds for a gap of an extra column. A forward-filled row repeats the past.
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
    times, positions, resolved = _place(raw.times, frequency, policy)
    numbers = np.full((len(times), len(names)), np.nan)
    numbers[positions, 0] = raw.values
    numbers[positions, 1:] = raw.extras
    filled = np.isnan(numbers[:, 0])
    eligible = ~filled
    for index, name in enumerate(names):
        gaps = _gaps(np.isnan(numbers[:, index]))
        _check_gaps(gaps, times, f"column {name!r}", policy)
        if policy.policy == "interpolate":
            _exclude(eligible, gaps)
            _check_ends(gaps, times, name)
        numbers[:, index] = _fill(numbers[:, index], policy.policy)
    return ClosedSeries(times, numbers[:, 0], numbers[:, 1:], filled, eligible, resolved)


def _place(
    times: NDArray[np.int64], frequency: str, policy: GapPolicy
) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Return the clock's times, the rows' positions among them, and the frequency's name."""
    if frequency == "irregular" or len(times) < 2:
        return times, np.arange(len(times)), "irregular"
    offset = _infer(times) if frequency == "auto" else pd.tseries.frequencies.to_offset(frequency)
    name = offset.freqstr if offset.freqstr[0].isdigit() else f"1{offset.freqstr}"
    try:
        step = pd.Timedelta(offset).as_unit("ns").value
    except ValueError:  # months, business days: no fixed length
        clock = pd.date_range(iso(times[0]), iso(times[-1]), freq=offset).as_unit("ns").asi8
        positions = np.searchsorted(clock, times)
        on_clock = clock[np.minimum(positions, len(clock) - 1)] == times if len(clock) else times < times[0]
    else:
        positions, rest = np.divmod(times - times[0], step)
        on_clock = rest == 0
    if not on_clock.all():
        row = int(np.argmin(on_clock))
        raise DataError(
            f"the time {iso(times[row])} (row {row + 1} of the series) is not on the clock of {name} from "
            f"{iso(times[0])} on; set frequency to the series' own, or to 'irregular'"
        )
    skipped = np.diff(positions) - 1
    places = np.flatnonzero(skipped)
    gaps = [(int(positions[p]) + 1, int(positions[p + 1])) for p in places]
    following = {start: iso(times[p]) for p, (start, _) in zip(places[:SHOWN_GAPS], gaps)}
    del following
    _check_gaps(gaps, None, "the clock", policy, after=[int(times[p]) for p in places])
    count = int(positions[-1]) + 1
    full = clock[:count] if "clock" in locals() else times[0] + step * np.arange(count)
    return full, positions, name
