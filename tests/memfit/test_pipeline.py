"""The pipeline: one whole run, and what a second one reuses, plans again, or trains again."""

import json
from dataclasses import replace

import numpy as np
import pytest

from memfit import pipeline as pipelines
from memfit.config import load_config
from memfit.errors import ChildError, DoesNotFitError, RunStateError
from memfit.files import read_json
from memfit.memory.plan import Plan
from memfit.pipeline import Pipeline, code_version, open_run, read_config

STEPS = ["prepare", "plan", "train:first", "train:second", "evaluate", "export", "report"]


@pytest.fixture
def reopen(finished_run):
    """Open another run of the tiny config beside the finished one."""

    def build(*overrides: str, **settings) -> Pipeline:
        config = load_config(finished_run.config, overrides)
        return open_run(config, **{"runs": finished_run.runs, "store": finished_run.store, **settings})

    return build


@pytest.fixture
def no_children(monkeypatch):
    """Whoever starts a child, or plans, has not reused."""

    def refuse(*arguments, **_settings):
        raise AssertionError(f"started {arguments[0]}")

    monkeypatch.setattr(pipelines, "run_child", refuse)
    monkeypatch.setattr(pipelines, "plan_stage", refuse)


def perform_until(pipeline: Pipeline, last: str) -> dict[str, str]:
    for step in pipeline.steps_until(last):
        pipeline.perform(step)
    return {step["name"]: step["status"] for step in pipeline.run.record["steps"]}


def test_a_run_leaves_every_documented_file(finished_run):
    run = finished_run.path
    for name in (
        "config.toml", "plan.json", "evaluation.json", "predictions.npz", "report.html", "run.json",
        "stages/1-first/events.jsonl", "stages/1-first/checkpoints/best/model.safetensors",
        "stages/2-second/checkpoints/last/checkpoint.json", "export/model.onnx", "export/model_card.json",
        "export/infer.py", "export/features.py", "export/requirements.txt", "export/sample_inputs.npz",
        "export/expected_outputs.npz",
    ):  # fmt: skip
        assert (run / name).is_file(), name
    assert not list(run.rglob("*.tmp"))


def test_the_record_tells_what_was_done_on_what(finished_run):
    record = read_json(finished_run.path / "run.json")
    assert [step["name"] for step in record["steps"]] == STEPS
    assert {step["status"] for step in record["steps"]} == {"ran"}
    assert all(step["from_run"] is None for step in record["steps"])
    assert record["run_id"] == finished_run.path.name
    assert record["created"] <= record["finished"]
    assert {"python", "torch", "device", "memory_bytes"} <= set(record["environment"])
    assert load_config(finished_run.path / "config.toml") == load_config(finished_run.config)


def test_every_stage_trained_under_a_verified_plan(finished_run):
    plans = [Plan.from_dict(plan) for plan in read_json(finished_run.path / "plan.json")["stages"]]
    assert [plan.stage for plan in plans] == ["first", "second"]
    assert [plan.global_batch_size for plan in plans] == [16, 8]
    for index, plan in enumerate(plans):
        assert plan.verified
        assert plan.probes[-1].verifying
        assert plan.measured_peak_bytes <= plan.budget_bytes == 2 * 2**30
        log = finished_run.path / "stages" / f"{index + 1}-{plan.stage}" / "events.jsonl"
        events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        assert events[0]["plan"] == json.loads(json.dumps(plan.to_dict()))
        assert events[-1]["event"] == "stage_end"
        peaks = [event["memory"]["peak_bytes"] for event in events if event["event"] == "epoch"]
        assert all(0 < peak <= plan.budget_bytes for peak in peaks)


def test_the_metrics_are_those_of_the_predictions(finished_run):
    evaluation = read_json(finished_run.path / "evaluation.json")
    with np.load(finished_run.path / "predictions.npz") as arrays:
        error = np.abs(arrays["value"] - arrays["truth"]).mean()
    assert error == pytest.approx(evaluation["metrics"]["mae"], rel=1e-5)
    card = read_json(finished_run.path / "export" / "model_card.json")
    assert card["metrics"] == evaluation["metrics"]


