"""Which ladders the planner climbs, and which it takes over from an earlier stage; no child is started."""

from dataclasses import asdict, replace
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.errors import DoesNotFitError
from memfit.memory import answers, planner
from memfit.memory.plan import HEADROOM, Candidate, Plan, Probe
from memfit.memory.planner import Climb, plan_stage
from memfit.memory.request import PlanRequest
from memfit.memory.search import TIE, candidates, sweep
from memfit.process import Outcome

MIB = 2**20
BUDGET = 1000 * MIB


class Machine:
    """Micro-steps cost 10 ms + 1 ms per sample; memory is linear, and checkpointing takes a quarter of it."""

    def __init__(
        self,
        mib_per_sample: float,
        monkeypatch,
        *,
        hangs: bool = False,
        base_mib: int = 200,
        fixed_seconds: float = 0.01,
        relief: tuple = (),
        usable: tuple = (),
        foresees: float = 1.0,
    ) -> None:
        self.mib_per_sample, self.base_mib, self.fixed_seconds = mib_per_sample, base_mib, fixed_seconds
        self.hangs, self.relief, self.usable, self.foresees = hangs, relief, usable, foresees
        self.climbed, self.confirmed, self.relieved = [], [], []
        monkeypatch.setattr(planner, "_run", self.run)
        monkeypatch.setattr(answers, "run_child", self.run_child)

    def run_child(self, target, payload, **_):
        """The only child that is left: the one that looks for relief; without estimates it fails."""
        assert target == "memfit.memory.outlook:relief_in_child"
        self.relieved.append(Probe(**payload["probe"]).candidate)
        return Outcome("ok", value=list(self.relief)) if self.relief else Outcome("failed")

    def run(self, search, ladder, verifying, _smallest=()):
        request = search.request
        limit = int(request.budget_bytes * (1 - HEADROOM))
        if verifying:
            self.confirmed.append(ladder[0])
        else:
            self.climbed.append((ladder[0].precision, ladder[0].checkpointing, request.global_batch_size))
        probes = list(
            sweep(
                ladder, lambda candidate: self.probe(candidate, limit, request.global_batch_size), limit, self.foreseen
            )
        )
        probes = [replace(probe, verifying=verifying) for probe in probes]
        return Climb(probes, [self.foreseen(c) for c in ladder], list(self.usable))

    def foreseen(self, candidate: Candidate) -> int:
        return int(self.peak(candidate) * self.foresees)

    def peak(self, candidate: Candidate) -> int:
        share = 0.25 if candidate.checkpointing == "blocks" else 1.0
        share *= (candidate.seq_len or 1024) / 1024
        share *= 0.6 if candidate.chunked_loss else 1.0
        return int((self.base_mib + self.mib_per_sample * share * candidate.micro_batch_size) * MIB)

    def probe(self, candidate: Candidate, limit: int, size: int) -> Probe:
        if self.hangs:
            return Probe(**asdict(candidate), outcome="timeout")
        peak = self.peak(candidate)
        if peak > limit:
            return Probe(**asdict(candidate), outcome="oom")
        seconds = self.fixed_seconds + 0.001 * candidate.micro_batch_size
        seconds *= 4 / 3 if candidate.checkpointing == "blocks" else 1
        bare = Probe(**asdict(candidate), outcome="fits", peak_bytes=peak, micro_seconds=seconds, update_seconds=0.005)
        return bare.at(candidate, size)


def request(size: int, known=(), precisions=("fp32",), **changes) -> PlanRequest:
    settings = {
        "stage": "first",
        "program": {},
        "global_batch_size": size,
        "budget_bytes": BUDGET,
        "device": "cpu",
        "precisions": precisions,
        "checkpointings": ("none", "blocks"),
        "variant": "light",
        "wanted_variant": "light",
        "fingerprint": "f",
        "known": known,
        "log": Path("unused"),
    }
    return PlanRequest(**{**settings, **changes})


def micro_sizes(probes) -> list[int]:
    return [probe.micro_batch_size for probe in probes if not probe.verifying]


