"""Scores of forecasts [n, h]: over all of them, and by how many steps ahead."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memfit.errors import DataError
from memfit.metrics import regression
from memfit.metrics.arrays import finite, paired

METRICS = ("mae", "rmse", "mse", "mape", "r2", "huber")
SCORED_STEPS = 6
"""At most so many steps of the horizon have scores of their own in `forecast_scores`."""


def mse(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return the mean squared error over [n] rows; None without rows or with a value that is not finite."""
    return _mean(np.square(_errors(truth, predicted)))


def mape(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """Return the mean of |error| / |truth| over [n] rows, 0.1 for 10 %; None as for `mse`, or where a truth is 0."""
    error = np.abs(_errors(truth, predicted))
    size = np.abs(np.asarray(truth, np.float64))
    return _mean(error / size) if size.all() else None


def huber(truth: ArrayLike, predicted: ArrayLike, delta: float) -> float | None:
    """Return the mean Huber loss: error² / 2 up to delta, delta (|error| - delta / 2) beyond (Huber, 1964).

    In squared units; None as for `mse`.
    """
    error = np.abs(_errors(truth, predicted))
    near = np.minimum(error, delta)
    return _mean(near * (error - near / 2))


def scored_steps(horizon: int) -> list[int]:
    """Return the steps, counted from 1, with scores of their own: all, or evenly spread ones with first and last."""
    spread = np.linspace(1, horizon, min(horizon, SCORED_STEPS)).round().astype(int)
    return [int(step) for step in spread]


def forecast_scores(truth: ArrayLike, predicted: ArrayLike, huber_delta: float) -> dict[str, float | None]:
    """Score forecasts [n, h] in the user's units: METRICS over all, then as `<metric>_step_<k>` for `scored_steps`.

    A score that is undefined on these rows is None. Raises DataError for arrays that do not match.
    """
    true, given = _checked(truth, predicted)
    scores = _scores(true.ravel(), given.ravel(), huber_delta)
    for step in scored_steps(true.shape[1]):
        own = _scores(true[:, step - 1], given[:, step - 1], huber_delta)
        scores |= {f"{name}_step_{step}": score for name, score in own.items()}
    return scores


def step_scores(truth: ArrayLike, predicted: ArrayLike, huber_delta: float) -> dict[str, list[float | None]]:
    """Return each of METRICS for every step of the horizon, in order. Raises as `forecast_scores`."""
    true, given = _checked(truth, predicted)
    rows = [_scores(true[:, step], given[:, step], huber_delta) for step in range(true.shape[1])]
    return {name: [row[name] for row in rows] for name in METRICS}


def _scores(truth: NDArray[Any], predicted: NDArray[Any], huber_delta: float) -> dict[str, float | None]:
    return {
        "mae": regression.mae(truth, predicted),
        "rmse": regression.rmse(truth, predicted),
        "mse": mse(truth, predicted),
        "mape": mape(truth, predicted),
        "r2": regression.r2(truth, predicted),
        "huber": huber(truth, predicted, huber_delta),
    }


def _checked(truth: ArrayLike, predicted: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    true, given = np.asarray(truth), np.asarray(predicted)
    if true.ndim != 2 or true.shape != given.shape or not true.shape[1]:
        raise DataError(
            f"truth and predictions must be [n, h] each, h at least 1, of the same rows; got {list(true.shape)} and "
            f"{list(given.shape)}. Score a model on the rows and the horizon that it predicted."
        )
    return true, given


def _errors(truth: ArrayLike, predicted: ArrayLike) -> NDArray[np.float64]:
    """Return truth minus prediction; NaN where both are the same infinity."""
    true, given = paired(truth, predicted, np.float64)
    with np.errstate(invalid="ignore"):
        error: NDArray[np.float64] = true - given
    return error


def _mean(losses: NDArray[np.float64]) -> float | None:
    return finite(float(losses.mean())) if losses.size else None
