"""Which ladders the planner climbs, and which it takes over from an earlier stage; no child is started."""

from dataclasses import asdict
from pathlib import Path

import pytest

from memfit.errors import DoesNotFitError
from memfit.memory import planner
from memfit.memory.plan import Candidate, Probe
from memfit.memory.planner import PlanRequest, plan_stage
from memfit.memory.search import candidates, sweep

MIB = 2**20
BUDGET = 1000 * MIB


class Machine:
    """Micro-steps cost 10 ms + 1 ms per sample; memory is linear, and checkpointing takes a quarter of it."""

    def __init__(self, mib_per_sample: float, monkeypatch, *, hangs: bool = False) -> None:
        self.mib_per_sample, self.hangs, self.climbed = mib_per_sample, hangs, []
        monkeypatch.setattr(planner, "_run", self.run)

    def run(self, request, ladder, verifying, on_probe):
        if not verifying:
            self.climbed.append((ladder[0].precision, ladder[0].checkpointing, request.global_batch_size))
        probes = list(sweep(ladder, lambda rungs, _: map(self.probe, rungs), BUDGET * 97 // 100))
        return [Probe(**{**vars(probe), "verifying": verifying}) for probe in probes]

    def probe(self, candidate: Candidate) -> Probe:
        if self.hangs:
            return Probe(**asdict(candidate), outcome="timeout")
        share = 0.25 if candidate.checkpointing == "blocks" else 1.0
        peak = int((200 + self.mib_per_sample * share * candidate.micro_batch_size) * MIB)
        if peak > BUDGET * 0.97:
            return Probe(**asdict(candidate), outcome="oom")
        seconds = 0.01 + 0.001 * candidate.micro_batch_size
        bare = Probe(**asdict(candidate), outcome="fits", peak_bytes=peak, micro_seconds=seconds, update_seconds=0.005)
        return bare.at(candidate, candidate.micro_batch_size * candidate.accumulation_steps)


def request(size: int, known=(), precisions=("fp32",)) -> PlanRequest:
    return PlanRequest(
        stage="first",
        program={},
        global_batch_size=size,
        budget_bytes=BUDGET,
        device="cpu",
        precisions=precisions,
        checkpointings=("none", "blocks"),
        variant="light",
        wanted_variant="light",
        fingerprint="f",
        known=known,
        log=Path("unused"),
    )


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
    assert micro_sizes(second.probes) == [1, 2, 4, 8, 16, 32]
    assert [p.accumulation_steps for p in second.probes if not p.verifying] == [32, 16, 8, 4, 2, 1]
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
    assert (second.micro_batch_size, second.checkpointing) == (first.micro_batch_size, first.checkpointing)


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
