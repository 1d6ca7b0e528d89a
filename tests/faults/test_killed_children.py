"""Training children that are killed or hang: the pipeline starts them again, and the end is the same."""

import contextlib
import itertools
import json
import os
import random
import signal
import threading
from pathlib import Path

import pytest

from memfit import pipeline as pipelines
from memfit.config import load_config
from memfit.errors import ChildOutOfMemoryError
from memfit.pipeline import Pipeline, open_run
from memfit.process import Outcome


def child_pids() -> list[int]:
    """List the children of this process that train."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(stat[1]) == os.getpid() and b"memfit.process" in command and stat[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.fixture
def start(tiny_config, tmp_path):
    def build(name: str, *overrides: str, on_event=lambda _event: None) -> Pipeline:
        overrides = ("stages.0.checkpoint_every_steps=3", *overrides)
        config = load_config(tiny_config, overrides)
        return open_run(config, runs=tmp_path / name, store=tmp_path / "store", on_event=on_event)

    return build


def train(run: Pipeline) -> tuple[bytes, bytes]:
    """Prepare, plan and train the first stage; return its weights."""
    for step in ("prepare", "plan", "train:first"):
        run.perform(step)
    checkpoints = run.run.path / run.stage_dir(0) / "checkpoints"
    return tuple((checkpoints / link / "model.safetensors").read_bytes() for link in ("last", "best"))


def test_a_child_that_is_killed_goes_on_from_its_checkpoint_to_the_same_weights(start):
    whole = train(start("whole"))
    events = []

    def kill(event):
        events.append(event)
        steps = [each["step"] for each in events if each["event"] == "step"]
        restarts = sum(each["event"] == "restart" for each in events)
        if event["event"] == "step" and steps[-1] == (5, 11)[min(restarts, 1)] and restarts < 2:
            for pid in child_pids():
                os.kill(pid, signal.SIGKILL)

    assert train(start("killed", on_event=kill)) == whole
    restarts = [event for event in events if event["event"] == "restart"]
    assert [event["message"] for event in restarts] == ["died of SIGKILL"] * 2
    assert not [event for event in events if event["event"] == "layout"]


def test_kills_at_random_moments_change_nothing(start):
    """Of as many training children as MEMFIT_KILLS says: while they import, train, evaluate, write checkpoints, end."""
    wanted, killed, draw = int(os.environ.get("MEMFIT_KILLS", "25")), list[int](), random.Random(7)
    whole = start("whole", "stages.0.checkpoint_every_steps=1")
    expected = train(whole), steps(whole)
    for number in itertools.count():
        if len(killed) >= wanted:
            break
        ended = threading.Event()

        def kill(ended=ended):
            while not ended.wait(draw.uniform(0.1, 5.0)):
                for pid in child_pids():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)

        run = start(f"killed-{number}", "stages.0.checkpoint_every_steps=1")
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            got = None
            while got is None:
                with contextlib.suppress(ChildOutOfMemoryError):  # killed too often in a row: the next attempt goes on
                    got = train(run)
        finally:
            ended.set()
            killer.join()
        assert (got, steps(run)) == expected


def steps(run: Pipeline) -> list[tuple[int, float, float]]:
    lines = (run.run.path / run.stage_dir(0) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return [(e["step"], e["losses"]["total"], e["gradient_norm"]) for e in events if e["event"] == "step"]


def test_one_that_the_kernel_killed_for_want_of_memory_goes_on_with_less(start, monkeypatch):
    events, kills = [], iter([0, 1, 1, 1, 1, 1])  # at the start, after the death, for the next

    def kill(event):
        events.append(event)
        if event["event"] == "step" and event["step"] == 5 and not any(e["event"] == "restart" for e in events):
            for pid in child_pids():
                os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(pipelines, "oom_kills", lambda: next(kills))
    run = start("killed", on_event=kill)
    train(run)
    (change,) = [event for event in events if event["event"] == "layout"]
    assert change["micro_batch_size"] == -(-run.plans[0].micro_batch_size // 2)
    assert "SIGKILL" in change["message"]
    assert run.plans[0].in_flight


def test_a_child_that_dies_again_and_again_without_a_checkpoint_is_given_up(start, monkeypatch):
    run = start("dying")
    for step in ("prepare", "plan"):
        run.perform(step)
    started = []

    def die(target, job, **_settings):
        started.append(list(job["shortages"]))
        return Outcome("oom", message="died of SIGABRT", error="SIGABRT", phase="train")

    monkeypatch.setattr(pipelines, "run_child", die)
    with pytest.raises(ChildOutOfMemoryError, match="SIGABRT"):
        run.perform("train:first")
    assert [len(shortages) for shortages in started] == [0, 1, 2, 3]