def test_recomputation_is_tried_only_where_memory_ended_the_climb(monkeypatch):
    roomy = Machine(1, monkeypatch)
    plan = plan_stage(request(64))
    assert roomy.climbed == [("fp32", "none", 64)]
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.checkpointing) == (64, 1, "none")
    assert plan.levers == ()
    tight = Machine(40, monkeypatch)
    plan = plan_stage(request(64))
    assert tight.climbed == [("fp32", "none", 64), ("fp32", "blocks", 64)]
    assert plan.checkpointing == "blocks"
    assert {lever["name"] for lever in plan.levers} == {
        "checkpointing",
        *(["accumulation_steps"] if plan.accumulation_steps > 1 else []),
    }


def test_levers_that_cost_less_are_tried_before_recomputation_and_only_where_they_change_anything(monkeypatch):
    machine = Machine(20, monkeypatch, usable=("chunked_loss",))
    plan = plan_stage(request(64))
    assert (plan.micro_batch_size, plan.chunked_loss, plan.checkpointing) == (64, True, "none")
    assert {"name": "chunked_loss", "class": "exact", "value": True} in plan.levers
    assert machine.climbed == [("fp32", "none", 64)] * 2

    tighter = Machine(200, monkeypatch, usable=("chunked_loss", "foreach"))
    plan = plan_stage(request(64))
    assert {(p.checkpointing, p.chunked_loss, p.foreach) for p in plan.probes} >= {
        ("none", False, True), ("none", True, True), ("none", True, False), ("blocks", True, False),
    }  # fmt: skip
    assert tighter.climbed == [("fp32", "none", 64)] * 3 + [("fp32", "blocks", 64)]


def test_where_a_climb_begins_too_high_the_rungs_below_are_climbed_too(monkeypatch):
    machine = Machine(90, monkeypatch, foresees=0.1)
    plan = plan_stage(request(64, checkpointings=("none",)))
    assert machine.climbed == [("fp32", "none", 64)] * 2
    assert next((p.micro_batch_size, p.outcome) for p in plan.probes if not p.verifying) == (16, "oom")
    assert plan.micro_batch_size == 8


def test_a_timeout_is_not_cured_by_recomputation(monkeypatch):
    machine = Machine(1, monkeypatch, hangs=True)
    with pytest.raises(DoesNotFitError, match="timeout"):
        plan_stage(request(64))
    assert machine.climbed == [("fp32", "none", 64)]


def test_every_allowed_precision_is_measured_and_named_as_a_lever(monkeypatch):
    machine = Machine(1, monkeypatch)
    plan = plan_stage(request(64, precisions=("bf16", "fp32")))
    assert machine.climbed == [("bf16", "none", 64), ("fp32", "none", 64)]
    assert plan.precision == "bf16"
    assert {"name": "precision", "class": "numerics", "value": "bf16"} in plan.levers


def test_a_smaller_global_batch_takes_over_what_was_measured(monkeypatch):
    machine = Machine(1, monkeypatch)
    first = plan_stage(request(64))
    second = plan_stage(request(32, known=first.probes))
    assert machine.climbed == [("fp32", "none", 64)]
    assert micro_sizes(second.probes) == [16, 32]
    assert [p.accumulation_steps for p in second.probes if not p.verifying] == [2, 1]
    assert (second.micro_batch_size, second.accumulation_steps) == (32, 1)
    for probe in second.probes:
        expected = 0.005 + probe.accumulation_steps * (0.01 + 0.001 * probe.micro_batch_size)
        assert probe.step_seconds == pytest.approx(expected)
        assert probe.samples_per_second == pytest.approx(32 / expected)


@pytest.mark.parametrize("size", [48, 33, 10])
def test_a_ladder_of_other_rungs_is_climbed_anew(monkeypatch, size):
    machine = Machine(1, monkeypatch)
    first = plan_stage(request(64))
    second = plan_stage(request(size, known=first.probes))
    assert machine.climbed[1:] == [("fp32", "none", size)]
    assert (second.micro_batch_size, second.accumulation_steps) == (size, 1)


def test_what_did_not_fit_is_not_tried_again(monkeypatch):
    machine = Machine(200, monkeypatch)
    first = plan_stage(request(64))
    assert machine.climbed == [("fp32", "none", 64), ("fp32", "blocks", 64)]
    second = plan_stage(request(16, known=first.probes))
    assert len(machine.climbed) == 2
    assert (first.micro_batch_size, first.checkpointing) == (13, "blocks")  # between two rungs of 64
    assert (second.micro_batch_size, second.checkpointing) == (8, "blocks")  # 16 has nothing between 8 and 16


