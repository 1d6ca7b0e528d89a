"""The flow train-model against a real API and database: runs, artifacts, reuse, refusals, retries."""

import json
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate

from flows.train_model import train_model
from memfit.errors import ChildError, DataError, RunStateError
from memfit.run_directory import RunDirectory
from tasks import evaluate_model

pytestmark = pytest.mark.timeout(600)
BAD = [
    ({"budget": "12 bananas"}, "budget"),
    ({"device": "tpu"}, "device"),
    ({"overrides": ["stages.0.lr"]}, "overrides"),
    ({"config": "configs/smoke.yaml"}, "config"),
    ({"fresh": "perhaps"}, "fresh"),
]


@pytest.fixture
def artifacts(client):
    def read(flow_run_id) -> dict:
        wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        return {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=wanted)}

    return read


@pytest.fixture
def newest(client):
    def read():
        return max(client.read_flow_runs(), key=lambda run: run.created)

    return read


def run_folders(parameters: dict) -> set[Path]:
    return set((Path(parameters["runs"]) / "smoke").iterdir())


def test_flow_leaves_the_files_it_names(trained):
    assert {"config", "plan", "evaluation", "model", "card", "report"} <= set(trained.summary["files"])
    assert all(Path(file).is_file() for file in trained.summary["files"].values())
    assert {step["status"] for step in trained.summary["steps"]} == {"ran"}


def test_flow_run_is_completed_and_named_by_its_config(trained, client):
    flow_run = client.read_flow_run(trained.flow_run_id)
    assert flow_run.state_name == "Completed"
    assert flow_run.name.startswith("smoke 2")


def test_every_step_is_a_task_run_and_every_stage_one_of_its_own(trained, client, wait_until):
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[trained.flow_run_id]))

    def all_reported() -> list:
        runs = client.read_task_runs(flow_run_filter=wanted)
        return runs if len(runs) == 7 and all(run.state_name == "Completed" for run in runs) else []

    runs = sorted(wait_until(all_reported, 60, "seven completed task runs"), key=lambda run: run.start_time)
    names = [run.name if run.name.startswith("train-") else run.name.rsplit("-", 1)[0] for run in runs]
    assert names == [
        "prepare-data",
        "plan-memory",
        "train-first",
        "train-second",
        "evaluate-model",
        "export-model",
        "write-report",
    ]


def test_plan_artifact_shows_what_was_measured(trained, artifacts):
    rows = json.loads(artifacts(trained.flow_run_id)["plan"].data)
    plans = json.loads(Path(trained.summary["files"]["plan"]).read_text())["stages"]
    assert [row["stage"] for row in rows] == ["first", "second"]
    assert [row["peak MiB"] for row in rows] == [round(plan["measured_peak_bytes"] / 2**20, 1) for plan in plans]
    assert all(row["micro batch"] * row["accumulation steps"] >= row["global batch"] for row in rows)
    assert all(0 < row["peak MiB"] < row["budget MiB"] == 2048 for row in rows)


def test_metrics_artifact_has_the_model_above_its_baselines(trained, artifacts):
    rows = json.loads(artifacts(trained.flow_run_id)["metrics"].data)
    evaluation = json.loads(Path(trained.summary["files"]["evaluation"]).read_text())
    assert [row["of"] for row in rows] == ["model", *evaluation["baselines"]]
    assert rows[0]["mae"] == pytest.approx(evaluation["metrics"]["mae"], rel=1e-4)
    assert rows[1]["mae"] == pytest.approx(evaluation["baselines"][rows[1]["of"]]["mae"], rel=1e-4)


def test_progress_artifacts_end_at_100(trained, artifacts):
    found = artifacts(trained.flow_run_id)
    for stage in ("first", "second"):
        assert float(found[f"progress-{stage}"].data) == 100
        assert found[f"progress-{stage}"].description == f"stage {stage}: finished"


