"""Plans found by really running a small program in children under the enforced budget, or by forecast alone."""

import importlib
import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from memfit.errors import ChildError, ConfigError, DoesNotFitError, MemfitError
from memfit.memory import answers, enforcement, outlook, planner
from memfit.memory.devices import find_device
from memfit.memory.forecast import Forecast
from memfit.memory.outlook import load_program
from memfit.memory.plan import EVALUATION_FACTOR, HEADROOM, Candidate, Plan
from memfit.memory.planner import plan_stage
from memfit.memory.request import PlanRequest
from memfit.memory.search import TIE
from memfit.process import Outcome, run_child

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
    layout = ("micro_batch_size", "accumulation_steps", "precision", "checkpointing", "variant", "seq_len")
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
    assert [(probe.candidate, probe.peak_bytes) for probe in seen] == [
        (probe.candidate, probe.peak_bytes)
        for probe in generous.probes  # those timed again may be faster
    ]
    assert generous.checkpointing == "none"
    assert {probe.checkpointing for probe in generous.probes} == {"none"}
    micro = [probe.micro_batch_size for probe in generous.probes if not probe.verifying]
    assert micro == sorted(micro)
    assert all(probe.upper_bytes >= probe.predicted_bytes > 0 for probe in generous.probes)
    assert generous.predicted_peak_bytes == generous.probes[-1].predicted_bytes
    assert generous.upper_peak_bytes >= generous.predicted_peak_bytes
    assert len(generous.timeline["phase"]) == len(generous.timeline["parameters"]) > 0

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


def call_here(target, payload, *, on_event=None, **_) -> Outcome:
    """Do in this process, and without a limit, what a child would do."""
    module, name = target.split(":")
    try:
        value = getattr(importlib.import_module(module), name)(json.loads(json.dumps(payload)), on_event or id)
    except MemfitError as error:
        return Outcome("failed", message=str(error), error=type(error).__name__)
    return Outcome("ok", value=json.loads(json.dumps(value)))


@pytest.fixture
def here(monkeypatch):
    """Call what children call in this process, where processes are not the point; return what was called."""
    called = []
    for module in (planner, answers):
        monkeypatch.setattr(module, "run_child", lambda target, *args, **how: called.append(target) or call_here(
            target, *args, **how))  # fmt: skip
    monkeypatch.setattr(enforcement, "enforce_budget", lambda *_: None)
    monkeypatch.syspath_prepend(str(PROGRAMS.parent))
    return called


@pytest.fixture
def relief_here(monkeypatch):
    """Estimate in this process what would help; everything else has its child."""

    def run(target, *args, **how):
        return (call_here if target.endswith(":relief_in_child") else run_child)(target, *args, **how)

    monkeypatch.setattr(answers, "run_child", run)
    monkeypatch.syspath_prepend(str(PROGRAMS.parent))


def test_an_impossible_budget_says_what_was_tried_and_what_would_help(request_plan, relief_here):
    with pytest.raises(DoesNotFitError) as raised:
        plan_stage(request_plan(budget_bytes=60 * MIB))
    said = str(raised.value)
    assert "stage 'first'" in said
    assert "60 MiB" in said
    assert "micro_batch_size 1" in said
    assert "checkpointing blocks" in said
    assert "by estimate needs" in said
    assert "By estimate no single change is enough: raise the budget to" in said
    assert "MiB more" in said


def test_what_cannot_fit_by_far_is_answered_by_one_child_that_runs_nothing(request_plan, here):
    seen = []
    with pytest.raises(DoesNotFitError):
        plan_stage(request_plan(budget_bytes=60 * MIB), seen.append)
    assert here == ["memfit.memory.probe:run"]
    assert [(probe.outcome, probe.checkpointing, probe.peak_bytes) for probe in seen] == [
        ("over_budget", "none", None), ("over_budget", "blocks", None),
    ]  # fmt: skip
    assert all(probe.predicted_bytes > 60 * MIB for probe in seen)


