import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from memfit.errors import DataError
from memfit.metrics.calibration import (
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
    top_k_accuracy,
)
from memfit.metrics.vision import METRICS, vision_scores


@st.composite
def predictions(draw):
    """Classes [n] and probabilities [n, 6], all of them different."""
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    rows = draw(st.integers(1, 30))
    return random.integers(0, 6, rows), random.dirichlet(np.full(6, draw(st.sampled_from([0.3, 1.0, 5.0]))), rows)


@given(predictions())
def test_scores_agree_with_scikit_learn(drawn):
    truth, shares = drawn
    every = range(6)
    for k in (1, 2, 5):
        expected = reference.top_k_accuracy_score(truth, shares, k=k, labels=every)
        assert top_k_accuracy(truth, shares, k) == pytest.approx(expected)
    smallest = shares[np.arange(len(truth)), truth].min()
    if smallest > 1e-12:
        normal = shares / shares.sum(axis=1, keepdims=True)
        assert negative_log_likelihood(truth, shares) == pytest.approx(reference.log_loss(truth, normal, labels=every))


@given(predictions())
def test_calibration_error_is_the_definition_bin_by_bin(drawn):
    truth, shares = drawn
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == truth
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(truth, shares) == pytest.approx(expected)


def test_calibration_error_by_hand():
    shares = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]
    # confidence 0.9: one of two right, off by 0.4; confidence 0.6: two of two right, off by 0.4
    assert expected_calibration_error([0, 1, 0, 0], shares) == pytest.approx(0.4)
    found = reliability([0, 1, 0, 0], shares, num_bins=10)
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 2, 0]
    assert found.accuracy[[5, 8]].tolist() == [1.0, 0.5]
    assert found.confidence[[5, 8]].tolist() == pytest.approx([0.6, 0.9])


def test_certainty_that_is_right_is_perfect():
    truth = np.arange(6)
    assert expected_calibration_error(truth, np.eye(6)) == 0
    assert negative_log_likelihood(truth, np.eye(6)) == 0
    scores = vision_scores(truth, np.eye(6))
    assert tuple(scores) == METRICS
    assert scores == {"top1_accuracy": 1, "top5_accuracy": 1, "class_f1": 1, "nll": 0, "calibration_error": 0}


def test_of_equal_probabilities_the_lower_class_is_likelier_as_argmax_says():
    shares = np.full((6, 6), 1 / 6)
    assert top_k_accuracy(np.arange(6), shares, 1) == pytest.approx(1 / 6)
    assert top_k_accuracy(np.arange(6), shares, 5) == pytest.approx(5 / 6)


def test_what_is_undefined_is_none():
    certain = np.eye(3)[[0, 1]]
    assert negative_log_likelihood([0, 2], certain) is None  # the true class was impossible
    assert top_k_accuracy([0, 1], certain, 5) is None  # three classes are always among five
    assert set(vision_scores([], np.empty((0, 6))).values()) == {None}
    broken = np.full((2, 6), np.nan)
    assert set(vision_scores([0, 1], broken).values()) == {None}


@pytest.mark.parametrize(
    ("truth", "shares", "message"),
    [
        ([0, 1], [0.5, 0.5], r"probabilities must be \[n, C\]; got \[2\]"),
        ([0], [[0.5, 0.5]] * 2, r"of the same rows; got \[1\] and \[2\]"),
        ([0, 2], [[0.5, 0.5]] * 2, "Classes must be 0 to 1; truth has 0 to 2"),
        ([0, 1], [[3.0, -1.0]] * 2, "probabilities must be 0 to 1; got -1 to 3. Apply a softmax"),
        ([0.5, 1], [[0.5, 0.5]] * 2, "truth must be int64"),
    ],
)
def test_refuses_what_are_no_probabilities(truth, shares, message):
    with pytest.raises(DataError, match=message):
        expected_calibration_error(truth, shares)
