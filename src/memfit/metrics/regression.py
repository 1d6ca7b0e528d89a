"""Errors of predicted values, in the values' own units."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memfit.metrics.arrays import finite, paired


def mae(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return the mean absolute error over [n] rows; None without rows or with a value that is not finite."""
    error = _errors(truth, predicted)
    return finite(np.abs(error).mean()) if error.size else None


def rmse(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return the root of the mean squared error over [n] rows; None as for `mae`."""
    error = _errors(truth, predicted)
    return finite(np.sqrt(np.square(error).mean())) if error.size else None


def r2(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return the share of the truth's variance that is explained, 1 at best; below 0, the mean does better.

    None where the truth is constant (one row is), or as for `mae`.
    """
    error = _errors(truth, predicted)
    truth = np.asarray(truth, np.float64)
    if not truth.size or not np.isfinite(error).all() or np.ptp(truth) == 0:
        return None
    spread = np.square(truth - truth.mean()).sum()
    return finite(1 - np.square(error).sum() / spread) if spread else None


def _errors(truth: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    """Return truth minus prediction; NaN where both are the same infinity."""
    truth, predicted = paired(truth, predicted, np.float64)
    with np.errstate(invalid="ignore"):
        error: NDArray[np.float64] = truth - predicted
    return error