def test_programs_are_refused_before_anything_is_run_only_where_they_cannot_fit_by_far(request_plan, here):
    planner.check_feasible([request_plan(), request_plan("sequences")])
    with pytest.raises(DoesNotFitError, match=r"stage 'second'.*by estimate needs"):
        planner.check_feasible([request_plan(), request_plan("sequences", stage="second", seq_lens=(2**20,))])
    assert here == ["memfit.memory.outlook:outlook"] * 2


def test_a_precision_that_the_card_at_hand_has_not_is_left_out(request_plan, here, monkeypatch):
    monkeypatch.setattr(outlook, "find_device", lambda *_: replace(find_device("cpu"), precisions=("fp32", "fp16")))
    plan = plan_stage(request_plan("sequences", precisions=("bf16", "fp32")))
    assert plan.precision == "fp32"
    assert [probe.precision for probe in plan.probes if probe.outcome == "unsupported"] == ["bf16"]
    with pytest.raises(ConfigError, match=r"precisions: expected one that cpu has, of \['fp32', 'fp16'\], got 'bf16'"):
        plan_stage(request_plan("sequences", precisions=("bf16",)))


def test_evaluation_is_part_of_what_must_fit(request_plan):
    hungry = request_plan(
        "hungry_evaluation", {"bytes_per_sample": 100 * MIB}, budget_bytes=GIB, checkpointings=("none",)
    )
    plan = plan_stage(hungry)
    check_evidence(plan)
    assert plan.micro_batch_size <= 4
    ended = [probe for probe in plan.probes if probe.outcome != "fits"]
    assert all(probe.outcome in ("oom", "over_budget") for probe in ended)


def test_a_batch_of_another_size_than_asked_for_is_a_config_error(request_plan, here):
    with pytest.raises(ConfigError, match=r"make_batch: expected \d+ samples, got \d+"):
        plan_stage(request_plan("blocks", {"too_many": 1}))


def test_a_failure_that_is_not_about_memory_is_not_taken_for_a_measurement(request_plan):
    with pytest.raises(ChildError, match="probe of stage 'first': failed: ValueError: the labels do not match"):
        plan_stage(request_plan("broken"))


def test_a_timeout_is_an_answer_and_checkpointing_is_not_tried_against_it(request_plan, relief_here):
    seen = []
    with pytest.raises(DoesNotFitError, match="timeout"):
        plan_stage(request_plan(deadline_seconds=0.3), seen.append)
    assert [probe.outcome for probe in seen] == ["timeout"]


