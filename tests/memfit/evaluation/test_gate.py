import json

import numpy as np
import pytest

from memfit.evaluation.gate import judge

SETTINGS = {"metric": "", "beat_baselines": True, "at_least": None, "at_most": None}
TRUTH = {"truth": np.random.default_rng(0).normal(size=400)}


def score(truth, predictions):
    error = np.abs(predictions["value"] - truth["truth"])
    return {"mae": float(error.mean()), "close_accuracy": float((error < 0.5).mean()), "undefined": None}


def off_by(noise, seed=1):
    return {"value": TRUTH["truth"] + np.random.default_rng(seed).normal(size=400) * noise}


def decide(own, baselines, **settings):
    found = judge({**SETTINGS, **settings}, "mae", score, TRUTH, own, baselines)
    json.dumps(found)
    return found


@pytest.mark.parametrize("metric", ["mae", "close_accuracy"])
def test_a_better_model_passes_either_way(metric):
    found = decide(off_by(0.3), {"simple": off_by(1.0, 2), "worse": off_by(2.0, 3)}, metric=metric)
    assert found["passed"]
    assert found["reasons"] == []
    rival = found["rivals"]["simple"]
    assert 0 < rival["low"] <= rival["better_by"] <= rival["high"]


@pytest.mark.parametrize("metric", ["mae", "close_accuracy"])
def test_a_worse_model_does_not(metric):
    found = decide(off_by(1.0), {"simple": off_by(0.3, 2)}, metric=metric)
    assert not found["passed"]
    assert found["rivals"]["simple"]["high"] < 0
    assert "worse than simple" in found["reasons"][0]


def test_being_better_by_chance_is_not_enough():
    own, other = off_by(1.0, 4), off_by(1.0, 2)
    found = decide(own, {"alike": other})
    assert not found["passed"]
    assert "not beyond chance" in found["reasons"][0]
    rival = found["rivals"]["alike"]
    assert rival["low"] < 0 < rival["high"]


def test_neighbours_that_err_alike_make_the_interval_wider():
    """Rows that err in long runs tell less than rows that err each for itself."""
    runs = np.repeat(np.random.default_rng(5).normal(size=20), 20)
    mixed = np.random.default_rng(6).permutation(runs)
    widths = []
    for errors in (runs, mixed):
        rival = decide({"value": TRUTH["truth"]}, {"other": {"value": TRUTH["truth"] + errors}})["rivals"]["other"]
        widths.append(rival["high"] - rival["low"])
    assert widths[0] > 1.5 * widths[1]


def test_every_baseline_counts():
    found = decide(off_by(0.5), {"weak": off_by(2.0, 2), "strong": off_by(0.1, 3)})
    assert not found["passed"]
    assert (found["rivals"]["weak"]["beaten"], found["rivals"]["strong"]["beaten"]) == (True, False)


@pytest.mark.parametrize(
    ("limits", "passed"), [({"at_most": 1.0}, True), ({"at_most": 0.1}, False), ({"at_least": 5.0}, False)]
)
def test_limits_are_kept(limits, passed):
    found = decide(off_by(0.5), {}, beat_baselines=False, **limits)
    assert found["passed"] == passed
    assert all("expected at" in reason for reason in found["reasons"])


def test_what_is_undefined_does_not_pass():
    assert decide(off_by(0.1), {}, metric="undefined")["reasons"] == ["undefined is undefined"]
    assert decide(off_by(0.1), {}, metric="unknown")["passed"] is False
    assert decide(off_by(0.1), {})["reasons"] == ["no baseline has mae"]
