import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from memfit.errors import DataError
from memfit.metrics.regression import mae, r2, rmse

value = st.floats(-1e6, 1e6, width=32)
rows = st.lists(st.tuples(value, value), min_size=2, max_size=40)


@given(rows)
def test_errors_agree_with_scikit_learn(rows):
    truth, predicted = np.array(rows).T
    assert mae(truth, predicted) == pytest.approx(reference.mean_absolute_error(truth, predicted))
    assert rmse(truth, predicted) == pytest.approx(reference.root_mean_squared_error(truth, predicted))


@given(rows)
def test_explained_variance_agrees_with_scikit_learn_unless_the_truth_is_constant(rows):
    truth, predicted = np.array(rows).T
    if np.square(truth - truth.mean()).sum() > 0 and np.ptp(truth) > 0:
        assert r2(truth, predicted) == pytest.approx(reference.r2_score(truth, predicted), rel=1e-9)
    else:
        assert r2(truth, predicted) is None


def test_scores_by_hand():
    truth, predicted = [1.0, 2.0, 6.0], [2.0, 2.0, 4.0]
    assert mae(truth, predicted) == 1.0
    assert rmse(truth, predicted) == pytest.approx(math.sqrt(5 / 3))
    assert r2(truth, predicted) == pytest.approx(1 - 5 / 14)
    assert r2(truth, [3.0, 3.0, 3.0]) == 0.0


def test_single_precision_inputs_are_summed_in_double():
    truth = np.full(100_000, 16_777_216, np.float32)
    assert mae(truth, truth - 1) == 1.0


@pytest.mark.parametrize("score", [mae, rmse, r2])
@pytest.mark.parametrize(
    ("truth", "predicted"),
    [([], []), ([1.0, 2.0], [1.0, math.nan]), ([1.0, 2.0], [math.inf, 1.0]), ([1.0, math.inf], [1.0, math.inf])],
)
def test_a_score_of_nothing_or_of_non_finite_values_is_undefined(score, truth, predicted):
    assert score(truth, predicted) is None


@pytest.mark.parametrize("score", [mae, rmse, r2])
def test_a_column_against_a_row_is_refused_not_broadcast(score):
    with pytest.raises(DataError, match=r"\[3, 1\] and \[3\]"):
        score(np.zeros((3, 1)), np.zeros(3))
