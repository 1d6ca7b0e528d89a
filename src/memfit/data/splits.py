"""Which rows are predicted, and in which split: chronological, by the target's own time."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memfit.data.spec import DEFAULT_CLASS_QUANTILES, SeriesSpec
from memfit.errors import DataError

SPLITS = ("train", "validation", "test")
MIN_TARGETS = 2
"""What each split must hold at least."""


@dataclass(frozen=True)
class Targets:
    """The target rows [M] in order, and the half-open borders of each split among them."""

    rows: NDArray[np.int64]
    borders: dict[str, tuple[int, int]]

    def of(self, split: str) -> NDArray[np.int64]:
        """Return the target rows of one split."""
        start, stop = self.borders[split]
        return self.rows[start:stop]

    @property
    def train_end(self) -> int:
        """The first row that no train target has reached: what is fitted sees only rows before it."""
        return int(self.of("train")[-1]) + 1


def first_target(spec: SeriesSpec) -> int:
    """Return the first row that has a whole history and a feature row before it."""
    return max(spec.context, spec.features.lookback)


def required_rows(spec: SeriesSpec, min_targets: int = MIN_TARGETS) -> int:
    """Return how many rows, all of them observed, give each split so many targets: known before anything is read."""
    return first_target(spec) + _required_targets(spec, min_targets)


def _required_targets(spec: SeriesSpec, min_targets: int = MIN_TARGETS) -> int:
    test_share = 1 - spec.train_share - spec.validation_share
    count = math.ceil(min_targets / min(spec.train_share, spec.validation_share, test_share) / 2)
    while min(stop - start for start, stop in _borders(spec, count).values()) < min_targets:
        count += 1
    return count


def _borders(spec: SeriesSpec, count: int) -> dict[str, tuple[int, int]]:
    train = round(count * spec.train_share)
    validation = round(count * (spec.train_share + spec.validation_share))
    return {"train": (0, train), "validation": (train, validation), "test": (validation, count)}


def choose_targets(spec: SeriesSpec, eligible: NDArray[np.bool_]) -> Targets:
    """Split the eligible rows. Raises DataError for a series that is too short, before features are computed."""
    start = first_target(spec)
    rows = start + np.flatnonzero(eligible[start:])
    borders = _borders(spec, len(rows))
    if min(stop - start for start, stop in borders.values()) < MIN_TARGETS:
        filled = int((~eligible).sum())
        note = f", of which {filled} are filled or end a gap" if filled else ""
        raise DataError(
            f"the series is too short: it has {len(eligible)} rows{note}, which leaves {len(rows)} targets; "
            f"expected at least {required_rows(spec)} rows: {start} before the first target (context "
            f"{spec.context}, lookback of the features {spec.features.lookback}) and "
            f"{_required_targets(spec)} targets for three splits. Shorten context or the features' windows"
        )
    return Targets(rows.astype(np.int64), borders)


def class_edges(spec: SeriesSpec, train_values: NDArray[np.float32]) -> list[float]:
    """Return the edges between classes as float32 holds them; quantiles are those of the train targets.

    Raises DataError for edges that coincide, or quantiles that leave the highest class empty.
    """
    if spec.class_edges is not None:
        edges = np.asarray(spec.class_edges, np.float32)
        cure = "they coincide as float32; set class_edges farther apart"
    else:
        quantiles = spec.class_quantiles or DEFAULT_CLASS_QUANTILES
        edges = np.quantile(train_values.astype(np.float64), quantiles).astype(np.float32)
        cure = "too many train targets are equal; choose other class_quantiles, or set class_edges"
    empty_top = spec.class_edges is None and edges[-1] >= train_values.max()
    if (np.diff(edges) <= 0).any() or empty_top:
        raise DataError(f"the class edges {edges.tolist()} do not separate classes: {cure}")
    return [float(edge) for edge in edges]


def classify(values: NDArray[np.float32], edges: list[float]) -> NDArray[np.int64]:
    """Return each value's class: class c holds (edges[c - 1], edges[c]], its upper edge included."""
    return np.searchsorted(np.asarray(edges, np.float32), values, side="left").astype(np.int64)


def exceeds(values: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Say which values lie above the threshold, both as float32 holds them."""
    return values > np.float32(threshold)
