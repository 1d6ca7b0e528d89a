"""Disks that are full, or go away: a clear stop, and what was written before is intact."""

from pathlib import Path
from typing import NamedTuple

import pytest

from memfit import files
from memfit.errors import Resumable, RunStateError
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
