import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from memfit.errors import DataError
from memfit.metrics.classification import accuracy, confusion, macro_f1

classes = st.integers(0, 4)
rows = st.lists(st.tuples(classes, classes), min_size=1, max_size=40)


@given(rows)
def test_scores_agree_with_scikit_learn(rows):
    truth, predicted = np.array(rows).T
    assert accuracy(truth, predicted) == pytest.approx(reference.accuracy_score(truth, predicted))
    assert macro_f1(truth, predicted, 5) == pytest.approx(reference.f1_score(truth, predicted, average="macro"))
    np.testing.assert_array_equal(
        confusion(truth, predicted, 5), reference.confusion_matrix(truth, predicted, labels=range(5))
    )


def test_macro_f1_by_hand():
    # class 0: 2 of 2 found with one false alarm, F1 0.8; class 1: 1 of 2 found, F1 2/3; class 2 occurs nowhere
    assert macro_f1([0, 0, 1, 1], [0, 0, 0, 1], 3) == pytest.approx((0.8 + 2 / 3) / 2)


def test_a_class_that_is_never_predicted_scores_zero():
    assert macro_f1([0, 0, 1], [0, 0, 0], 2) == pytest.approx(0.4)


def test_scores_without_rows_are_undefined():
    assert accuracy([], []) is None
    assert macro_f1([], [], 3) is None


@pytest.mark.parametrize("predicted", [[0, 3], [0, -1]])
def test_a_class_outside_the_range_is_refused(predicted):
    with pytest.raises(DataError, match="Classes must be 0 to 2; predicted has"):
        macro_f1([0, 1], predicted, 3)


@pytest.mark.parametrize("predicted", [[0.0, 0.7], [0.0, math.nan]])
def test_what_is_no_class_is_refused_not_rounded(predicted):
    with pytest.raises(DataError, match="predictions must be int64"):
        accuracy([0, 1], predicted)
