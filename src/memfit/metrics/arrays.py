"""What the metrics ask of their arrays, and how they divide."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memfit.errors import DataError


def paired(truth: ArrayLike, predicted: ArrayLike, dtype: type[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return both as arrays [n] of a dtype.

    Raises DataError where they are not one entry a row, row by row, or where the dtype would change an entry:
    a probability is no boolean, NaN is no class.
    """
    first, second = _exactly("truth", truth, dtype), _exactly("predictions", predicted, dtype)
    if first.ndim != 1 or first.shape != second.shape:
        raise DataError(
            f"truth and predictions must be [n] each, of the same rows; got {list(first.shape)} and "
            f"{list(second.shape)}. Drop extra dimensions, and score a model on the rows it predicted."
        )
    return first, second


def _exactly(name: str, entries: ArrayLike, dtype: type[Any]) -> NDArray[Any]:
    given = np.asarray(entries)
    with np.errstate(invalid="ignore"):  # NaN as a class is reported below
        array = given.astype(dtype)
    if not (given.dtype.kind in "biuf" and (dtype is np.float64 or np.array_equal(given, array))):
        raise DataError(
            f"{name} must be {np.dtype(dtype)}; got {given.dtype} with other entries. Round, or compare with a "
            "threshold, first."
        )
    return array


def share(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> float | None:
    """Return how many rows are in a part, of those in the whole; None where the whole is empty."""
    return float(part.sum() / whole.sum()) if whole.any() else None


def finite(number: float) -> float | None:
    """Return the number, or None for NaN and infinity, which JSON has not: a score that is undefined."""
    return float(number) if math.isfinite(number) else None
