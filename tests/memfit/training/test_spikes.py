"""Spikes are skipped only where a stage asks for it, are recorded, and survive a resume."""

import math

import pytest

from memfit.training.spikes import MIN_NORMS, MOST_IN_A_ROW, WINDOW, SpikeGuard
from memfit.workloads.series import SeriesWorkload


def test_what_stands_out_from_the_median_is_not_accepted_nor_remembered():
    guard = SpikeGuard(3.0)
    assert all(guard.accepts(norm) for norm in [100.0, *[1.0] * (MIN_NORMS - 1)])
    assert guard.accepts(3.0)
    assert not guard.accepts(3.1)
    assert (guard.in_a_row, guard.last_median) == (1, 1.0)
    assert 3.1 not in guard.norms
    assert guard.accepts(1.0)
    assert guard.in_a_row == 0


def test_nothing_stands_out_before_enough_is_known():
    guard = SpikeGuard(2.0)
    assert all(guard.accepts(10.0**power) for power in range(MIN_NORMS))


def test_what_lasts_is_no_spike():
    guard = SpikeGuard(2.0, [1.0] * WINDOW)
    answers = [guard.accepts(50.0) for _ in range(MOST_IN_A_ROW + 1)]
    assert answers == [False] * MOST_IN_A_ROW + [True]
    assert len(guard.norms) == WINDOW


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_what_is_not_finite_is_for_others(norm):
    guard = SpikeGuard(2.0, [1.0] * WINDOW)
    assert guard.accepts(norm)
    assert guard.norms == [1.0] * WINDOW


@pytest.fixture
def spiked(monkeypatch):
    """One sample has a history of another world, wherever it is drawn to."""
    original = SeriesWorkload.batch

    def batch(self, split, indices):
        made = original(self, split, indices)
        if split == "train" and 7 in indices and len(indices) > 6:
            made = {**made, "history": made["history"] * 1e4}
        return made

    monkeypatch.setattr(SeriesWorkload, "batch", batch)


STAGE = {"epochs": 4, "skip_spikes": 5.0}


@pytest.mark.usefixtures("spiked")
def test_a_spike_is_skipped_and_recorded(attempts):
    guarded, plain = attempts("guarded", stage=dict(STAGE)), attempts("plain", stage={"epochs": 4})
    guarded.run()
    plain.run()
    spikes = guarded.of_kind("spike")
    assert spikes
    assert all(7 in spike["samples"] and spike["gradient_norm"] > 5 * spike["median"] for spike in spikes)
    assert guarded.of_kind("stage_end")[0]["skipped_updates"] == len(spikes)
    assert not plain.of_kind("spike")
    assert plain.of_kind("stage_end")[0]["skipped_updates"] == 0
    last = [attempt.of_kind("epoch")[-1]["validation"]["total"] for attempt in (guarded, plain)]
    assert last[0] < last[1]


@pytest.mark.usefixtures("spiked")
def test_a_resumed_stage_skips_what_the_whole_one_skips(attempts):
    whole, stopped = attempts("whole", stage=dict(STAGE)), attempts("stopped", stage=dict(STAGE))
    whole.run()
    stopped.run_interrupted(12, 9)
    assert stopped.weights("last") == whole.weights("last")
    assert stopped.events() == whole.events()
