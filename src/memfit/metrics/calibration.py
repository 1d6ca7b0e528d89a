"""Scores of class probabilities [n, C]: how often the truth is near the top, and how honest the confidence is.

A score is None where it is undefined: without rows, or with a probability that is not finite.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memfit.errors import DataError
from memfit.metrics.arrays import finite, paired

NUM_BINS = 15
"""Bins of the expected calibration error, as in Guo et al., 2017."""


@dataclass(frozen=True)
class Reliability:
    """Rows by confidence, in equal bins (i / B, (i + 1) / B]: what a reliability diagram shows."""

    counts: NDArray[np.int64]
    """Rows in each bin, [B]."""
    confidence: NDArray[np.float64]
    """Mean of the largest probability in each bin, [B]; 0 in an empty one."""
    accuracy: NDArray[np.float64]
    """Share of rows in each bin whose likeliest class is the true one, [B]; 0 in an empty one."""


def top_k_accuracy(truth: ArrayLike, probabilities: ArrayLike, k: int) -> float | None:
    """Return the share of rows whose true class is among the k likeliest; of equals the lower class comes first.

    None as well where there are no more than k classes: then it would always be 1.
    """
    classes, shares = _checked(truth, probabilities)
    if not _defined(shares) or shares.shape[1] <= k:
        return None
    own = np.take_along_axis(shares, classes[:, None], axis=1)
    before = (shares > own) | ((shares == own) & (np.arange(shares.shape[1]) < classes[:, None]))
    return float((before.sum(axis=1) < k).mean())


def negative_log_likelihood(truth: ArrayLike, probabilities: ArrayLike) -> float | None:
    """Return the mean of -ln(probability of the true class), in nats; None as well where one is 0."""
    classes, shares = _checked(truth, probabilities)
    if not _defined(shares):
        return None
    with np.errstate(divide="ignore"):
        return finite(-np.log(np.take_along_axis(shares, classes[:, None], axis=1)).mean())


def reliability(truth: ArrayLike, probabilities: ArrayLike, num_bins: int = NUM_BINS) -> Reliability | None:
    """Sort rows into bins by their largest probability, and compare it with how often it was right."""
    classes, shares = _checked(truth, probabilities)
    if not _defined(shares):
        return None
    return by_confidence(shares.max(axis=1), shares.argmax(axis=1) == classes, num_bins)


def by_confidence(confidence: NDArray[np.float64], right: NDArray[np.bool_], num_bins: int = NUM_BINS) -> Reliability:
    """Sort rows into bins by a probability, finite, that was stated for something that came true where `right`."""
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    most = np.maximum(counts, 1)
    return Reliability(
        counts.astype(np.int64),
        np.bincount(bins, confidence, num_bins) / most,
        np.bincount(bins, right, num_bins) / most,
    )


def expected_calibration_error(truth: ArrayLike, probabilities: ArrayLike, num_bins: int = NUM_BINS) -> float | None:
    """Return the mean distance of confidence and accuracy over bins of confidence, weighted by their rows.

    Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3; confidence is the largest probability.
    """
    found = reliability(truth, probabilities, num_bins)
    if found is None:
        return None
    return float((found.counts * np.abs(found.accuracy - found.confidence)).sum() / found.counts.sum())


def _checked(truth: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return classes [n] and probabilities [n, C]. Raises DataError where they do not match or are none."""
    shares = np.asarray(probabilities, np.float64)
    if shares.ndim != 2:
        raise DataError(f"probabilities must be [n, C]; got {list(shares.shape)}. Give one row for each sample.")
    classes, _ = paired(truth, np.zeros(len(shares), np.int64), np.int64)
    if classes.size and (classes.min() < 0 or classes.max() >= shares.shape[1]):
        raise DataError(
            f"Classes must be 0 to {shares.shape[1] - 1}; truth has {classes.min()} to {classes.max()}. Score a model "
            "on the classes that it was trained with."
        )
    if ((shares < 0) | (shares > 1 + 1e-3)).any():
        raise DataError(
            f"probabilities must be 0 to 1; got {shares.min():g} to {shares.max():g}. Apply a softmax to logits first."
        )
    return classes, shares


def _defined(shares: NDArray[np.float64]) -> bool:
    return bool(shares.size and np.isfinite(shares).all())
