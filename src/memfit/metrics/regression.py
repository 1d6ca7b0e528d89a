"""Errors of predicted values, in the values' own units."""

import numpy as np
from numpy.typing import ArrayLike

from memfit.metrics.arrays import finite, paired


def mae(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return the mean absolute error over [n] rows; None without rows or with a value that is not finite."""
    truth, predicted = paired(truth, predicted, np.float64)
    return finite(np.abs(truth - predicted).mean()) if truth.size else None


def rmse(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return the root of the mean squared error over [n] rows; None as for `mae`."""
    truth, predicted = paired(truth, predicted, np.float64)
    return finite(np.sqrt(np.square(truth - predicted).mean())) if truth.size else None


def r2(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return the share of the truth's variance that is explained, 1 at best; below 0, the mean does better.

    None where the truth is constant (one row is), or as for `mae`.
    """
    truth, predicted = paired(truth, predicted, np.float64)
    if truth.size == 0 or np.ptp(truth) == 0:
        return None
    spread = np.square(truth - truth.mean()).sum()
    return finite(1 - np.square(truth - predicted).sum() / spread) if spread else None
