"""A stage that was stopped or killed ends as the uninterrupted one does, to the last bit."""

import os
import random
import re

import numpy as np
import pytest
import torch

from memfit.errors import MemfitError, Resumable
from memfit.memory import enforcement
from memfit.training import checkpoint, worker
from memfit.training.stage import sample_order
from memfit.workloads.registry import load_workload
from memfit.workloads.series import SeriesWorkload


def disturb() -> None:
    """Whatever ran in between must not matter."""
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002  (the generator that libraries draw from)
    torch.manual_seed(99)


def assert_same(resumed, whole) -> None:
    for link in ("last", "best"):
        assert (resumed.checkpoints / link).readlink() == (whole.checkpoints / link).readlink()
        assert resumed.weights(link) == whole.weights(link)
    assert resumed.events() == whole.events()


@pytest.mark.parametrize(
    ("precision", "stops"),
    [("fp32", (3,)), ("fp32", (10,)), ("fp32", (13, 1, 7)), ("bf16", (13,))],
)
def test_a_stopped_stage_goes_on_bit_for_bit(attempts, precision, stops):
    """Dropout is on; 10 steps are an epoch, so the stops lie inside epochs and on a border."""
    plan = {"precision": precision}
    whole, resumed = attempts("whole", plan=plan), attempts("resumed", plan=plan)
    whole.run()
    assert len(whole.of_kind("step")) == 30
    for stop in stops:
        disturb()
        with pytest.raises(Resumable):
            resumed.run(stop_after=stop)
    disturb()
    resumed.run()
    assert_same(resumed, whole)
    assert [event["event"] for event in resumed.emitted].count("resume") == len(stops)


def test_a_loss_scale_that_fell_goes_on_from_where_it_was(attempts):
    overflowing = {"plan": {"precision": "fp16"}, "loss": {"value_weight": 1e3}}
    whole, resumed = attempts("whole", **overflowing), attempts("resumed", **overflowing)
    whole.run()
    scales = [event["loss_scale"] for event in whole.of_kind("step")]
    assert scales[14] < scales[0]
    resumed.run_interrupted(15)
    assert_same(resumed, whole)


@pytest.mark.parametrize("schedule", [{"name": "step"}, {"name": "plateau", "patience": 0}, {"name": "constant"}])
@pytest.mark.parametrize("optimizer", [{"name": "sgd", "lr": 0.01, "momentum": 0.9}, {"name": "rmsprop", "lr": 1e-3}])
def test_every_optimizer_and_schedule_goes_on_where_it_was(attempts, schedule, optimizer):
    stage = {"schedule": schedule, "optimizer": optimizer, "epochs": 2}
    whole, resumed = attempts("whole", stage=dict(stage)), attempts("resumed", stage=dict(stage))
    whole.run()
    resumed.run_interrupted(14)
    assert_same(resumed, whole)


def test_checkpointed_blocks_resume_too(attempts):
    whole = attempts("whole", plan={"checkpointing": "blocks"}, stage={"epochs": 1})
    resumed = attempts("resumed", plan={"checkpointing": "blocks"}, stage={"epochs": 1})
    plain = attempts("plain", stage={"epochs": 1})
    whole.run()
    plain.run()
    resumed.run_interrupted(4)
    assert_same(resumed, whole)
    assert whole.weights("last") == plain.weights("last")


def test_a_killed_stage_goes_on_from_its_last_checkpoint(attempts):
    whole, killed = attempts("whole"), attempts("killed")
    whole.run()
    steps = iter(range(10**6))

    def kill() -> bool:
        if next(steps) == 15:
            raise SystemError("as if killed")
        return False

    with pytest.raises(SystemError):
        killed.run(ask=kill)
    assert killed.of_kind("step")[-1]["step"] == 16
    disturb()
    killed.run()
    assert killed.emitted[-1]["event"] == "stage_end"
    assert_same(killed, whole)


def test_a_finished_stage_that_is_run_again_changes_nothing(attempts):
    stage = attempts()
    first = stage.run()
    before = stage.events(), stage.weights("last")
    again = stage.run()
    assert (stage.events(), stage.weights("last")) == before
    assert {key: again[key] for key in ("reason", "epochs", "steps", "best_epoch")} == {
        key: first[key] for key in ("reason", "epochs", "steps", "best_epoch")
    }


def test_a_corrupt_checkpoint_is_passed_over_with_a_warning(attempts):
    stage = {"checkpoint_every_epochs": 1}
    whole, torn = attempts("whole", stage=dict(stage)), attempts("torn", stage=dict(stage))
    whole.run()
    with pytest.raises(Resumable):
        torn.run(stop_after=24)
    weights = torn.checkpoints / "last" / "model.safetensors"
    assert torn.checkpoints.joinpath("last").readlink().name == "step-24"
    weights.write_bytes(weights.read_bytes()[:-100])
    torn.run()
    (warning,) = [event["message"] for event in torn.emitted if event["event"] == "warning"]
    assert re.search(r"step-24.*it is corrupt.*Using the one before", warning)
    resumed = [event for event in torn.emitted if event["event"] == "resume"]
    assert [event["step"] for event in resumed] == [20]
    assert_same(torn, whole)


