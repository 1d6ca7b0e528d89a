"""A prepared series cut for forecasts of several rows: which targets begin one, and its arrays."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfit.data.prepared import PreparedSeries, give_pages_back
from memfit.data.splits import SPLITS
from memfit.errors import DataError

MIN_SAMPLES = 2
"""What each split must hold at least."""


class ForecastSeries(PreparedSeries):
    """A prepared series whose sample is a target row r: rows r .. r + horizon - 1 are predicted from rows before r.

    A sample's rows are all targets of one split: none lies beyond a border, is filled, or was made from the end of
    its own gap. Raises DataError where a split has fewer than MIN_SAMPLES of them. It pickles as its settings.
    """

    def __init__(self, path: Path, *, window: int, horizon: int, season: int) -> None:
        super().__init__(path)
        self.window, self.horizon, self.season = window, horizon, season
        self._rows = {split: self._first_rows(split) for split in SPLITS}
        self._check_samples()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.path, self.window, self.horizon, self.season)

    def num_samples(self, split: str) -> int:
        """Count the samples of a split."""
        return len(self._rows[split])

    def first_rows(self, split: str, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the first predicted rows, int64 [n], of some samples; `indices` count within the split."""
        return np.asarray(self._rows[split][indices])

    def sequences(self, rows: NDArray[np.int64], *, with_features: bool) -> dict[str, NDArray[np.float32]]:
        """Cut samples by their first predicted rows, in the user's units.

        Returns history [n, window, channels], oldest first (the value, then the features of the same row), and target
        [n, horizon].
        """
        past = rows[:, None] + np.arange(-self.window, 0)
        history = self.values[past][:, :, None]
        if with_features:
            history = np.concatenate([history, self.features[past]], axis=2)
        arrays = {"history": np.array(history), "target": self.horizons(rows)}
        for array in (self.values, self.features):
            give_pages_back(array)
        return arrays

    def horizons(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the true values float32 [n, horizon] of samples by their first predicted rows."""
        return np.array(self.values[rows[:, None] + np.arange(self.horizon)])

    def seasonal(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return for each predicted row the newest value of its place in the season that was known, [n, horizon]."""
        steps = np.arange(self.horizon)
        return np.array(self.values[rows[:, None] + steps - self.season * (steps // self.season + 1)])

    def _first_rows(self, split: str) -> NDArray[np.int64]:
        """Return the targets that horizon - 1 further targets of the split follow without a hole."""
        rows, needed = self.rows(split), max(self.window + self._lookback - 1, self.season)
        first = rows[: max(0, len(rows) - self.horizon + 1)]
        last = rows[self.horizon - 1 :]
        return np.array(first[(last - first == self.horizon - 1) & (first >= needed)])

    @property
    def _lookback(self) -> int:
        return int(self.manifest["lookback"])

    def _check_samples(self) -> None:
        counts = {split: len(rows) for split, rows in self._rows.items()}
        if min(counts.values()) < MIN_SAMPLES:
            raise DataError(
                f"forecasts of {self.horizon} rows: expected {MIN_SAMPLES} or more in each split, got {counts}; all "
                "rows of one are observed and in one split. Shorten horizon, window or season, or give a longer series"
            )


def _open(path: Path, window: int, horizon: int, season: int) -> ForecastSeries:
    return ForecastSeries(path, window=window, horizon=horizon, season=season)
