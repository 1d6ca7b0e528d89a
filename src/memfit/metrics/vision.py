"""The scores of an image classifier, as they stand in evaluation.json."""

import numpy as np
from numpy.typing import ArrayLike

from memfit.metrics import calibration, classification

METRICS = ("top1_accuracy", "top5_accuracy", "class_f1", "nll", "calibration_error")


def vision_scores(truth: ArrayLike, probabilities: ArrayLike) -> dict[str, float | None]:
    """Score class probabilities [n, C] against classes 0..C-1 [n]; a score that is undefined on them is None.

    Raises DataError for arrays that do not match.
    """
    shares = np.asarray(probabilities)
    top1 = calibration.top_k_accuracy(truth, shares, 1)
    defined = top1 is not None
    return {
        "top1_accuracy": top1,
        "top5_accuracy": calibration.top_k_accuracy(truth, shares, 5),
        "class_f1": classification.macro_f1(truth, shares.argmax(axis=1), shares.shape[1]) if defined else None,
        "nll": calibration.negative_log_likelihood(truth, shares),
        "calibration_error": calibration.expected_calibration_error(truth, shares),
    }
