"""Scores of predicted classes 0..C-1."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memfit.errors import DataError
from memfit.metrics.arrays import paired, share


def confusion(truth: ArrayLike, predicted: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Return how many rows of class i were predicted as j, [C, C]; raise DataError for a class outside 0..C-1."""
    truth, predicted = paired(truth, predicted, np.int64)
    for name, classes in (("truth", truth), ("predicted", predicted)):
        if classes.size and (classes.min() < 0 or classes.max() >= num_classes):
            raise DataError(
                f"Classes must be 0 to {num_classes - 1}; {name} has {classes.min()} to {classes.max()}. "
                "Use the class edges that the model was trained with."
            )
    cells = np.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def accuracy(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return the share of the [n] rows whose class was predicted; None without rows."""
    truth, predicted = paired(truth, predicted, np.int64)
    return share(truth == predicted, np.ones_like(truth, np.bool_))


def macro_f1(truth: ArrayLike, predicted: ArrayLike, num_classes: int) -> float | None:
    """Return the mean F1 over the classes that occur in truth or prediction; None without rows.

    A class in neither has no F1 and does not count; one in only one of them has 0.
    """
    cells = confusion(truth, predicted, num_classes)
    occurrences = cells.sum(axis=0) + cells.sum(axis=1)
    occurs = occurrences > 0
    return float((2 * cells.diagonal()[occurs] / occurrences[occurs]).mean()) if occurs.any() else None
