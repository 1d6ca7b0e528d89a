"""Causal features of one series, with numpy alone: this file also travels inside the exported bundle.

A feature row i is a function of the rows (i - lookback, i] and of nothing else, bit for bit: sums are taken
value by value in one fixed order (never cumulative ones, which remember the start of the series), and values
and threshold are rounded to float32 first, the precision in which they are stored and served.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Scalar = TypeVar("Scalar", bound=np.generic)

MAX_ABSOLUTE = 1e37
"""Larger values would overflow float32 in a difference."""

STATISTICS = ("mean", "std", "min", "max", "skew", "zscore", "slope")
CALENDAR = ("minute", "hour", "weekday", "yearday", "weekend", "elapsed")
LISTS_FROM_ONE = ("lags", "difference_lags", "extra_lags", "extra_difference_lags")
LISTS_FROM_TWO = ("rolling_windows", "share_windows", "extra_mean_windows")
KEYS = (
    *LISTS_FROM_ONE,
    *LISTS_FROM_TWO,
    "rolling_statistics",
    "rolling_quantiles",
    "calendar",
    "streak_window",
)
BLOCK_VALUES = 1 << 19
"""How many values a block of rows x window may hold while its quantiles are taken (4 MiB)."""


@dataclass(frozen=True)
class _Block:
    """Some rows of the series, with the `back` rows before the first of them."""

    times: NDArray[np.int64]
    values: Floats
    extras: Floats
    threshold: float
    back: int
    num_rows: int

    def column(self, extra: int | None) -> Floats:
        """Return the series itself, or one of the extra columns."""
        return self.values if extra is None else self.extras[:, extra]

    def past(self, series: NDArray[Scalar], rows: int) -> NDArray[Scalar]:
        """Return, for every row of the block, what `series` was `rows` rows earlier."""
        return series[self.back - rows : self.back - rows + self.num_rows]


@dataclass(frozen=True)
class _Group:
    """Features that are computed together; they look at `rows` rows, the row itself included."""

    names: list[str]
    rows: int
    compute: Callable[[_Block], Iterable[NDArray[Any]]]


def feature_names(spec: Mapping[str, Any], extra_columns: Sequence[str]) -> list[str]:
    """Name the features in their order. `lag_1` is the newest known value, one row before the one to predict."""
    return [name for group in _groups(spec, extra_columns) for name in group.names]


def lookback(spec: Mapping[str, Any]) -> int:
    """Return how many rows, itself included, a feature row depends on."""
    return max((group.rows for group in _groups(spec, [""])), default=1)


def compute_features(
    times_ns: NDArray[np.int64],
    values: NDArray[Any],
    extras: NDArray[Any],
    threshold: float,
    spec: Mapping[str, Any],
) -> NDArray[np.float32]:
    """Compute the features of every row.

    `times_ns` int64 [N] UTC nanoseconds, `values` [N], `extras` [N, E]; returns float32 [N, F], of which the
    first `lookback(spec) - 1` rows are NaN. Raises ValueError for wrong shapes, NaN, infinity or huge values.
    """
    times_ns, values, extras = _checked(times_ns, values, extras)
    groups = _groups(spec, [""] * extras.shape[1])
    back = lookback(spec) - 1
    features = np.full((len(values), sum(len(group.names) for group in groups)), np.nan, np.float32)
    rows_per_block = max(1, min(4096, BLOCK_VALUES // (back + 1)))
    for start in range(back, len(values), rows_per_block):
        stop = min(start + rows_per_block, len(values))
        seen = slice(start - back, stop)
        block = _Block(times_ns[seen], values[seen], extras[seen], float(np.float32(threshold)), back, stop - start)
        computed = (column for group in groups for column in group.compute(block))
        for index, column in enumerate(computed):
            features[start:stop, index] = column
    return features


def _checked(
    times: NDArray[Any], values: NDArray[Any], extras: NDArray[Any]
) -> tuple[NDArray[np.int64], Floats, Floats]:
    times, values, extras = np.asarray(times), np.asarray(values), np.asarray(extras)
    shapes_fit = values.ndim == 1 and times.shape == values.shape
    if not shapes_fit or extras.ndim != 2 or len(extras) != len(values):
        raise ValueError(
            "times, values and extras must have the shapes [N], [N] and [N, E]; "
            f"got {times.shape}, {values.shape} and {extras.shape}"
        )
    for name, array in (("values", values), ("extras", extras)):
        outside = ~(np.abs(array) <= MAX_ABSOLUTE)
        if outside.any():
            place = np.argwhere(outside)[0]
            raise ValueError(
                f"{name} must be finite and at most {MAX_ABSOLUTE:g} in size; "
                f"got {array[tuple(place)]} in row {place[0]}. Fill missing rows first"
            )
    rounded = [np.ascontiguousarray(array, np.float32).astype(np.float64) for array in (values, extras)]
    return np.ascontiguousarray(times, np.int64), rounded[0], rounded[1]


def _groups(spec: Mapping[str, Any], extra_columns: Sequence[str]) -> list[_Group]:
    _check_spec(spec)
    groups = [*_value_groups(spec)]
    for index, column in enumerate(extra_columns):
        groups += _extra_groups(spec, index, column)
    return [group for group in groups if group.names]


def _value_groups(spec: Mapping[str, Any]) -> Iterator[_Group]:
    for k in spec.get("lags", ()):
        yield _Group([f"lag_{k}"], k, partial(_lag, extra=None, rows=k))
    for k in spec.get("difference_lags", ()):
        yield _Group([f"difference_{k}"], k + 1, partial(_difference, extra=None, rows=k))
    statistics = tuple(spec.get("rolling_statistics", ()))
    quantiles = tuple(spec.get("rolling_quantiles", ()))
    for w in spec.get("rolling_windows", ()):
        names = [f"{statistic}_{w}" for statistic in statistics]
        yield _Group(names, w, partial(_rolling_statistics, window=w, wanted=statistics))
        names = [f"q{100 * q:g}_{w}" for q in quantiles]
        yield _Group(names, w, partial(_rolling_quantiles, window=w, quantiles=quantiles))
    for term in spec.get("calendar", ()):
        names = [term] if term in ("weekend", "elapsed") else [f"{term}_sin", f"{term}_cos"]
        yield _Group(names, 2 if term == "elapsed" else 1, partial(_calendar, term=term))
    if cap := spec.get("streak_window", 0):
        names = ["streak_above", "streak_below", "streak_rising", "streak_falling"]
        yield _Group(names, cap + 1, partial(_streaks, cap=cap))
    for w in spec.get("share_windows", ()):
        yield _Group([f"share_above_{w}"], w, partial(_share_above, window=w))


def _extra_groups(spec: Mapping[str, Any], index: int, column: str) -> Iterator[_Group]:
    for k in spec.get("extra_lags", ()):
        yield _Group([f"{column}.lag_{k}"], k, partial(_lag, extra=index, rows=k))
    for k in spec.get("extra_difference_lags", ()):
        yield _Group([f"{column}.difference_{k}"], k + 1, partial(_difference, extra=index, rows=k))
    for w in spec.get("extra_mean_windows", ()):
        yield _Group([f"{column}.mean_{w}"], w, partial(_mean, extra=index, window=w))


def _lag(block: _Block, extra: int | None, rows: int) -> list[Floats]:
    return [block.past(block.column(extra), rows - 1)]


def _difference(block: _Block, extra: int | None, rows: int) -> list[Floats]:
    series = block.column(extra)
    return [block.past(series, 0) - block.past(series, rows)]


def _mean(block: _Block, extra: int | None, window: int) -> list[Floats]:
    series = block.column(extra)
    newest = block.past(series, 0)
    total = np.zeros(block.num_rows)
    for k in range(1, window):
        total += block.past(series, k) - newest
    return [newest + total / window]


def _rolling_statistics(block: _Block, window: int, wanted: Sequence[str]) -> list[Floats]:
    """Return statistics of the last `window` values; those of a constant window are 0, its mean is exact.

    Everything is measured from the newest value, so that a constant window gives exact zeros. `std` and `skew`
    are the population's; `zscore` is the newest value's; `slope` is the least-squares line's, per row.
    """
    newest = block.past(block.values, 0)
    total, moment = np.zeros(block.num_rows), np.zeros(block.num_rows)
    lowest, highest = newest.copy(), newest.copy()
    middle = (window - 1) / 2
    for k in range(window):
        value = block.past(block.values, k)
        total += value - newest
        moment += (middle - k) * (value - newest)
        np.minimum(lowest, value, out=lowest)
        np.maximum(highest, value, out=highest)
    center = total / window
    squares, cubes = np.zeros(block.num_rows), np.zeros(block.num_rows)
    for k in range(window):
        distance = block.past(block.values, k) - newest - center
        squares += distance * distance
        cubes += distance * distance * distance
    variance = squares / window
    std = np.sqrt(variance)
    found = {
        "mean": newest + center,
        "std": std,
        "min": lowest,
        "max": highest,
        "skew": _ratio(cubes / window, variance * std),
        "zscore": _ratio(-center, std),
        "slope": moment / (window * (window * window - 1) / 12),
    }
    return [found[statistic] for statistic in wanted]


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _rolling_quantiles(block: _Block, window: int, quantiles: Sequence[float]) -> list[Floats]:
    seen = block.values[block.back - window + 1 :]
    ordered = np.sort(np.lib.stride_tricks.sliding_window_view(seen, window), axis=1)
    columns = []
    for quantile in quantiles:
        position = quantile * (window - 1)
        low = min(int(position), window - 2)
        step = ordered[:, low + 1] - ordered[:, low]
        columns.append(ordered[:, low] + (position - low) * step)
    return columns


def _calendar(block: _Block, term: str) -> list[NDArray[Any]]:
    """Return the calendar terms (UTC) of the rows' own times: the next row's time may not be known yet.

    Phases are looked up in a table of whole minutes, seconds or days, so that a sine is always the same bits.
    """
    times = block.past(block.times, 0)
    if term == "elapsed":
        return [(times - block.past(block.times, 1)) / 1e9]
    seconds = times // 1_000_000_000
    days = seconds // 86_400
    weekday = (days + 3) % 7  # 1970-01-01 was a Thursday, the fourth day from 0
    if term == "weekend":
        return [weekday >= 5]
    if term == "minute":
        return _cycle(seconds % 3600, 3600)
    if term == "hour":
        return _cycle(seconds // 60 % 1440, 1440)
    if term == "weekday":
        return _cycle(weekday * 1440 + seconds // 60 % 1440, 7 * 1440)
    dates = days.astype("datetime64[D]")
    return _cycle((dates - dates.astype("datetime64[Y]")).astype(np.int64), 366)


def _cycle(phase: NDArray[np.int64], length: int) -> list[NDArray[Any]]:
    angles = 2 * np.pi * np.arange(length) / length
    return [np.sin(angles)[phase], np.cos(angles)[phase]]


def _streaks(block: _Block, cap: int) -> list[NDArray[Any]]:
    """Count the rows, up to `cap`, since when the series has been above, not above, rising, falling."""
    runs = [np.zeros(block.num_rows, np.int64) for _ in range(4)]
    going = [np.ones(block.num_rows, np.bool_) for _ in range(4)]
    for k in range(cap):
        value, before = block.past(block.values, k), block.past(block.values, k + 1)
        above = value > block.threshold
        for run, still, holds in zip(runs, going, (above, ~above, value > before, value < before)):
            still &= holds
            run += still
    return [*runs]


def _share_above(block: _Block, window: int) -> list[Floats]:
    count = np.zeros(block.num_rows, np.int64)
    for k in range(window):
        count += block.past(block.values, k) > block.threshold
    return [count / window]


def _check_spec(spec: Mapping[str, Any]) -> None:
    for key in spec:
        if key not in KEYS:
            raise ValueError(f"{key} is no feature setting; expected some of {', '.join(KEYS)}")
    for keys, least in ((LISTS_FROM_ONE, 1), (LISTS_FROM_TWO, 2), (("streak_window",), 0)):
        for key in keys:
            given = [spec.get(key, 0)] if key == "streak_window" else spec.get(key, ())
            whole = all(isinstance(k, int) and not isinstance(k, bool) and k >= least for k in given)
            if not whole or len(set(given)) != len(given):
                raise ValueError(f"{key} must hold different whole numbers from {least} up; got {given}")
    quantiles = spec.get("rolling_quantiles", ())
    if not all(0 <= q <= 1 for q in quantiles) or len({f"{100 * q:g}" for q in quantiles}) != len(quantiles):
        raise ValueError(f"rolling_quantiles must hold different shares in [0, 1]; got {quantiles}")
    for key, known in (("rolling_statistics", STATISTICS), ("calendar", CALENDAR)):
        given = spec.get(key, ())
        if not set(given) <= set(known) or len(set(given)) != len(given):
            raise ValueError(f"{key} must hold different ones of {', '.join(known)}; got {given}")