def test_a_climb_that_a_prediction_ended_is_taken_over_with_what_followed_it(monkeypatch):
    machine = Machine(700, monkeypatch)
    first = plan_stage(request(64))
    assert micro_sizes(p for p in first.probes if p.checkpointing == "none") == [1]
    assert machine.climbed == [("fp32", "none", 64), ("fp32", "blocks", 64)]
    second = plan_stage(request(16, known=first.probes))
    assert len(machine.climbed) == 2
    assert (second.micro_batch_size, second.checkpointing) == (4, "blocks")


def test_another_precision_says_nothing_of_this_one(monkeypatch):
    machine = Machine(1, monkeypatch)
    first = plan_stage(request(64, precisions=("bf16",)))
    plan_stage(request(32, known=first.probes))
    assert machine.climbed == [("bf16", "none", 64), ("fp32", "none", 32)]


def test_the_same_measurements_give_the_same_plan(monkeypatch):
    Machine(17, monkeypatch)
    assert plan_stage(request(60)) == plan_stage(request(60))


def test_ladders_of_equal_micro_batches_are_prefixes_of_each_other():
    def micro(size):
        return [c.micro_batch_size for c in candidates(size, precision="fp32", checkpointing="none", variant=None)]

    assert micro(64)[: len(micro(16))] == micro(16)
    assert micro(96)[: len(micro(48))] == micro(48)


def check(plan: Plan, machine: Machine) -> None:
    """A verified plan was run once more, in a child of its own, and stayed within the budget."""
    layout = Candidate(
        plan.micro_batch_size, plan.accumulation_steps, plan.precision, plan.checkpointing, plan.variant, plan.seq_len
    )
    confirmed = plan.probes[-1]
    assert plan.verified
    assert machine.confirmed[-1] == confirmed.candidate == layout
    assert confirmed.verifying
    assert confirmed.outcome == "fits"
    assert machine.peak(layout) == plan.measured_peak_bytes == confirmed.peak_bytes
    assert plan.measured_peak_bytes <= plan.budget_bytes * (1 - HEADROOM)
    assert plan.samples_per_second == confirmed.samples_per_second
    assert plan.micro_batch_size * plan.accumulation_steps >= plan.global_batch_size
    assert plan.micro_batch_size * (plan.accumulation_steps - 1) < plan.global_batch_size


physical = {
    "quarter": st.integers(0, 100),
    "base": st.integers(1, 1200),
    "fixed": st.floats(0, 0.1),
    "size": st.integers(1, 200),
}


@hypothesis.settings(deadline=None)
@given(**physical, budgets=st.tuples(st.integers(100, 4000), st.integers(100, 4000)))
def test_a_plan_was_run_fits_and_gets_no_slower_with_more_budget(quarter, base, fixed, size, budgets):
    found = []
    for budget in sorted(budgets):
        with pytest.MonkeyPatch.context() as monkeypatch:
            machine = Machine(4 * quarter, monkeypatch, base_mib=base, fixed_seconds=fixed)
            asked = request(size, budget_bytes=budget * MIB)
            try:
                plan = plan_stage(asked)
            except DoesNotFitError:
                assert (base + quarter) * MIB > budget * MIB * (1 - HEADROOM) - 1  # not one recomputed sample
                continue
            check(plan, machine)
            assert plan_stage(asked) == plan
            found.append(plan)
    if len(found) == 2:
        assert found[1].samples_per_second >= found[0].samples_per_second * (1 - TIE) * (1 - 1e-9)


def test_a_plan_between_two_rungs_is_confirmed_and_uses_the_budget(monkeypatch):
    machine = Machine(20, monkeypatch)
    plan = plan_stage(request(64, checkpointings=("none",)))
    check(plan, machine)
    assert (plan.micro_batch_size, plan.accumulation_steps) == (32, 2)
    wider = Machine(28, monkeypatch)
    plan = plan_stage(request(64, checkpointings=("none",)))
    check(plan, wider)
    assert (plan.micro_batch_size, plan.accumulation_steps) == (22, 3)
    assert plan.measured_peak_bytes > 0.8 * BUDGET


