"""Scores of forecasts, against scikit-learn and torch."""

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from memfit.errors import DataError
from memfit.metrics.forecast import METRICS, forecast_scores, huber, mape, mse, scored_steps, step_scores

RANDOM = np.random.default_rng(0)
TRUTH = RANDOM.normal(20, 5, (40, 9)).astype(np.float32)
GIVEN = TRUTH + RANDOM.normal(0, 2, TRUTH.shape).astype(np.float32)


def expected(truth, given, delta=1.5):
    loss = torch.nn.functional.huber_loss(torch.tensor(given).double(), torch.tensor(truth).double(), delta=delta)
    return {
        "mae": reference.mean_absolute_error(truth, given),
        "rmse": reference.root_mean_squared_error(truth, given),
        "mse": reference.mean_squared_error(truth, given),
        "mape": reference.mean_absolute_percentage_error(truth, given),
        "r2": reference.r2_score(truth, given),
        "huber": float(loss),
    }


def test_all_steps_together_and_some_alone():
    scores = forecast_scores(TRUTH, GIVEN, 1.5)
    assert {name: scores[name] for name in METRICS} == pytest.approx(expected(TRUTH.ravel(), GIVEN.ravel()), rel=1e-5)
    steps = scored_steps(9)
    assert set(scores) == {*METRICS, *(f"{name}_step_{step}" for name in METRICS for step in steps)}
    for step in steps:
        own = {name: scores[f"{name}_step_{step}"] for name in METRICS}
        assert own == pytest.approx(expected(TRUTH[:, step - 1], GIVEN[:, step - 1]), rel=1e-5)


def test_every_step_in_order():
    steps, scores = step_scores(TRUTH, GIVEN, 1.5), forecast_scores(TRUTH, GIVEN, 1.5)
    assert {name: len(values) for name, values in steps.items()} == dict.fromkeys(METRICS, 9)
    assert [steps["mae"][step - 1] for step in scored_steps(9)] == [scores[f"mae_step_{s}"] for s in scored_steps(9)]


@pytest.mark.parametrize(
    ("horizon", "steps"), [(1, [1]), (3, [1, 2, 3]), (6, [1, 2, 3, 4, 5, 6]), (24, [1, 6, 10, 15, 19, 24])]
)
def test_scored_steps_begin_with_the_first_and_end_with_the_last(horizon, steps):
    assert scored_steps(horizon) == steps


def test_what_is_undefined_is_none():
    assert mse([], []) is None
    assert mse([1.0], [np.nan]) is None
    assert mape([0.0, 1.0], [1.0, 1.0]) is None
    assert huber([np.inf], [np.inf], 1.0) is None
    assert mape([-2.0], [-1.0]) == 0.5


@pytest.mark.parametrize("given", [GIVEN[:, :4], GIVEN[0], GIVEN[:3]])
def test_arrays_that_do_not_match_are_refused(given):
    with pytest.raises(DataError, match=r"truth and predictions must be \[n, h\]"):
        forecast_scores(TRUTH, given, 1.0)