def test_a_second_run_reuses_everything_and_says_from_where(reopen, no_children, finished_run):
    events = []
    second = reopen(on_event=events.append)
    statuses = perform_until(second, "export")
    assert set(statuses.values()) == {"reused"}
    origins = {step["name"]: step["from_run"] for step in second.run.record["steps"]}
    assert origins["prepare"] == origins["plan"] == "the store"
    assert {origins[step] for step in STEPS[2:6]} == {finished_run.path.name}
    assert second.run.path != finished_run.path
    assert second.summary()["metrics"] == finished_run.summary["metrics"]
    assert (second.run.path / "export/model.onnx").is_file()
    ends = [event for event in events if event["event"] == "step_end"]
    assert [event["status"] for event in ends] == ["reused"] * 6


def test_performing_a_finished_step_again_does_nothing(reopen, no_children, finished_run):
    again = open_run(
        load_config(finished_run.path / "config.toml"),
        runs=finished_run.runs,
        store=finished_run.store,
        run_dir=finished_run.path,
    )
    before = again.summary()["metrics"]
    for step in ("plan", "train:first", "train:second", "evaluate", "export"):
        again.perform(step)
        assert again.run.step(step)["status"] == "ran"
    assert again.summary()["metrics"] == before


def test_a_change_in_the_second_stage_keeps_the_first(reopen, finished_run):
    changed = reopen("stages.1.lr=1e-4", "stages.1.max_steps=2")
    statuses = perform_until(changed, "train")
    assert statuses == {"prepare": "reused", "plan": "ran", "train:first": "reused", "train:second": "ran"}
    first, second = changed.plans
    assert first == Plan.from_dict(finished_run.summary["plans"][0])
    assert second.fingerprint != finished_run.summary["plans"][1]["fingerprint"]
    weights = "stages/1-first/checkpoints/best/model.safetensors"
    assert (changed.run.path / weights).read_bytes() == (finished_run.path / weights).read_bytes()


def test_a_layout_that_changed_in_flight_is_kept_with_the_plan_and_planned_anew_next_time(
    reopen, monkeypatch, finished_run
):
    events = []
    run = reopen(on_event=events.append)
    perform_until(run, "plan")
    before, key = run.plans, run._train_key(0)
    stored = finished_run.store / "plans" / f"{before[0].fingerprint}.json"
    saved = stored.read_bytes()
    change = {
        "event": "layout", "step": 7, "reason": "out_of_memory", "phase": "train_step", "message": "can't allocate",
        "micro_batch_size": 4, "accumulation_steps": 4, "checkpointing": "none",
    }  # fmt: skip
    for _ in range(2):  # a resumed stage says it again
        run._on_training(0, change)
    assert run._train_key(0) == key
    (kept,) = run.plans[0].in_flight
    assert kept == {name: value for name, value in change.items() if name != "event"}
    assert "step 7, memory ran out in train_step; goes on with 4 micro-batches of at most 4" in run.plans[0].explain()
    assert run.plans[1] == before[1]
    assert not stored.exists()
    again = reopen(on_event=events.append)
    monkeypatch.setattr(pipelines, "plan_stage", lambda *_: before[0])
    perform_until(again, "plan")
    replanned = [event for event in events if event["event"] == "replan"]
    assert [(event["stage"], event["changed"]) for event in replanned] == [("first", ["the memory at hand"])]
    assert Plan.from_dict(json.loads(stored.read_bytes())) == Plan.from_dict(json.loads(saved))


def trains(pipeline: Pipeline, step: str, monkeypatch) -> bool:
    """Tell whether a training step would start a child."""

    def child(target, *_arguments, **_settings):
        raise ChildError(target)

    monkeypatch.setattr(pipelines, "run_child", child)
    try:
        pipeline.perform(step)
    except ChildError as started:
        return str(started) == "memfit.training.worker:run"
    return False


