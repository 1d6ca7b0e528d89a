import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from memfit.errors import DataError
from memfit.metrics import threshold

rows = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@given(rows)
def test_scores_agree_with_scikit_learn_or_are_undefined_where_it_warns(rows):
    truth, predicted = np.array(rows).T
    options = {"zero_division": np.nan}
    expected = {
        "exceeds_accuracy": reference.accuracy_score(truth, predicted),
        "below_accuracy": reference.recall_score(truth, predicted, pos_label=False, **options),
        "above_accuracy": reference.recall_score(truth, predicted, **options),
        "recall": reference.recall_score(truth, predicted, **options),
        "precision": reference.precision_score(truth, predicted, **options),
        "loss_risk": 1 - reference.precision_score(truth, predicted, **options),
    }
    for name, score in expected.items():
        got = getattr(threshold, name)(truth, predicted)
        assert got == (None if np.isnan(score) else pytest.approx(score)), name


def test_scores_by_hand():
    truth = [True, True, True, False, False]
    predicted = [True, True, False, True, False]
    assert threshold.exceeds_accuracy(truth, predicted) == pytest.approx(3 / 5)
    assert threshold.below_accuracy(truth, predicted) == pytest.approx(1 / 2)
    assert threshold.above_accuracy(truth, predicted) == pytest.approx(2 / 3)
    assert threshold.precision(truth, predicted) == pytest.approx(2 / 3)
    assert threshold.loss_risk(truth, predicted) == pytest.approx(1 / 3)


def test_a_model_that_never_predicts_above_has_no_precision_and_no_loss_risk():
    truth, predicted = [True, False], [False, False]
    assert threshold.precision(truth, predicted) is None
    assert threshold.loss_risk(truth, predicted) is None
    assert threshold.recall(truth, predicted) == 0.0


def test_shares_of_an_empty_side_are_undefined():
    assert threshold.above_accuracy([False], [True]) is None
    assert threshold.below_accuracy([True], [True]) is None
    assert threshold.exceeds_accuracy([], []) is None


def test_zeros_and_ones_are_accepted_as_booleans():
    assert threshold.recall(np.array([1.0, 1.0, 0.0]), np.array([1, 0, 0])) == 0.5


def test_probabilities_are_refused_not_taken_for_true():
    with pytest.raises(DataError, match="compare with a threshold"):
        threshold.precision([True, False], [0.9, 0.1])
