import numpy as np
import pytest

from memfit.workloads.generate import Sampling, choose, generate

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1]))


def draws(sampling: Sampling, count: int = 4000) -> np.ndarray:
    random = np.random.default_rng(0)
    return np.bincount([choose(LOGITS, sampling, random) for _ in range(count)], minlength=4) / count


def test_plain_sampling_follows_the_probabilities():
    np.testing.assert_allclose(draws(Sampling(temperature=1)), [0.5, 0.25, 0.15, 0.1], atol=0.03)


def test_temperature_sharpens_and_zero_is_greedy():
    squared = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(draws(Sampling(temperature=0.5)), squared / squared.sum(), atol=0.03)
    assert draws(Sampling(temperature=0), 50)[0] == 1


def test_top_k_keeps_the_likeliest():
    np.testing.assert_allclose(draws(Sampling(temperature=1, top_k=2)), [2 / 3, 1 / 3, 0, 0], atol=0.03)


def test_top_p_keeps_as_few_as_reach_it():
    np.testing.assert_allclose(draws(Sampling(temperature=1, top_p=0.6)), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(draws(Sampling(temperature=1, top_p=0.5)), [1, 0, 0, 0], atol=0)
    assert (draws(Sampling(temperature=1, top_p=1.0)) > 0).all()


def test_huge_logits_do_not_overflow():
    random = np.random.default_rng(0)
    assert choose(np.array([1e4, -1e4, 0.0]), Sampling(temperature=0.01), random) == 0


def test_a_seed_gives_the_same_tokens_and_another_others():
    def told(seed):
        return list(generate(lambda new: np.zeros(100), [1], Sampling(temperature=1, seed=seed), 20, stop=-1))

    assert told(3) == told(3)
    assert told(3) != told(4)
    assert len(told(3)) == 20


def test_only_new_tokens_are_told_and_the_stop_token_ends_it():
    heard = []

    def count_up(new):
        heard.append(list(new))
        return -np.abs(np.arange(10) - (new[-1] + 1)).astype(float)

    assert list(generate(count_up, [2, 3], Sampling(temperature=0), 50, stop=7)) == [4, 5, 6]
    assert heard == [[2, 3], [4], [5], [6]]


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"seed": -1}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        Sampling(**wrong)
