"""What the metrics ask of their arrays, and how they divide."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memfit.errors import DataError


def paired(truth: ArrayLike, predicted: ArrayLike, dtype: type[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return both as arrays [n] of a dtype; raise DataError where they are not one value a row, row by row."""
    first, second = np.asarray(truth, dtype), np.asarray(predicted, dtype)
    if first.ndim != 1 or first.shape != second.shape:
        raise DataError(
            f"truth and predictions must be [n] each, of the same rows; got {list(first.shape)} and "
            f"{list(second.shape)}. Drop extra dimensions, and score a model on the rows it predicted."
        )
    return first, second


def share(part: float, whole: float) -> float | None:
    """Divide, or return None where there is nothing to take a share of."""
    return float(part / whole) if whole else None


def finite(number: float) -> float | None:
    """Return the number, or None for NaN and infinity, which JSON has not: a score that is undefined."""
    return float(number) if math.isfinite(number) else None
