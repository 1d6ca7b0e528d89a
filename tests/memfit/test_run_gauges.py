"""What an operator's Prometheus reads of the last run of a config."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from prometheus_client.parser import text_string_to_metric_families

from memfit.errors import ChildError, DoesNotFitError, Resumable, RunStateError
from memfit.files import read_json, write_json
from memfit.pipeline import open_run, read_config
from memfit.run_directory import RunDirectory
from memfit.run_gauges import GAUGES, RunGauges


def gauges(file) -> dict:
    """Read a .prom file: {(name, the labels but for config and workload): value}."""
    return {
        (sample.name.removeprefix("memfit_run_"), *(sorted(set(sample.labels.items()) - OWN))): sample.value
        for family in text_string_to_metric_families(file.read_text())
        for sample in family.samples
    }


OWN = {("config", "tiny"), ("workload", "series")}


def state_of(file) -> str:
    found = gauges(file)
    states = {state: found["state", ("state", state)] for state in ("running", "finished", "failed", "stopped")}
    assert sorted(states.values()) == [0, 0, 0, 1]
    return max(states, key=lambda state: states[state])


@pytest.fixture
def pipeline(tiny_config, tmp_path):
    return open_run(read_config(tiny_config, [])[0], runs=tmp_path / "runs", store=tmp_path / "store")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "runs/metrics/tiny.prom"


def test_a_finished_run_shows_what_its_files_say(finished_run):
    found = gauges(finished_run.runs.parent / "tiny.prom")
    summary = finished_run.summary
    assert state_of(finished_run.runs.parent / "tiny.prom") == "finished"
    assert found["exit_status",] == 0
    assert found["end_time_seconds",] - found["start_time_seconds",] == pytest.approx(found["duration_seconds",])
    assert found["duration_seconds",] >= sum(step["seconds"] for step in summary["steps"])
    assert found["step_duration_seconds", ("step", "train:first")] == summary["steps"][2]["seconds"]
    for number, plan in enumerate(summary["plans"], 1):
        stage = ("stage", plan["stage"])
        assert found["stage_budget_bytes", stage] == plan["budget_bytes"]
        assert found["stage_planned_peak_bytes", stage] == plan["measured_peak_bytes"]
        log = (finished_run.path / f"stages/{number}-{plan['stage']}/events.jsonl").read_text().splitlines()
        epochs = [event for event in map(json.loads, log) if event["event"] == "epoch"]
        assert found["stage_peak_bytes", stage] == max(epoch["memory"]["peak_bytes"] for epoch in epochs)
    assert found["score", ("metric", "mae")] == summary["metrics"]["mae"]
    persistence = (("baseline", "persistence"), ("metric", "mae"))
    assert found[("baseline_score", *persistence)] == summary["baselines"]["persistence"]["mae"]
    assert found["gate_passed",] == summary["gate"]["passed"]


def test_every_gauge_is_explained_and_in_base_units(finished_run):
    families = list(text_string_to_metric_families((finished_run.runs / "metrics/tiny.prom").read_text()))
    assert {family.name for family in families} == {f"memfit_run_{name}" for name in GAUGES}
    assert all(family.type == "gauge" and family.documentation for family in families)
    assert all(set(sample.labels.items()) >= OWN for family in families for sample in family.samples)


@pytest.mark.parametrize(
    ("error", "state", "exit_status"),
    [
        (None, "finished", 0),
        (DoesNotFitError("too large"), "failed", 4),
        (ChildError("died"), "failed", 8),
        (ZeroDivisionError("a defect"), "failed", 1),
        (Resumable("stopped"), "stopped", 75),
        (KeyboardInterrupt(), "stopped", 75),
    ],
)
def test_the_file_says_how_the_run_ended(pipeline, file, error, state, exit_status):
    with suppress(*[type(error)] if error else []), pipeline.locked():
        assert state_of(file) == "running"
        assert ("exit_status",) not in gauges(file)
        assert ("end_time_seconds",) not in gauges(file)
        if error is not None:
            raise error
    assert state_of(file) == state
    assert gauges(file)["exit_status",] == exit_status


def test_a_step_performed_by_another_opener_of_the_directory_is_shown(pipeline, file, tmp_path):
    with pipeline.locked():
        started = gauges(file)["start_time_seconds",]
        elsewhere = tmp_path / "elsewhere"  # as a task has it: the directory alone
        same = open_run(pipeline.config, runs=elsewhere, store=pipeline.store, run_dir=pipeline.run.path)
        same.perform("prepare")
        found = gauges(file)
        assert found["step_duration_seconds", ("step", "prepare")] > 0
        assert found["start_time_seconds",] == started
        assert state_of(file) == "running"
    assert not elsewhere.exists()
    assert ("step_duration_seconds", ("step", "prepare")) in gauges(file)


def test_the_folder_is_the_environment_s_if_it_names_one(pipeline, file, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMFIT_METRICS", str(tmp_path / "collector"))
    with pipeline.locked():
        pass
    assert state_of(tmp_path / "collector/tiny.prom") == "finished"
    assert not file.exists()
    assert list((tmp_path / "collector").iterdir()) == [tmp_path / "collector/tiny.prom"]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(pipeline, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("MEMFIT_METRICS", str(tmp_path / "taken"))
    with pytest.raises(RunStateError, match="Set MEMFIT_METRICS to a folder"), pipeline.locked():
        pytest.fail("it began")


def test_a_folder_that_is_lost_on_the_way_costs_a_warning_and_not_the_run(tiny_config, tmp_path, file):
    said = []
    config = read_config(tiny_config, [])[0]
    pipeline = open_run(config, runs=tmp_path / "runs", store=tmp_path / "store", on_event=said.append)
    with pipeline.locked():
        file.unlink()
        file.parent.rmdir()
        file.parent.write_text("")
    assert [event["event"] for event in said] == ["warning"]
    assert "metrics were not written" in said[0]["message"]


def test_the_end_of_an_earlier_run_does_not_hide_a_later_one(tiny_config, tmp_path, file):
    config = read_config(tiny_config, [])[0]
    first = open_run(config, runs=tmp_path / "runs", store=tmp_path / "store", run_dir=tmp_path / "first")
    later = open_run(config, runs=tmp_path / "runs", store=tmp_path / "store", run_dir=tmp_path / "later")
    with first.locked(), pytest.raises(DoesNotFitError), later.locked():
        raise DoesNotFitError("too large")
    assert state_of(file) == "failed"


@pytest.mark.parametrize("content", ["", "memfit_run_start_time_seconds{", "\0"])
def test_a_torn_file_is_written_anew(pipeline, file, content):
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pipeline.locked():
        assert state_of(file) == "running"


@pytest.mark.parametrize("document", [{"stages": [{}]}, {"stages": 7}, {"stages": [[]]}])
def test_a_torn_plan_leaves_the_state(pipeline, file, document):
    write_json(pipeline.run.path / "plan.json", document)
    with pipeline.locked():
        assert state_of(file) == "running"


def test_a_run_that_is_refused_as_its_directory_is_in_use_leaves_the_owner_s_figures(pipeline, file):
    with pipeline.locked():
        before = file.read_bytes()
        with pytest.raises(RunStateError, match="in use by"), pipeline.locked():
            pytest.fail("it began")
        assert file.read_bytes() == before


def test_news_of_a_step_refresh_a_file_that_is_old_and_no_other(pipeline, file, monkeypatch):
    with pipeline.locked():
        first = gauges(file)["last_update_time_seconds",]
        pipeline._gauges.beat()
        assert gauges(file)["last_update_time_seconds",] == first
        monkeypatch.setattr("memfit.run_gauges.BEAT_SECONDS", 0.0)
        pipeline._gauges.beat()
        assert gauges(file)["last_update_time_seconds",] > first


def test_who_performs_steps_without_beginning_a_run_writes_nothing(tmp_path):
    run = RunDirectory.create(tmp_path / "run", "tiny", {})
    RunGauges(run, dict(OWN), lambda _event: None).update()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_budget_that_is_too_small_is_a_failure_with_its_exit_status(tiny_config, tmp_path, file):
    command = [sys.executable, "-m", "memfit", "plan", str(tiny_config), "--budget", "40MiB"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert state_of(file) == "failed"
    assert gauges(file)["exit_status",] == 4
    assert not any(name == "score" for name, *_ in gauges(file))


@pytest.mark.end_to_end
@pytest.mark.parametrize(("stop", "state"), [(signal.SIGTERM, "stopped"), (signal.SIGKILL, "running")])
def test_a_run_that_is_stopped_says_so_and_one_that_is_killed_cannot(tiny_config, tmp_path, file, stop, state):
    stages = "stages=[{name='long', epochs=25, global_batch_size=16, lr=1e-3, patience=0}]"
    command = [sys.executable, "-m", "memfit", "train", str(tiny_config), "--set", stages, "--run-dir", "run"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        events, end = tmp_path / "run/stages/1-long/events.jsonl", time.monotonic() + 120
        while not (events.exists() and events.read_bytes().count(b'"event": "step"') >= 3):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(process.pid, stop)
        process.wait(timeout=60)
    assert state_of(file) == state
    assert gauges(file).get(("exit_status",)) == (75 if state == "stopped" else None)
    assert read_json(tmp_path / "run/run.json")["attempt"]["gauges"] == str(file)
