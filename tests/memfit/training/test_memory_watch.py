"""Memory that goes while training runs makes the steps smaller before they fail."""

from types import SimpleNamespace

import pytest

from memfit.memory import enforcement
from memfit.training import memory_watch
from memfit.training.memory_watch import MemoryWatch, memory_at_hand
from tests.memfit.training.conftest import make_plan

MIB = 2**20


class Step:
    """Halves up to `splits` times."""

    def __init__(self, splits: int = 5) -> None:
        self.state, self.splits, self.reasons = SimpleNamespace(accumulation_steps=1), splits, []

    def can_shrink(self, _size):
        return len(self.reasons) < self.splits

    def shrink(self, _size, reason, _phase, message):
        self.state.accumulation_steps *= 2
        self.reasons.append((reason, message))


@pytest.fixture
def machine(monkeypatch):
    """A process that holds 100 MiB between steps, and 500 in them; the memory at hand can be set."""
    told = SimpleNamespace(at_hand=2000 * MIB, peak=200 * MIB, now=100 * MIB, limits=[], time=0.0)
    monkeypatch.setattr(memory_watch, "memory_at_hand", lambda _device: told.at_hand)
    monkeypatch.setattr(memory_watch, "release_memory", lambda _device: None)
    monkeypatch.setattr(memory_watch.time, "monotonic", lambda: told.time)
    monkeypatch.setattr(enforcement, "peak_bytes", lambda _device: told.peak)
    monkeypatch.setattr(enforcement, "now_bytes", lambda _device: told.now)
    monkeypatch.setattr(enforcement, "enforce_budget", lambda budget_bytes, _device: told.limits.append(budget_bytes))
    return told


def watching(step, **changes) -> MemoryWatch:
    settings = {"budget_bytes": 1000 * MIB, "measured_peak_bytes": 500 * MIB, "accumulation_steps": 1}
    plan = make_plan(**{**settings, **changes})
    return MemoryWatch(plan, step, lambda: False)


def look(watch, machine) -> None:
    machine.time += memory_watch.EVERY_SECONDS
    watch()


def test_nothing_happens_while_there_is_enough(machine):
    step = Step()
    watch = watching(step)
    look(watch, machine)
    machine.at_hand = 501 * MIB
    look(watch, machine)
    assert step.reasons == []
    assert machine.limits == []


def test_a_step_that_no_longer_fits_is_cut_until_it_does(machine):
    """Of 500 MiB, 400 shrink with the micro-batch: 300 with half of it, 200 with a quarter."""
    step = Step()
    watch = watching(step)
    machine.at_hand = 290 * MIB
    look(watch, machine)
    assert [reason for reason, _ in step.reasons] == ["budget_shrunk"] * 2
    assert "290 MiB were at hand, and a step takes 500 MiB" in step.reasons[0][1]
    assert machine.limits == [290 * MIB]
    look(watch, machine)
    assert len(step.reasons) == 2
    machine.at_hand = 2000 * MIB  # what took the memory has gone
    look(watch, machine)
    assert machine.limits == [290 * MIB, 1000 * MIB]


def test_a_layout_that_is_smaller_already_is_not_cut_for_the_planned_ones_peak(machine):
    """As a resumed stage's may be: a quarter of the planned micro-batch takes 200 MiB, not 500."""
    step = Step()
    step.state.accumulation_steps = 4
    watch = watching(step)
    machine.at_hand = 210 * MIB
    look(watch, machine)
    assert step.reasons == []


def test_what_steps_were_seen_to_take_counts_when_nothing_was_measured(machine):
    step = Step()
    watch = watching(step, measured_peak_bytes=None)
    machine.at_hand = 450 * MIB
    look(watch, machine)
    assert step.reasons == []
    machine.peak = 600 * MIB
    look(watch, machine)
    assert len(step.reasons) == 1


def test_a_peak_from_before_the_steps_does_not_count(machine):
    machine.peak = 900 * MIB
    step = Step()
    watch = watching(step, measured_peak_bytes=None)
    machine.at_hand = 450 * MIB
    look(watch, machine)
    assert step.reasons == []


def test_where_nothing_smaller_is_left_the_limit_decides(machine):
    step = Step(splits=1)
    watch = watching(step)
    machine.at_hand = 150 * MIB
    look(watch, machine)
    assert len(step.reasons) == 1
    assert machine.limits == [150 * MIB]


def test_it_looks_no_more_often_than_it_needs_to(machine, monkeypatch):
    looks = []
    monkeypatch.setattr(memory_watch, "memory_at_hand", lambda _device: looks.append(1) or 2000 * MIB)
    watch = watching(Step())
    for _ in range(10):
        watch()
    assert len(looks) == 1


def test_the_memory_at_hand_is_what_the_process_has_and_what_is_free():
    held = enforcement.now_bytes("cpu")
    assert held < memory_at_hand("cpu") < 2**44


def test_a_stage_goes_on_in_smaller_pieces_and_ends_as_one_that_was_told_to(attempts, monkeypatch):
    """From the first look on there is too little for the planned step."""
    plan = {"micro_batch_size": 8, "accumulation_steps": 2, "measured_peak_bytes": 2**31 - 1}
    shrunk = attempts("shrunk", plan=plan)
    monkeypatch.setattr(memory_watch, "memory_at_hand", lambda _device: 2**31 - 2)
    shrunk.run()
    (change,) = shrunk.of_kind("layout")
    assert (change["reason"], change["step"], change["micro_batch_size"]) == ("budget_shrunk", 1, 4)
    monkeypatch.undo()
    monkeypatch.setattr(enforcement, "enforce_budget", lambda *_: None)
    planned = attempts("planned", plan={"micro_batch_size": 4, "accumulation_steps": 4})
    planned.run()
    assert shrunk.weights("last") == planned.weights("last")
