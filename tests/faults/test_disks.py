"""Disks that are full, or go away: a clear stop, and what was written before is intact."""

import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from memfit import files
from memfit.config import load_config
from memfit.errors import Resumable, RunStateError
from memfit.pipeline import Pipeline, open_run
from memfit.process import run_child
from memfit.training.checkpoint import newest


@pytest.fixture
def train_limited(importable, tmp_path):
    """Train in a child whose files the kernel ends at so many bytes, as a full disk does."""
    name = importable(Path(__file__).with_name("disk_targets.py"))

    def train(attempt, file_bytes: int) -> dict:
        payload = {"job": attempt.job, "file_bytes": file_bytes}
        return run_child(f"{name}:train", payload, log=tmp_path / "log").unwrap("training")

    return train


@pytest.mark.parametrize("file_bytes", [100, 3_000, 30_000, 100_000])
def test_a_write_that_the_disk_refuses_stops_clearly_and_a_resumed_run_ends_the_same(
    attempts, train_limited, file_bytes
):
    """The limit ends events, weights, or the optimizer's state; the checkpoint of step 5 lies before it."""
    whole, full = attempts("whole"), attempts("full")
    whole.run()
    largest = max(path.stat().st_size for path in (whole.checkpoints / "last").resolve().iterdir())
    assert largest > 100_000
    with pytest.raises(Resumable, match="checkpoint written"):
        full.run(stop_after=5)
    before = {path: path.read_bytes() for path in full.checkpoints.rglob("*") if path.is_file()}
    with pytest.raises(RunStateError, match=r"train:first: the disk refused: .* are intact"):
        train_limited(full, file_bytes)
    found = newest(full.checkpoints)
    assert found is not None
    assert found.record["step"] == 5
    assert {path: path.read_bytes() for path in before} == before
    assert not list(full.checkpoints.glob(".*tmp"))
    full.run()
    assert full.weights("last") == whole.weights("last")
    assert full.events() == whole.events()


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_said_before_training(attempts, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _folder: Usage(2**30, 2**30 - 1000, 1000))
    attempt = attempts()
    with pytest.raises(RunStateError, match=r"train:first: expected .* MiB free in .*, got 0 MiB\. Free some"):
        attempt.run()
    assert not (attempt.folder / "events.jsonl").exists()


# On a disk of its own


class Disk:
    """A small file system that can be filled and made read-only, as root may make one."""

    def __init__(self, path: Path, mib: int) -> None:
        self.path = path
        path.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path))

    @contextlib.contextmanager
    def full(self):
        filler = self.path / "filler"
        with filler.open("wb", buffering=0) as opened, contextlib.suppress(OSError):
            while True:
                opened.write(bytes(1 << 16))
        try:
            yield
        finally:
            filler.unlink()

    @contextlib.contextmanager
    def read_only(self):
        _mount("-o", "remount,ro", str(self.path))
        try:
            yield
        finally:
            _mount("-o", "remount,rw", str(self.path))


def _mount(*arguments: str) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system here")


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk", 64)
    yield made
    subprocess.run(["umount", "--lazy", str(made.path)], check=True)


@pytest.fixture
def start(tiny_config, tmp_path):
    def build(runs: Path, on_event=lambda _event: None) -> Pipeline:
        return open_run(load_config(tiny_config), runs=runs, store=tmp_path / "store", on_event=on_event)

    return build


def last_weights(run: Pipeline) -> list[bytes]:
    return [(run.run.path / run.stage_dir(i) / "checkpoints/last/model.safetensors").read_bytes() for i in (0, 1)]


@pytest.fixture
def whole(start, tmp_path):
    """The weights of a run on a disk that works, whose prepared data and plans the others take."""
    run = start(tmp_path / "whole")
    for step in run.steps[:4]:
        run.perform(step)
    return last_weights(run)


@pytest.mark.parametrize("state", ["full", "read_only"])
def test_a_disk_that_takes_nothing_stops_any_step_clearly_and_the_run_goes_on_later(whole, start, disk, state):
    run = start(disk.path / "runs")
    for step in run.steps:
        with getattr(disk, state)(), pytest.raises(RunStateError, match=r"the disk refused|MiB free in") as caught:
            run.perform(step)
        assert "traceback" not in str(caught.value).lower()
        run = open_run(run.config, runs=run.run.path.parent, store=run.store, run_dir=run.run.path)
        run.perform(step)
    assert last_weights(run) == whole


def test_a_directory_that_vanishes_is_a_clear_stop_and_the_stage_begins_anew(whole, start, tmp_path):
    def vanish(event):
        if event["event"] == "step" and event["step"] == 3:
            shutil.rmtree(run.run.path / run.stage_dir(0))

    run = start(tmp_path / "vanishing", vanish)
    run.perform("prepare")
    run.perform("plan")
    with pytest.raises(RunStateError, match=r"the disk refused: .*No such file or directory"):
        run.perform("train:first")
    run.on_event = lambda _event: None
    run.perform("train:first")
    run.perform("train:second")
    assert last_weights(run) == whole
