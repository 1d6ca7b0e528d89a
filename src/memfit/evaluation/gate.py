"""Is a model good enough: better than every baseline beyond chance, and within the limits that a config sets?"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from memfit.metrics.directions import higher_is_better
from memfit.workloads.base import Arrays

NUM_RESAMPLES = 300
"""Bootstrap resamples of the test rows."""
CONFIDENCE = 0.95
Scores = Mapping[str, float | None]
Score = Callable[[Arrays, Arrays], Scores]


def judge(
    settings: Mapping[str, Any],
    headline: str,
    score: Score,
    truth: Arrays,
    predictions: Arrays,
    baselines: Mapping[str, Arrays],
) -> dict[str, Any]:
    """Decide whether a model passes; return {passed, metric, score, reasons, rivals}, JSON-able.

    settings: metric ("" for the headline), beat_baselines, at_least, at_most. Every array has a row per sample. A rival
    is beaten where the interval of the difference lies on the right side of 0 as a whole: bootstrap over blocks of rows
    (Künsch, 1989), as neighbouring rows of a series are alike; both models on the same rows.
    """
    metric = settings["metric"] or headline
    own = score(truth, predictions).get(metric)
    if own is None:
        return {"passed": False, "metric": metric, "score": None, "reasons": [f"{metric} is undefined"], "rivals": {}}
    reasons = list(_limits(metric, own, settings))
    rivals: dict[str, Any] = {}
    if settings["beat_baselines"]:
        known = {name: found for name, found in baselines.items() if score(truth, found).get(metric) is not None}
        rivals = _differences(metric, score, truth, predictions, known)
        reasons += [_lost(metric, name, rival) for name, rival in rivals.items() if not rival["beaten"]]
        reasons += [] if known else [f"no baseline has {metric}"]
    return {"passed": not reasons, "metric": metric, "score": own, "reasons": reasons, "rivals": rivals}


def _limits(metric: str, own: float, settings: Mapping[str, Any]) -> Sequence[str]:
    found = []
    for name, holds in (("at_least", own.__ge__), ("at_most", own.__le__)):
        limit = settings[name]
        if limit is not None and not holds(limit):
            found.append(f"{metric}: expected {name.replace('_', ' ')} {limit:g}, got {own:.4g}")
    return found


def _differences(
    metric: str, score: Score, truth: Arrays, predictions: Arrays, baselines: Mapping[str, Arrays]
) -> dict[str, Any]:
    """Return for every rival its score, and by how much the model is better: the figure and its interval."""
    sign = 1.0 if higher_is_better(metric) else -1.0
    drawn: dict[str, list[float]] = {name: [] for name in baselines}
    for rows in _resamples(len(next(iter(truth.values())))):
        chosen = _rows(truth, rows)
        own = score(chosen, _rows(predictions, rows)).get(metric)
        for name, found in baselines.items():
            other = score(chosen, _rows(found, rows)).get(metric)
            if own is not None and other is not None:
                drawn[name].append(sign * (own - other))
    own = score(truth, predictions)[metric]
    assert own is not None
    rivals = {}
    for name, found in baselines.items():
        other = score(truth, found)[metric]
        assert other is not None
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(drawn[name], [tail, 100 - tail]).tolist() if drawn[name] else (None, None)
        rivals[name] = {
            "score": other,
            "better_by": sign * (own - other),
            "low": low,
            "high": high,
            "beaten": low is not None and low > 0,
        }
    return rivals


def _resamples(num_rows: int) -> Sequence[np.ndarray]:
    """Draw rows in blocks of neighbours, as long as the square root of their number, around the end."""
    random = np.random.default_rng(0)
    length = max(1, math.isqrt(num_rows))
    blocks = -(-num_rows // length)
    starts = random.integers(0, num_rows, (NUM_RESAMPLES, blocks, 1))
    return list(((starts + np.arange(length)) % num_rows).reshape(NUM_RESAMPLES, -1)[:, :num_rows])


def _rows(arrays: Arrays, rows: np.ndarray) -> Arrays:
    return {name: array[rows] for name, array in arrays.items()}


def _lost(metric: str, name: str, rival: Mapping[str, Any]) -> str:
    if rival["low"] is None:
        return f"{metric}: the difference to {name} is undefined"
    interval = f"({CONFIDENCE:.0%} interval of the gain: {rival['low']:.3g} to {rival['high']:.3g})"
    if rival["high"] < 0:
        return f"{metric}: worse than {name} by {-rival['better_by']:.3g} {interval}"
    return f"{metric}: better than {name} by {rival['better_by']:.3g} {interval}, not beyond chance"
