"""Plans found by really running a small program in children under the enforced budget."""

from dataclasses import asdict
from pathlib import Path

import pytest

from memfit.errors import ChildError, ConfigError, DoesNotFitError
from memfit.memory.plan import Plan
from memfit.memory.planner import PlanRequest, plan_stage
from memfit.memory.probe import HEADROOM

MIB, GIB = 2**20, 2**30
GLOBAL = 64
PROGRAMS = Path(__file__).with_name("planned_programs.py")


@pytest.fixture
def request_plan(tmp_path, importable):
    module = importable(PROGRAMS)

    def build(factory: str = "blocks", arguments: dict | None = None, **changes) -> PlanRequest:
        settings = {
            "stage": "first",
            "program": {"factory": f"{module}:{factory}", "arguments": arguments or {}},
            "global_batch_size": GLOBAL,
            "budget_bytes": 6 * GIB,
            "device": "cpu",
            "precisions": ("fp32",),
            "checkpointings": ("none", "blocks"),
            "variant": "only",
            "wanted_variant": "only",
            "fingerprint": "f" * 16,
            "log": tmp_path / "plan.log",
        }
        return PlanRequest(**{**settings, **changes})

    return build


def check_evidence(plan: Plan) -> None:
    """A plan stands on a verifying probe of the same layout, run last, within the budget."""
    confirmed = plan.probes[-1]
    layout = ("micro_batch_size", "accumulation_steps", "precision", "checkpointing", "variant")
    assert plan.verified
    assert confirmed.verifying
    assert confirmed.outcome == "fits"
    assert {name: getattr(confirmed, name) for name in layout} == {name: getattr(plan, name) for name in layout}
    assert plan.measured_peak_bytes == confirmed.peak_bytes <= plan.budget_bytes * (1 - HEADROOM)
    assert plan.samples_per_second == confirmed.samples_per_second > 0
    assert plan.global_batch_size == GLOBAL
    assert plan.micro_batch_size * plan.accumulation_steps >= GLOBAL
    assert plan.eval_batch_size >= plan.micro_batch_size
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_generous_budget_then_a_tight_one(request_plan):
    seen = []
    generous = plan_stage(request_plan(), seen.append)
    check_evidence(generous)
    assert [asdict(probe) for probe in seen] == [asdict(probe) for probe in generous.probes]
    assert generous.checkpointing == "none"
    assert {probe.checkpointing for probe in generous.probes} == {"none"}
    micro = [probe.micro_batch_size for probe in generous.probes if not probe.verifying]
    assert micro == sorted(micro)
    assert micro[0] == 1

    peaks = [probe.peak_bytes for probe in generous.probes if not probe.verifying]
    assert peaks[-1] - peaks[0] > 40 * MIB
    # Enough for about half of the largest layout that was run, the process itself included.
    tight = plan_stage(request_plan(budget_bytes=int((peaks[0] + (peaks[-1] - peaks[0]) * 0.5) / (1 - HEADROOM))))
    check_evidence(tight)
    assert tight.micro_batch_size < max(micro) or tight.checkpointing == "blocks"
    levers = {lever["name"]: lever for lever in tight.levers}
    assert levers
    assert all(lever["class"] == "exact" for lever in levers.values())
    assert str(round(tight.measured_peak_bytes / MIB)) in tight.reason


def test_an_impossible_budget_says_what_was_tried_and_what_would_help(request_plan):
    with pytest.raises(DoesNotFitError) as raised:
        plan_stage(request_plan(budget_bytes=60 * MIB))
    said = str(raised.value)
    assert "stage 'first'" in said
    assert "60 MiB" in said
    assert "micro_batch_size 1" in said
    assert "checkpointing blocks" in said
    assert "phase 'build'" in said
    assert "Raise the budget" in said


def test_evaluation_is_part_of_what_must_fit(request_plan):
    hungry = request_plan(
        "hungry_evaluation", {"bytes_per_sample": 100 * MIB}, budget_bytes=GIB, checkpointings=("none",)
    )
    plan = plan_stage(hungry)
    check_evidence(plan)
    assert plan.micro_batch_size <= 4
    ended = [probe for probe in plan.probes if probe.outcome != "fits"]
    assert all(probe.outcome in ("oom", "over_budget") for probe in ended)


def test_a_batch_of_another_size_than_asked_for_is_a_config_error(request_plan):
    with pytest.raises(ConfigError, match=r"make_batch: expected \d+ samples, got \d+"):
        plan_stage(request_plan("blocks", {"too_many": 1}))


def test_a_failure_that_is_not_about_memory_is_not_taken_for_a_measurement(request_plan):
    with pytest.raises(ChildError, match="probe of stage 'first': failed: ValueError: the labels do not match"):
        plan_stage(request_plan("broken"))


def test_a_timeout_is_an_answer_and_checkpointing_is_not_tried_against_it(request_plan):
    seen = []
    with pytest.raises(DoesNotFitError, match="timeout"):
        plan_stage(request_plan(deadline_seconds=0.3), seen.append)
    assert [probe.outcome for probe in seen] == ["timeout"]