def check_forecast(plan: Plan, device: str) -> None:
    """Nothing was run: all figures are predictions, and even the upper bound fits."""
    assert not plan.verified
    assert plan.device == device
    assert plan.measured_peak_bytes is None
    assert all(probe.peak_bytes is None and probe.outcome != "fits" for probe in plan.probes)
    assert 0 < plan.predicted_peak_bytes <= plan.upper_peak_bytes <= plan.budget_bytes * (1 - HEADROOM)
    assert plan.micro_batch_size * plan.accumulation_steps >= plan.global_batch_size
    assert plan.eval_batch_size >= plan.micro_batch_size
    assert "predicted, nothing was run" in plan.reason
    assert plan.timeline["phase"]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_card_that_is_not_here_is_planned_for_and_nothing_is_run(request_plan, here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for a card"))
    seen = []
    plan = plan_stage(request_plan("sequences", device="t4", budget_bytes=2 * GIB), seen.append)
    check_forecast(plan, "t4")
    assert here == ["memfit.memory.outlook:forecast"]
    assert [asdict(probe) for probe in seen] == [asdict(probe) for probe in plan.probes]
    assert plan.checkpointing == "none"
    assert plan.samples_per_second == pytest.approx(GLOBAL / plan.step_seconds)
    rungs = {probe.micro_batch_size for probe in plan.probes if not probe.verifying}
    assert rungs >= {1, 2, 4, 8, 16, 32, 64}


def test_more_budget_gives_no_slower_forecast_and_none_that_is_too_small_an_answer(request_plan, here):
    found = []
    for mib in (250, 300, 500, 800, 1400, 3000):
        plan = plan_stage(request_plan("sequences", device="t4", budget_bytes=mib * MIB))
        check_forecast(plan, "t4")
        found.append(plan.samples_per_second)
    assert all(later >= earlier * (1 - TIE) for earlier, later in pairwise(found))
    assert found[-1] > 1.1 * found[0]


@pytest.mark.parametrize(
    ("precisions", "chosen"), [(("bf16", "fp16", "fp32"), "fp16"), (("bf16", "fp32"), "fp32"), (("fp16",), "fp16")]
)
def test_precisions_are_those_of_the_card(request_plan, here, precisions, chosen):
    plan = plan_stage(
        request_plan("sequences", device="t4", budget_bytes=2 * GIB, precisions=precisions, checkpointings=("none",))
    )
    check_forecast(plan, "t4")
    assert plan.precision == chosen
    assert "bf16" not in {probe.precision for probe in plan.probes}


def test_a_precision_that_the_card_has_not_is_an_error(request_plan, here):
    with pytest.raises(ConfigError, match=r"t4 has, of \['fp32', 'fp16'\], got \['bf16'\]"):
        plan_stage(request_plan("sequences", device="t4", precisions=("bf16",)))


def test_the_machine_at_hand_is_estimated_only_if_asked_for(request_plan, here):
    """Its rates are not known: what recomputes and accumulates least is taken."""
    plan = plan_stage(request_plan("sequences", budget_bytes=4 * GIB, estimate_only=True))
    check_forecast(plan, "cpu")
    assert here == ["memfit.memory.outlook:forecast"]
    assert (plan.micro_batch_size, plan.checkpointing) == (GLOBAL, "none")
    assert plan.samples_per_second is None
    assert plan.step_seconds is None


def test_a_shorter_sequence_is_forecast_only_where_the_first_does_not_fit(request_plan, here):
    asked = {"device": "t4", "budget_bytes": 250 * MIB}
    plan = plan_stage(request_plan("sequences", seq_lens=(65536, 1024), **asked))
    check_forecast(plan, "t4")
    assert plan.seq_len == 1024
    assert {"name": "seq_len", "class": "lossy", "value": 1024} in plan.levers
    assert {probe.outcome for probe in plan.probes if probe.seq_len == 65536} == {"over_budget"}
    assert len(here) == 2


@pytest.mark.parametrize(
    ("evaluates", "phase", "change"),
    [(False, "train_step", "plan.checkpointing 'blocks'"), (True, "evaluate", "plan.precisions 'fp16'")],
)
def test_a_change_that_would_fit_is_named_with_what_is_missing(request_plan, here, evaluates, phase, change):
    """Recomputing activations saves nothing where evaluation is what binds."""
    given = {"evaluates": evaluates}
    program = load_program({"factory": f"{PROGRAMS.stem}:sequences", "arguments": given})
    needs = Forecast(program, find_device("t4"), evaluation_factor=EVALUATION_FACTOR).of(
        Candidate(1, GLOBAL, variant="only", seq_len=8192)
    )
    asked = {"device": "t4", "seq_lens": (8192,), "checkpointings": ("none",)}
    with pytest.raises(DoesNotFitError) as raised:
        plan_stage(request_plan("sequences", given, budget_bytes=int(0.98 * needs.upper_bytes), **asked))
    said = str(raised.value)
    assert "micro_batch_size 1, fp32, checkpointing none" in said
    missing = (needs.upper_bytes - 0.98 * needs.upper_bytes * (1 - HEADROOM)) / MIB
    assert f"by estimate needs {needs.upper_bytes / MIB:.0f} MiB (in phase {phase!r}), {missing:.0f} MiB too" in said
    assert f"By estimate {change} would fit" in said
    assert "or raise the budget to" in said
    assert here == ["memfit.memory.outlook:forecast"]


def test_a_loss_that_is_a_sum_is_found_before_anything_is_measured(request_plan, here):
    with pytest.raises(ConfigError, match="count"):
        plan_stage(request_plan("summed", check=True))
    assert here == ["memfit.memory.probe:run"]
