import json

import numpy as np
import pytest

from memfit.errors import DataError
from memfit.metrics.series import series_scores

KEYS = [
    "mae", "rmse", "r2", "class_accuracy", "class_f1", "exceeds_accuracy",
    "below_accuracy", "above_accuracy", "precision", "recall", "loss_risk",
]  # fmt: skip


def test_each_score_stands_under_its_name():
    scores = series_scores(
        truth=np.array([1.0, 2.0, 6.0], np.float32),
        value=np.array([2.0, 2.0, 4.0], np.float32),
        class_truth=np.array([0, 1, 2]),
        class_predicted=np.array([0, 1, 1]),
        exceeds_truth=np.array([False, True, True]),
        exceeds_predicted=np.array([True, True, False]),
        num_classes=4,
    )
    expected = dict(zip(KEYS, [1, (5 / 3) ** 0.5, 9 / 14, 2 / 3, 5 / 9, 1 / 3, 0, 1 / 2, 1 / 2, 1 / 2, 1 / 2]))
    assert scores == pytest.approx(expected)
    assert list(scores) == KEYS


def test_scores_of_a_diverged_model_are_valid_json():
    nothing = np.full(2, np.nan)
    scores = series_scores([1.0, 2.0], nothing, [0, 1], [0, 0], [True, False], [False, False], 2)
    document = json.loads(json.dumps(scores, allow_nan=False))
    assert document["mae"] is None
    assert document["loss_risk"] is None
    assert document["class_accuracy"] == 0.5


def test_predictions_of_other_rows_are_refused():
    with pytest.raises(DataError, match=r"of the same rows; got \[2\] and \[1\]"):
        series_scores([1.0, 2.0], [1.0], [0, 1], [0, 1], [True, False], [True, False], 2)