def test_fresh_reuses_nothing(reopen, monkeypatch, finished_run):
    planned = []

    def plan(request, _on_probe):
        planned.append(request.stage)
        return Plan.from_dict(finished_run.summary["plans"][len(planned) - 1])

    monkeypatch.setattr(pipelines, "plan_stage", plan)
    fresh = reopen(fresh=True)
    statuses = perform_until(fresh, "plan")
    assert statuses == {"prepare": "ran", "plan": "ran"}
    assert planned == ["first", "second"]
    assert trains(fresh, "train:first", monkeypatch)
    assert fresh.run.step("train:first")["status"] == "running"


@pytest.mark.parametrize("override", ["seed=4", "stages.0.lr=2e-3", "stages.0.loss.class_weight=0.7"])
def test_what_changes_the_first_stage_trains_it_and_the_next_again(reopen, monkeypatch, finished_run, override):
    plans = [Plan.from_dict(plan) for plan in finished_run.summary["plans"]]
    monkeypatch.setattr(pipelines, "plan_stage", lambda request, _: next(p for p in plans if p.stage == request.stage))
    changed = reopen(override)
    perform_until(changed, "plan")
    assert trains(changed, "train:first", monkeypatch)
    assert trains(changed, "train:second", monkeypatch)


@pytest.mark.parametrize("part", ["train", "data"])
def test_changed_code_trains_again(reopen, monkeypatch, no_children, part):
    second = reopen()
    perform_until(second, "plan")
    original = pipelines.code_version
    monkeypatch.setattr(pipelines, "code_version", lambda name: "changed" if name == part else original(name))
    if part == "train":
        assert trains(second, "train:first", monkeypatch)
    else:
        third = reopen()
        third.perform("prepare")
        assert third.run.step("prepare")["status"] == "ran"


def test_the_code_version_is_of_the_files_that_a_step_depends_on(tmp_path, monkeypatch):
    for name in ("models/net.py", "export/graph.py", "training/loop.py", "data/features.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n", encoding="utf-8")
    monkeypatch.setattr(pipelines, "PACKAGE", tmp_path)
    monkeypatch.setattr(pipelines, "CODE", {"export": ("models", "export", "data/features.py"), "train": ("training",)})
    before = {part: code_version(part) for part in ("export", "train")}
    (tmp_path / "export/graph.py").write_text("x = 2\n", encoding="utf-8")
    assert code_version("export") != before["export"]
    assert code_version("train") == before["train"]


def test_every_part_of_the_code_exists():
    for part, entries in pipelines.CODE.items():
        assert all((pipelines.PACKAGE / entry).exists() for entry in entries), part


def test_an_interrupted_step_goes_on_in_its_own_run(reopen, monkeypatch, no_children):
    run = reopen()
    perform_until(run, "plan")
    run.run.note("train:first", "whatever", "running")
    assert trains(run, "train:first", monkeypatch)


def test_resume_takes_the_newest_unfinished_run_of_the_same_config(reopen, tmp_path):
    settings = {"runs": tmp_path / "runs"}
    first, second, other = reopen(**settings), reopen(**settings), reopen("seed=8", **settings)
    assert reopen(resume=True, **settings).run.path == max(first.run.path, second.run.path)
    assert reopen("seed=8", resume=True, **settings).run.path == other.run.path
    assert reopen("seed=9", resume=True, **settings).run.path not in (first.run.path, second.run.path, other.run.path)


def test_a_directory_of_another_config_is_refused(reopen, finished_run, tmp_path):
    with pytest.raises(RunStateError, match="holds a run of another config"):
        reopen("seed=8", run_dir=finished_run.path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RunStateError, match="expected a directory"):
        reopen(run_dir=tmp_path / "file")


def test_a_run_directory_is_its_own_config(finished_run):
    config, path = read_config(finished_run.path, [])
    assert path == finished_run.path
    assert config == load_config(finished_run.config)
    assert read_config(finished_run.config, [])[1] is None


