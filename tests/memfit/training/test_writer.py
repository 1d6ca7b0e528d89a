"""Checkpoints are written beside training, show the moment they were asked for, and hide no error."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from memfit.training import loop, worker, writer
from memfit.training.checkpoint import load_checkpoint
from memfit.training.events import EventLog
from memfit.training.writer import CheckpointWriter, room_for_copies
from tests.memfit.training.conftest import make_plan


@pytest.fixture
def held(monkeypatch):
    """Hold every write until the event is set; list the threads that wrote."""
    go, threads, original = threading.Event(), [], writer.save_checkpoint

    def save(*given):
        threads.append(threading.current_thread().name)
        assert go.wait(20)
        return original(*given)

    monkeypatch.setattr(writer, "save_checkpoint", save)
    return go, threads


def make(folder, room: int = 2**30) -> CheckpointWriter:
    folder.mkdir(exist_ok=True)
    return CheckpointWriter(folder, 2, "cpu", lambda: room)


def contents(step: int = 1, links=("last",)):
    weights = {"weight": torch.full((3, 4), float(step))}
    return weights, {"moment": torch.full((5,), float(step)), "numbers": [step]}, {"step": step}, links


def test_what_changes_after_the_call_is_not_in_the_checkpoint(tmp_path, held):
    go, threads = held
    given = contents()
    with make(tmp_path) as writing:
        writing.write(given, wait=False)
        given[0]["weight"].zero_()
        given[1]["moment"].zero_()
        given[1]["numbers"].append(2)
        assert not (tmp_path / "last").exists()
        go.set()
    read = load_checkpoint(tmp_path / "last")
    assert threads == ["checkpoint"]
    assert torch.equal(read.weights["weight"], torch.ones(3, 4))
    assert torch.equal(read.state["moment"], torch.ones(5))
    assert read.state["numbers"] == [1]


@pytest.mark.parametrize(("room", "wait"), [(2 * 48 + 20 - 1, False), (2**30, True)])
def test_without_room_or_asked_to_wait_it_is_durable_on_return(tmp_path, held, room, wait):
    """48 bytes of weights, which writing copies, and 20 of state."""
    go, threads = held
    go.set()
    writing = make(tmp_path, room)
    writing.write(contents(), wait=wait)
    assert threads == ["MainThread"]
    assert load_checkpoint(tmp_path / "last").record["step"] == 1


def test_a_second_write_waits_for_the_first_and_old_ones_go(tmp_path):
    with make(tmp_path) as writing:
        for step in range(1, 6):
            writing.write(contents(step, ("last", "best") if step == 2 else ("last",)), wait=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "step-2", "step-4", "step-5"]
    assert (tmp_path / "last").readlink().name == "step-5"


def test_what_a_write_raises_is_raised_once_where_training_looks_next(tmp_path, monkeypatch):
    def refuse(*_given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_checkpoint", refuse)
    writing = make(tmp_path)
    writing.write(contents(), wait=False)
    writing._thread.join()
    with pytest.raises(OSError, match="No space left"):
        writing.check()
    writing.check()
    writing.write(contents(), wait=False)
    with pytest.raises(OSError, match="No space left"), writing:
        pass


def test_an_error_of_training_is_not_hidden_by_one_of_the_write(tmp_path, monkeypatch):
    def refuse(*_given):
        raise OSError(28, "No space left on device")

    def train() -> None:
        with make(tmp_path) as writing:
            writing.write(contents(), wait=False)
            raise ValueError("training")

    monkeypatch.setattr(writer, "save_checkpoint", refuse)
    with pytest.raises(ValueError, match="training"):
        train()


def test_a_write_that_runs_out_of_memory_is_repeated(tmp_path, monkeypatch):
    original, calls = writer.save_checkpoint, []

    def once(*given):
        calls.append(given)
        if len(calls) == 1:
            raise MemoryError
        return original(*given)

    monkeypatch.setattr(writer, "save_checkpoint", once)
    with make(tmp_path) as writing:
        writing.write(contents(), wait=False)
    assert load_checkpoint(tmp_path / "last").record["step"] == 1


def test_where_training_needs_the_memory_nothing_is_copied_any_more(tmp_path, held):
    go, threads = held
    writing = make(tmp_path)
    writing.write(contents(1), wait=False)
    threading.Timer(0.05, go.set).start()
    assert writing.give_way()
    assert load_checkpoint(tmp_path / "last").record["step"] == 1
    assert not writing.give_way()
    writing.write(contents(2), wait=False)
    assert threads == ["checkpoint", "MainThread"]


def test_a_copy_that_runs_out_is_not_needed(tmp_path, monkeypatch):
    def refuse(_tensor):
        raise MemoryError

    monkeypatch.setattr(writer, "_on_host", refuse)
    writing = make(tmp_path)
    writing.write(contents(), wait=False)
    assert load_checkpoint(tmp_path / "last").record["step"] == 1


def test_room_is_what_a_cpu_budget_leaves_beside_the_peak(monkeypatch):
    monkeypatch.setattr(writer.enforcement, "peak_bytes", lambda _device: 400)
    plan = make_plan(budget_bytes=1000, measured_peak_bytes=500)
    assert room_for_copies(plan) == 470
    monkeypatch.setattr(writer.enforcement, "peak_bytes", lambda _device: 600)
    assert room_for_copies(plan) == 370
    assert room_for_copies(make_plan(device="cuda")) > 2**20


# What training waits for


@pytest.mark.parametrize("stops", [(), (23,)], ids=["whole", "resumed"])
@pytest.mark.parametrize(
    ("owner", "name", "waits"), [(writer, "save_checkpoint", 3), (EventLog, "sync", 3), (CheckpointWriter, "finish", 4)]
)
def test_time_that_training_waits_for_checkpoints_is_counted_over_all_attempts(
    attempts, monkeypatch, owner, name, waits, stops
):
    """Three epochs, by a clock on which each call takes 100 s; what a stop's own checkpoint takes cannot be in it."""
    original, waited = getattr(owner, name), []

    def slowly(*given):
        waited.append(100)
        return original(*given)

    monkeypatch.setattr(owner, name, slowly)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(waited)))
    monkeypatch.setattr(worker, "room_for_copies", lambda _plan: 0)
    result = attempts(stage={"epochs": 3}).run_interrupted(*stops)
    assert 100 * waits <= result["stall_seconds"] < 100 * waits + 100
    assert result["stall_seconds"] <= result["seconds"]
