"""One run, one directory: its record, its lock, and what it takes over from earlier runs."""

import json
import os
import subprocess
import sys

import pytest

from memfit.errors import RunStateError
from memfit.run_directory import RunDirectory, environment, new_run_id, unfinished


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs" / "tiny"


def create(path, config: str = "same") -> RunDirectory:
    run = RunDirectory.create(path, "tiny", {"data_dir": None})
    (path / "config.toml").write_text(config, encoding="utf-8")
    return run


def test_ids_sort_by_time_and_do_not_collide(monkeypatch):
    monkeypatch.setattr("time.time", iter([1000.0, 1000.001, 1000.25, 1061.0, 90_000.0]).__next__)
    ids = [new_run_id() for _ in range(5)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 5
    assert all(run_id.endswith(f"-{os.getpid()}") for run_id in ids)


def test_the_record_is_read_back_and_a_step_stands_where_it_was_noted(runs):
    run = create(runs / "a")
    run.note("prepare", "f1", "running")
    run.note("prepare", "f1", "ran", seconds=1.5)
    run.note("plan", "f2", "reused", from_run="b")
    again = RunDirectory(runs / "a")
    assert again.run_id == "a"
    assert [step["name"] for step in again.record["steps"]] == ["prepare", "plan"]
    assert again.step("prepare")["seconds"] == 1.5
    assert again.step("plan")["from_run"] == "b"
    assert again.step("export") is None


@pytest.mark.parametrize(
    ("status", "fingerprint", "done"),
    [("ran", "f", True), ("reused", "f", True), ("running", "f", False), ("ran", "g", False)],
)
def test_a_step_is_done_when_it_ended_with_the_same_fingerprint(runs, status, fingerprint, done):
    run = create(runs / "a")
    run.note("plan", fingerprint, status)
    assert run.done("plan", "f") is done


@pytest.mark.parametrize("content", ["", "{"])
def test_a_torn_record_is_begun_again_where_there_is_a_config(runs, content):
    create(runs / "a")
    (runs / "a" / "run.json").write_text(content, encoding="utf-8")
    assert RunDirectory(runs / "a").record == {}
    (runs / "a" / "config.toml").unlink()
    with pytest.raises(RunStateError, match=r"run\.json: not JSON"):
        RunDirectory(runs / "a")


@pytest.mark.parametrize(
    ("damage", "done"),
    [
        (lambda folder: (folder / "weights").write_text("b", encoding="utf-8"), False),
        (lambda folder: (folder / "weights").unlink(), False),
        (lambda folder: (folder / "more").write_text("", encoding="utf-8"), True),
        (lambda folder: None, True),
    ],
)
def test_a_step_is_done_while_what_it_made_is_as_it_was(runs, damage, done):
    run = create(runs / "a")
    finish(run)
    damage(run.path / "stages/1-first")
    assert RunDirectory(run.path).done("train:first", "f") is done


@pytest.mark.parametrize("content", ["[1]", '{"steps": 3}'])
def test_another_record_is_named(runs, content):
    create(runs / "a")
    (runs / "a" / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunStateError, match=r"run\.json"):
        RunDirectory(runs / "a")


def finish(run: RunDirectory, step: str = "train:first", output: str = "stages/1-first") -> None:
    folder = run.path / output
    folder.mkdir(parents=True)
    (folder / "weights").write_text(run.run_id, encoding="utf-8")
    (folder / "last").symlink_to("weights")
    run.note(step, "f", "ran", outputs=[output])


def test_finds_the_newest_run_that_finished_the_step(runs):
    for name in ("a", "b", "c"):
        finish(create(runs / name))
    create(runs / "d").note("train:first", "f", "running")
    create(runs / "e").note("train:first", "other", "ran")
    found = create(runs / "f").find_earlier("train:first", "f", ["stages/1-first"])
    assert found.run_id == "c"
    assert found.run_dir.name == "c"


def test_a_run_whose_outputs_are_gone_is_passed_over(runs):
    for name in ("a", "b"):
        finish(create(runs / name))
    (runs / "b" / "stages").rename(runs / "b" / "elsewhere")
    assert create(runs / "c").find_earlier("train:first", "f", ["stages/1-first"]).run_id == "a"


def test_strangers_beside_a_run_do_not_disturb(runs, monkeypatch):
    finish(create(runs / "a"))
    (runs / "file").write_text("x", encoding="utf-8")
    for name, content in (("torn", "{"), ("list", "[]"), ("foreign", '{"steps": [{}]}')):
        (runs / name).mkdir()
        (runs / name / "run.json").write_text(content, encoding="utf-8")
    (runs / "locked away").mkdir()
    original = type(runs).exists

    def exists(path, **settings):
        if "locked away" in str(path):
            raise PermissionError(13, "Permission denied")
        return original(path, **settings)

    monkeypatch.setattr(type(runs), "exists", exists)
    assert create(runs / "z").find_earlier("train:first", "f", ["stages/1-first"]).run_id == "a"


def test_reuse_of_reuse_names_the_run_that_did_the_work(runs):
    finish(create(runs / "a"))
    second = create(runs / "b")
    second.take(second.find_earlier("train:first", "f", ["stages/1-first"]), ["stages/1-first"])
    second.note("train:first", "f", "reused", from_run="a")
    assert create(runs / "c").find_earlier("train:first", "f", ["stages/1-first"]).run_id == "a"


@pytest.mark.parametrize("links", [True, False])
def test_takes_folders_and_files_over_and_keeps_them_when_the_other_run_goes(runs, monkeypatch, links):
    first = create(runs / "a")
    finish(first)
    (runs / "a" / "evaluation.json").write_text("{}", encoding="utf-8")
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    second = create(runs / "b")
    outputs = ["stages/1-first", "evaluation.json"]
    second.take(second.find_earlier("train:first", "f", outputs), outputs)
    assert (runs / "b" / "stages/1-first/last").readlink().name == "weights"
    (runs / "a" / "stages/1-first/weights").unlink()
    assert (runs / "b" / "stages/1-first/last").read_text(encoding="utf-8") == "a"
    assert (runs / "b" / "evaluation.json").read_text(encoding="utf-8") == "{}"


HOLD = """
import sys
from pathlib import Path
from memfit.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_locked_directory_names_its_owner_and_is_free_again_after_a_kill(runs):
    run = create(runs / "a")
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(RunStateError, match=rf"in use by process {owner.pid} .*alive") as raised, run.locked():
            pass
        assert str(run.path) in str(raised.value)
        owner.kill()
    with run.locked():
        assert json.loads((run.path / ".lock").read_text(encoding="utf-8"))["pid"] == os.getpid()
    with run.locked():
        pass


def test_finds_the_run_to_resume(runs):
    for name, config in (("a", "same"), ("b", "same"), ("c", "other")):
        create(runs / name, config)
    assert unfinished(runs, "same") == runs / "b"
    assert unfinished(runs, "absent") is None
    assert unfinished(runs.parent / "nowhere", "same") is None
    newest = RunDirectory(runs / "b")
    newest.record["finished"] = "2024-01-01T00:00:00Z"
    newest.save()
    assert unfinished(runs, "same") is None


def test_what_is_no_run_is_not_resumed(runs):
    create(runs / "a")
    (runs / "torn").mkdir()
    (runs / "torn" / "config.toml").write_text("sa", encoding="utf-8")
    (runs / "torn" / "run.json").write_text("{", encoding="utf-8")
    (runs / "never").mkdir()
    (runs / "never" / "config.toml").write_text("same", encoding="utf-8")
    (runs / "zzz").write_text("a file", encoding="utf-8")
    assert unfinished(runs, "same") == runs / "a"
    (runs / "torn" / "config.toml").write_text("same", encoding="utf-8")
    assert unfinished(runs, "same") == runs / "torn"  # only its record is lost


def test_the_environment_says_what_it_ran_on():
    found = environment()
    assert {"python", "torch", "platform", "cpu", "num_threads", "memory_bytes"} <= set(found)
    assert found["memory_bytes"] > 2**28
    json.dumps(found)