def test_recomputation_that_cannot_win_is_not_climbed(monkeypatch):
    """Throughput is flat: larger micro-batches win nothing back."""
    machine = Machine(100, monkeypatch, fixed_seconds=0.0)
    plan = plan_stage(request(64))
    assert machine.climbed == [("fp32", "none", 64)]
    assert plan.checkpointing == "none"


def test_a_shorter_sequence_is_taken_only_where_the_first_does_not_fit(monkeypatch):
    roomy = Machine(10, monkeypatch)
    plan = plan_stage(request(64, seq_lens=(1024, 512)))
    assert plan.seq_len == 1024
    assert "seq_len" not in [lever["name"] for lever in plan.levers]
    assert {probe.seq_len for probe in plan.probes} == {1024}
    check(plan, roomy)

    tight = Machine(4000, monkeypatch)
    plan = plan_stage(request(64, seq_lens=(1024, 512)))
    assert plan.seq_len == 512
    assert {"name": "seq_len", "class": "lossy", "value": 512} in plan.levers
    failed = [probe for probe in plan.probes if probe.seq_len == 1024]
    assert failed
    assert all(probe.outcome != "fits" for probe in failed)
    assert tight.relieved == []  # nobody asked what else would help
    check(plan, tight)


def test_where_no_sequence_length_fits_the_shortest_is_what_failed(monkeypatch):
    machine = Machine(40000, monkeypatch)
    with pytest.raises(DoesNotFitError):
        plan_stage(request(64, seq_lens=(1024, 512)))
    assert [candidate.seq_len for candidate in machine.relieved] == [512]
    assert {(candidate.micro_batch_size, candidate.checkpointing) for candidate in machine.relieved} == {(1, "blocks")}


def test_another_variant_than_wanted_is_a_lossy_lever(monkeypatch):
    Machine(1, monkeypatch)
    plan = plan_stage(request(64, wanted_variant="full"))
    assert plan.levers == ({"name": "variant", "class": "lossy", "value": "light"},)


ESTIMATES = (
    {"change": "", "upper_bytes": 1500 * MIB, "phase": "train_step"},
    {"change": "plan.checkpointing 'blocks'", "upper_bytes": 1200 * MIB, "phase": "train_step"},
    {"change": "plan.precisions 'bf16'", "upper_bytes": 900 * MIB, "phase": "train_step"},
    {"change": "the variant 'light'", "upper_bytes": 500 * MIB, "phase": "train_step"},
)


def refuse(monkeypatch, relief: tuple) -> str:
    Machine(1300, monkeypatch, relief=relief)
    with pytest.raises(DoesNotFitError) as raised:
        plan_stage(request(64, checkpointings=("none",)))
    return str(raised.value)


def test_the_mildest_change_that_would_fit_is_named(monkeypatch):
    said = refuse(monkeypatch, ESTIMATES)
    assert "stage 'first'" in said
    assert "1000 MiB (of which 3% stays free)" in said
    assert "micro_batch_size 1, fp32, checkpointing none, variant light, ended with oom" in said
    assert "By estimate plan.precisions 'bf16' would fit (900 MiB at most)" in said
    assert "or raise the budget to 1546 MiB, 546 MiB more." in said  # 1500 / 0.97


def test_where_no_change_is_enough_the_budget_is_named(monkeypatch):
    said = refuse(monkeypatch, ESTIMATES[:2])
    assert "By estimate no single change is enough: raise the budget to 1546 MiB, 546 MiB more." in said


@pytest.mark.parametrize("relief", [(), ({**ESTIMATES[0], "upper_bytes": 100 * MIB}, ESTIMATES[3])])
def test_an_estimate_that_knows_nothing_of_the_cause_names_nothing(monkeypatch, relief):
    said = refuse(monkeypatch, relief)
    assert said.endswith("Raise the budget, or allow more: plan.precisions, plan.checkpointing, plan.variants.")


def test_what_a_failed_probe_needed_is_told_with_its_phase(monkeypatch):
    machine = Machine(1300, monkeypatch, relief=ESTIMATES)
    over = {"outcome": "over_budget", "peak_bytes": 1200 * MIB, "phase": "evaluate"}
    machine.probe = lambda candidate, limit, size: Probe(**asdict(candidate), **over)
    with pytest.raises(DoesNotFitError, match=r"needs 1200 MiB \(in phase 'evaluate'\), 230 MiB too much"):
        plan_stage(request(64))