def test_report_artifact_links_report_and_bundle(trained, artifacts):
    text = artifacts(trained.flow_run_id)["report"].data
    assert f"({Path(trained.summary['files']['report']).as_uri()})" in text
    assert f"({Path(trained.summary['files']['model']).parent.as_uri()})" in text


def test_log_has_a_line_per_probe_and_per_epoch(trained, client, wait_until):
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[trained.flow_run_id]))

    def messages() -> list[str]:
        found = [log.message for log in client.read_logs(wanted, limit=200)]
        return found if any(line.startswith("[7/7] report") for line in found) else []

    lines = wait_until(messages, 60, "log of the last step")
    num_probes = sum(len(plan["probes"]) for plan in trained.summary["plans"])
    assert sum(" probe micro " in line or " confirm micro " in line for line in lines) == num_probes
    assert sum(line.startswith("epoch 1/1: train ") for line in lines) == 2


def test_second_run_reuses_everything_and_says_so(trained, artifacts, newest):
    summary = train_model(**trained.parameters)
    steps = [step for step in summary["steps"] if step["name"] != "report"]
    assert {step["status"] for step in steps} == {"reused"}
    assert {step["from_run"] for step in steps} == {"the store", trained.summary["run_id"]}
    assert summary["metrics"] == trained.summary["metrics"]
    progress = artifacts(newest().id)["progress-first"]
    assert progress.description == f"stage first: reused from {trained.summary['run_id']}"


@pytest.mark.parametrize(("bad", "name"), BAD)
def test_schema_refuses_bad_values(bad, name):
    schema = parameter_schema(train_model).model_dump_for_openapi()
    validate({"config": "configs/smoke.toml"}, schema, raise_on_error=True)
    with pytest.raises(ValidationError, match=name):
        validate({"config": "configs/smoke.toml", **bad}, schema, raise_on_error=True)


def test_schema_describes_every_parameter():
    properties = parameter_schema(train_model).model_dump_for_openapi()["properties"]
    assert len(properties) == 9
    assert all(len(entry["description"]) > 20 for entry in properties.values())


@pytest.mark.parametrize(("bad", "name"), BAD)
def test_flow_refuses_bad_values_before_it_makes_a_directory(prefect_api, tmp_path, root, bad, name):
    good = {"config": str(root / "configs" / "smoke.toml"), "runs": str(tmp_path / "runs")}
    with pytest.raises(ParameterTypeError, match=name):
        train_model(**{**good, **bad})
    assert not (tmp_path / "runs").exists()


def test_run_directory_in_use_is_refused_by_name(trained):
    run_dir = Path(trained.summary["run_dir"])
    with RunDirectory(run_dir).locked(), pytest.raises(RunStateError, match="in use by"):
        train_model(**trained.parameters, run_dir=str(run_dir))


def test_flow_run_that_starts_again_goes_on_in_its_directory(trained, monkeypatch):
    before = run_folders(trained.parameters)
    failures = iter([DataError("the source was away")])
    prepare = train_model.fn.__globals__["prepare_data"]

    def prepare_at_second_try(*where):
        for failure in failures:
            raise failure
        return prepare(*where)

    monkeypatch.setitem(train_model.fn.__globals__, "prepare_data", prepare_at_second_try)
    summary = train_model.with_options(retries=1, retry_delay_seconds=0)(**trained.parameters)
    assert run_folders(trained.parameters) - before == {Path(summary["run_dir"])}


@pytest.mark.parametrize(("error", "tries"), [(ChildError("died of SIGSEGV"), 3), (DataError("no such column"), 1)])
def test_only_a_dead_child_is_tried_again(prefect_api, monkeypatch, error, tries):
    calls = []

    def perform(*_where):
        calls.append(1)
        raise error

    monkeypatch.setattr(evaluate_model, "perform", perform)
    task = evaluate_model.evaluate_model.with_options(retry_delay_seconds=0)
    alone = flow(lambda: task("run", "store"), name="one-task")
    with pytest.raises(type(error), match=str(error)):
        alone()
    assert len(calls) == tries