def test_a_torn_event_log_goes_back_to_a_checkpoint_that_it_reaches(attempts):
    whole, torn = (
        attempts("whole", stage={"checkpoint_every_steps": 4}),
        attempts("torn", stage={"checkpoint_every_steps": 4}),
    )
    whole.run()
    with pytest.raises(Resumable):
        torn.run(stop_after=24)
    os.truncate(torn.folder / "events.jsonl", (torn.folder / "events.jsonl").stat().st_size - 10)
    torn.run()
    assert [event["step"] for event in torn.emitted if event["event"] == "resume"] == [20]
    assert_same(torn, whole)
    os.truncate(torn.folder / "events.jsonl", 0)
    torn.run()
    assert_same(torn, whole)


def test_torn_best_weights_are_trained_again(attempts):
    """The third epoch scores worse: what it ends with cannot stand for the best."""
    stage = {"epochs": 6, "optimizer": {"name": "adamw", "lr": 0.1, "weight_decay": 0.0}}
    whole, torn = attempts("whole", stage=dict(stage)), attempts("torn", stage=dict(stage))
    whole.run()
    with pytest.raises(Resumable):
        torn.run(stop_after=55)
    best = (torn.checkpoints / "best").resolve()
    assert best != (torn.checkpoints / "last").resolve()
    os.truncate(best / "model.safetensors", 99)
    torn.run()
    (message, *_) = [event["message"] for event in torn.emitted if event["event"] == "warning"]
    assert best.name in message
    assert_same(torn, whole)


def test_a_kill_between_the_best_checkpoint_and_its_link_loses_nothing(attempts, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(_link, _target):
        raise Killed

    whole, killed = attempts("whole"), attempts("killed")
    monkeypatch.setattr(worker, "room_for_copies", lambda _plan: 0)
    whole.run()
    monkeypatch.setattr(checkpoint, "point", kill)
    with pytest.raises(Killed):
        killed.run()
    assert [path.name for path in killed.checkpoints.iterdir()] == ["step-10"]
    monkeypatch.undo()
    monkeypatch.setattr(enforcement, "enforce_budget", lambda *_: None)
    killed.run(stop_after=None)
    assert_same(killed, whole)
    assert (killed.checkpoints / "best").readlink() == (whole.checkpoints / "best").readlink()


def test_checkpoints_of_another_config_are_set_aside_with_a_warning(attempts):
    attempts().run()
    before = (attempts().checkpoints / "last" / "model.safetensors").read_bytes()
    earlier = (attempts().folder / "events.jsonl").read_bytes()
    (attempts().folder.parent / "link").hardlink_to(attempts().folder / "events.jsonl")
    again, alone = attempts(fingerprint="other", seed=6), attempts("alone", fingerprint="other", seed=6)
    again.run()
    alone.run()
    messages = [event["message"] for event in again.emitted if event["event"] == "warning"]
    assert all("expected a checkpoint of this stage (other)" in message for message in messages)
    aside = [path / "model.safetensors" for path in again.checkpoints.glob("foreign-step-*")]
    assert len(aside) == len(messages)
    assert before in [path.read_bytes() for path in aside]
    assert (again.folder.parent / "link").read_bytes() == earlier
    assert_same(again, alone)


def test_the_seed_decides_and_nothing_else_does(attempts):
    first, second, other = attempts("a"), attempts("b"), attempts("c", seed=6)
    first.run()
    disturb()
    second.run()
    other.run()
    assert first.weights("last") == second.weights("last")
    assert first.weights("last") != other.weights("last")


def test_bad_steps_before_a_stop_count_towards_those_that_end_training(attempts, monkeypatch):
    """Steps 4, 5 and 6 have losses that are not finite, and no others; the stop comes after the fifth."""
    original = SeriesWorkload.batch

    def batch(self, split, indices):
        found = original(self, split, indices)
        if split == "train" and indices.tolist() in bad:
            found["history"][:] = float("nan")
        return found

    whole, resumed = attempts("whole"), attempts("resumed")
    num_train = load_workload(whole.job).num_samples("train")
    order = sample_order(num_train, seed=whole.job["seed"], stage=0, epoch=0)
    bad = [order[16 * step : 16 * step + 16].tolist() for step in (3, 4, 5)]
    monkeypatch.setattr(SeriesWorkload, "batch", batch)
    with pytest.raises(MemfitError, match="not finite in 3 steps up to step 6") as uninterrupted:
        whole.run()
    with pytest.raises(Resumable):
        resumed.run(stop_after=5)
    with pytest.raises(MemfitError) as raised:
        resumed.run()
    assert f"first such batch was samples {bad[0]}" in str(raised.value)
    assert str(raised.value) == str(uninterrupted.value).replace(str(whole.folder), str(resumed.folder))
    assert resumed.events() == whole.events()
