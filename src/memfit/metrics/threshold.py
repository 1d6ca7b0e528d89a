"""Scores of predicting whether a value exceeds the threshold. `above` is truly or supposedly greater than it."""

import numpy as np
from numpy.typing import ArrayLike

from memfit.metrics.arrays import paired, share


def exceeds_accuracy(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return the share of all rows predicted on the right side; None without rows."""
    truth, predicted = paired(truth, predicted, np.bool_)
    return share(truth == predicted, np.ones_like(truth))


def below_accuracy(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return, of the rows truly at or below the threshold, the share predicted so; None where there are none."""
    truth, predicted = paired(truth, predicted, np.bool_)
    return share(~truth & ~predicted, ~truth)


def above_accuracy(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return, of the rows truly above the threshold, the share predicted so; None where there are none."""
    truth, predicted = paired(truth, predicted, np.bool_)
    return share(truth & predicted, truth)


def recall(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return `above_accuracy` under its usual name."""
    return above_accuracy(truth, predicted)


def precision(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return, of the rows predicted above the threshold, the share truly above; None where there are none."""
    truth, predicted = paired(truth, predicted, np.bool_)
    return share(truth & predicted, predicted)


def loss_risk(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return, of the rows predicted above the threshold, the share that was not; None where there are none."""
    truth, predicted = paired(truth, predicted, np.bool_)
    return share(~truth & predicted, predicted)
