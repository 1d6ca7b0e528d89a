import math

import numpy as np
import pytest

from memfit.metrics.language import METRICS, language_scores


def test_scores_are_those_of_all_tokens_not_means_of_samples():
    scores = language_scores(np.array([2.0, 10.0]), np.array([1, 4]), np.array([3, 9]), np.array([1, 0]))
    assert scores["nll"] == pytest.approx(12 / 5)
    assert scores["perplexity"] == pytest.approx(math.exp(12 / 5))
    assert scores["bits_per_byte"] == pytest.approx(12 / math.log(2) / 12)
    assert scores["token_accuracy"] == pytest.approx(1 / 5)
    assert set(scores) == set(METRICS)


def test_uniform_guesses_have_the_vocabulary_as_their_perplexity():
    scores = language_scores(np.full(7, 5 * math.log(300)), np.full(7, 5), np.full(7, 5))
    assert scores["perplexity"] == pytest.approx(300)
    assert scores["bits_per_byte"] == pytest.approx(math.log2(300))


def test_what_nobody_looked_at_is_undefined():
    scores = language_scores(np.array([1.0]), np.array([1]), np.array([0]))
    assert scores["token_accuracy"] is None
    assert scores["bits_per_byte"] is None
    assert language_scores(np.zeros(0), np.zeros(0, int), np.zeros(0, int))["nll"] is None
    assert language_scores(np.array([1e6]), np.array([1]), np.array([1]))["perplexity"] is None  # beyond a float
