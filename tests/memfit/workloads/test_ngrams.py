import itertools

import numpy as np
import pytest

from memfit.workloads import ngrams
from memfit.workloads.ngrams import STRENGTHS, NGrams, num_counted

VOCAB = 7


def stream(seed: int, size: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, size).astype(np.uint16)


def test_probabilities_are_those_of_plain_counting():
    train, test = stream(0), stream(1, 50)
    counts = np.array([(train[1:] == token).sum() for token in range(VOCAB)])
    unigram = (counts + 1) / (len(train) - 1 + VOCAB)
    found = NGrams(train, [test], VOCAB)
    np.testing.assert_allclose(found.unigram, unigram)
    np.testing.assert_allclose(found.unigram_nll(test), -np.log(unigram[test[1:]]))
    for strength in STRENGTHS[:2]:
        expected = []
        for first, second in itertools.pairwise(test):
            pairs = ((train[:-1] == first) & (train[1:] == second)).sum()
            expected.append((pairs + strength * unigram[second]) / ((train[:-1] == first).sum() + strength))
        np.testing.assert_allclose(found.bigram_nll(test, strength), -np.log(expected))


def test_the_bigram_is_a_distribution():
    train = stream(0)
    every = np.array([pair for second in range(VOCAB) for pair in (3, second)] + [3], np.uint16)
    found = NGrams(train, [every], VOCAB)
    after_three = np.exp(-found.bigram_nll(every, 10.0))[::2][:VOCAB]
    assert after_three.sum() == pytest.approx(1)


def test_pieces_count_every_pair_once(monkeypatch):
    train, test = stream(2, 1000), stream(3)
    whole = NGrams(train, [test], VOCAB)
    monkeypatch.setattr(ngrams, "PIECE", 64)
    cut = NGrams(train, [test], VOCAB)
    np.testing.assert_array_equal(cut.unigram, whole.unigram)
    np.testing.assert_array_equal(cut.bigram_nll(test, 3.0), whole.bigram_nll(test, 3.0))
    assert num_counted(1000) == 1000
    monkeypatch.setattr(ngrams, "MAX_COUNTED", 256)
    assert num_counted(1000) <= 256
    assert np.isfinite(NGrams(train, [test], VOCAB).unigram_nll(test)).all()


def test_the_strength_is_the_one_that_predicts_validation_best():
    chain = np.tile(np.arange(VOCAB, dtype=np.uint16), 200)
    validation = np.tile(np.arange(VOCAB, dtype=np.uint16), 9)
    found = NGrams(chain, [validation], VOCAB)
    assert found.best_strength(validation) == STRENGTHS[0]  # what follows is certain: counts are to be trusted
    assert found.bigram_nll(validation, 1.0).mean() < 0.05 < found.unigram_nll(validation).mean()