def test_what_cannot_fit_by_far_is_refused_before_data_is_prepared(reopen, tmp_path):
    pipeline = reopen("plan.budget=150MiB", runs=tmp_path / "runs", store=tmp_path / "store")
    with pytest.raises(DoesNotFitError, match=r"by estimate needs \d+ MiB .* too much.*raise the budget to"):
        pipeline.perform("prepare")
    assert not list((tmp_path / "store").rglob("*.npy"))
    assert pipeline.run.step("plan") is None


def test_steps_are_named_in_order(reopen, tmp_path):
    run = reopen(run_dir=tmp_path / "run")
    assert run.steps == STEPS
    assert run.steps_until("train") == STEPS[:4]
    assert run.steps_until("report") == STEPS


class Planner:
    """A planner that answers at once, and notes what it was asked."""

    def __init__(self, template: dict, fits=lambda _request: True) -> None:
        self.template, self.fits, self.asked = Plan.from_dict(template), fits, []

    def __call__(self, request, _on_probe):
        self.asked.append((request.stage, request.variant, request.budget_bytes))
        if not self.fits(request):
            raise DoesNotFitError(f"{request.stage} with {request.variant}")
        return replace(
            self.template, stage=request.stage, variant=request.variant, budget_bytes=request.budget_bytes,
            measured_peak_bytes=2**30, fingerprint=request.fingerprint,
        )  # fmt: skip


@pytest.fixture
def planned(reopen, finished_run, monkeypatch, tmp_path):
    """Plan with a quick planner and a store of its own."""

    def build(planner_fits, *overrides: str, **settings) -> tuple[Pipeline, Planner]:
        planner = Planner(finished_run.summary["plans"][0], planner_fits)
        monkeypatch.setattr(pipelines, "plan_stage", planner)
        run = reopen(*overrides, store=tmp_path / "store", runs=tmp_path / "runs", **settings)
        perform_until(run, "plan")
        return run, planner

    return build


def test_a_lighter_variant_is_taken_for_all_stages_where_the_wanted_one_does_not_fit(planned):
    run, planner = planned(
        lambda request: request.variant == "small" or request.stage == "first",
        "model.variants.small.d_model=4",
        "plan.variants=['small']",
    )
    assert [(stage, variant) for stage, variant, _ in planner.asked] == [
        ("first", "light"),
        ("second", "light"),
        ("first", "small"),
        ("second", "small"),
    ]
    assert [plan.variant for plan in run.plans] == ["small", "small"]


def test_a_variant_that_the_config_does_not_allow_is_never_taken(planned):
    with pytest.raises(DoesNotFitError, match="first with light"):
        planned(lambda request: request.variant == "small", "model.variants.small.d_model=4")


def test_a_stored_plan_serves_any_budget_that_holds_it(planned, monkeypatch):
    budgets = {"auto": 4 * 2**30}
    monkeypatch.setattr(pipelines, "resolve_budget", lambda text, *_args, **_options: budgets[text])
    _, planner = planned(lambda _: True, "plan.budget=auto")
    assert len(planner.asked) == 2
    budgets["auto"] = 3 * 2**30
    run, planner = planned(lambda _: True, "plan.budget=auto")
    assert planner.asked == []
    assert run.run.step("plan")["status"] == "reused"
    assert {plan.budget_bytes for plan in run.plans} == {3 * 2**30}
    budgets["auto"] = 2**30
    _, planner = planned(lambda _: True, "plan.budget=auto")
    assert len(planner.asked) == 2


def test_a_torn_stored_plan_is_planned_again(planned, tmp_path):
    planned(lambda _: True)
    for stored in (tmp_path / "store" / "plans").iterdir():
        stored.write_text(stored.read_text(encoding="utf-8")[:50], encoding="utf-8")
    run, planner = planned(lambda _: True)
    assert len(planner.asked) == 2
    assert run.run.step("plan")["status"] == "ran"
