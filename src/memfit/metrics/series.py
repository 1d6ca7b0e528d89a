"""The scores of a series model's three heads, as they stand in evaluation.json."""

from numpy.typing import ArrayLike

from memfit.metrics import classification, regression, threshold


def series_scores(
    truth: ArrayLike,
    value: ArrayLike,
    class_truth: ArrayLike,
    class_predicted: ArrayLike,
    exceeds_truth: ArrayLike,
    exceeds_predicted: ArrayLike,
    num_classes: int,
) -> dict[str, float | None]:
    """Score [n] rows each of values in the user's units, classes 0..C-1, and exceedance as booleans.

    A score that is undefined on these rows is None. Raises DataError for arrays that do not match.
    """
    return {
        "mae": regression.mae(truth, value),
        "rmse": regression.rmse(truth, value),
        "r2": regression.r2(truth, value),
        "class_accuracy": classification.accuracy(class_truth, class_predicted),
        "class_f1": classification.macro_f1(class_truth, class_predicted, num_classes),
        "exceeds_accuracy": threshold.exceeds_accuracy(exceeds_truth, exceeds_predicted),
        "below_accuracy": threshold.below_accuracy(exceeds_truth, exceeds_predicted),
        "above_accuracy": threshold.above_accuracy(exceeds_truth, exceeds_predicted),
        "precision": threshold.precision(exceeds_truth, exceeds_predicted),
        "recall": threshold.recall(exceeds_truth, exceeds_predicted),
        "loss_risk": threshold.loss_risk(exceeds_truth, exceeds_predicted),
    }
