"""One stage from start to end: what it writes, when it ends, what it keeps."""

import itertools

import pytest
from safetensors.torch import load_file

from memfit.errors import ConfigError, MemfitError
from memfit.training import writer


def test_writes_every_step_every_epoch_and_the_end(attempts):
    stage = attempts(stage={"epochs": 2})
    result = stage.run()
    events = stage.events()
    kinds = [event["event"] for event in events]
    assert kinds == ["stage_start", *[*["step"] * 10, "health", "epoch"] * 2, "stage_end"]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 21))
    assert set(events[1]["losses"]) == {"value", "class", "exceeds", "total"}
    assert events[1]["losses"]["total"] == pytest.approx(
        sum(value for term, value in events[1]["losses"].items() if term != "total")
    )
    epoch = stage.of_kind("epoch")[0]
    assert {"total", "mae", "below_accuracy", "above_accuracy", "loss_risk"} <= set(epoch["validation"])
    assert set(epoch["train"]) == {"value", "class", "exceeds", "total"}
    assert result["reason"] == "epochs"
    assert result["peak_bytes"] > 0
    assert events[0]["num_train"] > 9 * 16  # ten steps an epoch, the last one smaller
    assert events[0]["steps_per_epoch"] == 10
    assert next(event for event in stage.emitted if event["event"] != "phase")["event"] == "stage_start"


def test_memory_and_time_are_logged_with_every_epoch(attempts):
    stage = attempts(stage={"epochs": 1})
    stage.run()
    epoch = next(event for event in stage.emitted if event["event"] == "epoch")
    assert epoch["memory"]["now_bytes"] > 0
    assert epoch["memory"]["peak_bytes"] > 0
    assert epoch["samples_per_second"] > 0
    assert epoch["eta_seconds"] == 0


def test_training_learns_the_tiny_series(attempts):
    stage = attempts(stage={"epochs": 12})
    stage.run()
    totals = [event["validation"]["total"] for event in stage.of_kind("epoch")]
    assert min(totals) < 0.8 * totals[0]


def test_an_epoch_uses_every_sample_once_in_an_order_of_its_own(attempts, monkeypatch):
    from memfit.workloads.series import SeriesWorkload

    asked, original = [], SeriesWorkload.batch

    def batch(self, split, indices):
        if split == "train":
            asked.extend(int(index) for index in indices)
        return original(self, split, indices)

    monkeypatch.setattr(SeriesWorkload, "batch", batch)
    stage = attempts(stage={"epochs": 2})
    stage.run()
    size = stage.of_kind("stage_start")[0]["num_train"]
    first, second = asked[-2 * size : -size], asked[-size:]  # a few more were made before, to see how large they are
    assert sorted(first) == sorted(second) == list(range(size))
    assert first != second


def test_ends_early_after_epochs_without_a_better_value(attempts):
    still = {"optimizer": {"name": "sgd", "lr": 1e-30, "weight_decay": 0.0}, "patience": 2, "epochs": 9}
    stage = attempts(stage=still)
    result = stage.run()
    assert (result["reason"], result["epochs"], result["best_epoch"]) == ("early_stopping", 3, 1)
    assert [event["best"] for event in stage.of_kind("epoch")] == [True, False, False]


def test_patience_zero_trains_all_epochs(attempts):
    still = {"optimizer": {"name": "sgd", "lr": 1e-30, "weight_decay": 0.0}, "patience": 0, "epochs": 4}
    assert attempts(stage=still).run()["epochs"] == 4


@pytest.mark.parametrize(("limit", "epochs"), [(4, 1), (10, 1), (13, 2)])
def test_max_steps_ends_a_stage_with_a_validated_epoch(attempts, limit, epochs):
    stage = attempts(stage={"max_steps": limit, "epochs": 3})
    result = stage.run()
    assert (result["reason"], result["steps"], result["epochs"]) == ("max_steps", limit, epochs)
    assert len(stage.of_kind("step")) == limit
    assert len(stage.of_kind("epoch")) == epochs


def test_max_steps_is_the_reason_even_in_the_last_epoch(attempts):
    assert attempts(stage={"max_steps": 4, "epochs": 1}).run()["reason"] == "max_steps"


def test_the_best_weights_not_the_last_start_the_next_stage(attempts):
    first = attempts("first", stage={"monitor_mode": "max", "epochs": 3})  # the worst loss counts as best
    assert first.run()["best_epoch"] == 1
    assert first.weights("best") != first.weights("last")
    still = {"name": "second", "max_steps": 1, "optimizer": {"name": "sgd", "lr": 1e-30, "weight_decay": 0.0}}
    second = attempts("second", stage=still, stage_index=1, initial_weights=str(first.checkpoints / "best"))
    second.run()
    assert second.weights("last") == first.weights("best")


def test_only_the_named_modules_train(attempts):
    whole = attempts("before", stage={"max_steps": 1})
    whole.run()
    frozen = attempts(
        "frozen", stage={"train": ["class_head.*", "value_head.*"]}, initial_weights=str(whole.checkpoints / "best")
    )
    frozen.run()
    before = load_file(whole.checkpoints / "best" / "model.safetensors")
    after = load_file(frozen.checkpoints / "last" / "model.safetensors")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {"class_head.weight", "class_head.bias", "value_head.weight", "value_head.bias"}
    start = frozen.of_kind("stage_start")[0]
    assert 0 < start["trainable_parameters"] < start["parameters"]


def test_keeps_last_best_and_every_nth_epoch_and_nothing_else(attempts):
    stage = attempts(stage={"epochs": 5, "checkpoint_every_epochs": 2, "monitor_mode": "max"})
    result = stage.run()
    links = {path.name: path.resolve().name for path in stage.checkpoints.iterdir() if path.is_symlink()}
    assert set(links) == {"last", "best", "epoch-2", "epoch-4"}
    assert links["best"] == f"step-{10 * result['best_epoch']}"
    folders = {path.name for path in stage.checkpoints.iterdir() if not path.is_symlink()}
    assert folders == set(links.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_that_are_not_finite_stop_training_with_the_weights_intact(attempts, precision):
    stage = attempts(plan={"precision": precision}, loss={"value_weight": float("nan")})
    with pytest.raises(MemfitError, match=r"not finite in 3 steps up to step 3, .*samples \[.*\]\. Lower lr"):
        stage.run()
    assert [event["losses"]["total"] for event in stage.of_kind("step")] == [None] * 3


def test_fp16_overflows_that_scaling_down_does_not_cure_stop_training(attempts):
    stage = attempts(plan={"precision": "fp16"}, loss={"value_weight": 1e32})
    with pytest.raises(MemfitError, match="not finite in 3 steps"):
        stage.run()


def test_the_schedule_waits_where_the_scaler_skipped_a_step(attempts):
    stage = attempts(plan={"precision": "fp16"}, loss={"value_weight": 1e3}, stage={"max_steps": 15})
    stage.run()
    steps = stage.of_kind("step")
    skipped = [b["lr"] == a["lr"] for a, b in itertools.pairwise(steps)]
    scaled = [b["loss_scale"] < a["loss_scale"] for a, b in itertools.pairwise(steps)]
    assert skipped == scaled
    assert any(skipped)
    assert not all(skipped)


def test_a_monitor_that_does_not_exist_is_named_with_those_that_do(attempts):
    with pytest.raises(ConfigError, match=r"monitor: expected one of .*mae.*, got 'maee'"):
        attempts(stage={"monitor": "maee"}).run()


def test_an_undefined_monitor_never_is_best_and_last_stands_in(attempts, monkeypatch):
    from memfit.workloads.series import SeriesWorkload

    monkeypatch.setattr(SeriesWorkload, "score", lambda *_: {"loss_risk": None})
    stage = attempts(stage={"monitor": "loss_risk", "epochs": 2})
    result = stage.run()
    assert (result["best_epoch"], result["best_value"]) == (0, None)
    assert (stage.checkpoints / "best").readlink() == (stage.checkpoints / "last").readlink()


def test_checkpoints_by_steps_lie_inside_epochs_and_change_nothing(attempts):
    plain, often = attempts("plain"), attempts("often", stage={"checkpoint_every_steps": 4, "keep_checkpoints": 3})
    plain.run()
    often.run()
    assert often.weights("last") == plain.weights("last")
    assert often.events() == plain.events()
    kept = {int(folder.name[5:]) for folder in often.checkpoints.glob("step-*")}
    assert {24, 28, 30} <= kept
    assert len(kept - {24, 28, 30}) <= 1  # the best one, if it is none of them


def test_checkpoints_by_time_are_written_when_it_has_passed(attempts, monkeypatch):
    written = []
    original = writer.save_checkpoint
    monkeypatch.setattr(writer, "save_checkpoint", lambda *given: written.append(given[3]["step"]) or original(*given))
    attempts(stage={"epochs": 1, "checkpoint_every_minutes": 1e-9}).run()
    assert written == [*range(1, 11), 10]


def test_a_kill_between_epochs_loses_no_more_than_the_steps_since_the_last_checkpoint(attempts, monkeypatch):
    class Killed(BaseException):
        pass

    stage = {"checkpoint_every_steps": 3, "keep_checkpoints": 2}
    whole, killed = attempts("whole", stage=dict(stage)), attempts("killed", stage=dict(stage))
    whole.run()
    calls = itertools.count(1)

    def kill() -> bool:
        if next(calls) == 17:
            raise Killed
        return False

    with pytest.raises(Killed):
        killed.run(ask=kill)
    killed.run()
    (resumed,) = [event for event in killed.emitted if event["event"] == "resume"]
    assert resumed["step"] == 15
    assert killed.weights("last") == whole.weights("last")
    assert killed.events() == whole.events()


def test_the_first_bad_batch_and_the_layer_are_named(attempts, monkeypatch):
    """One sample of a batch has no history from the fourth batch on; the first batch only measures the host."""
    from memfit.workloads.series import SeriesWorkload

    original, asked = SeriesWorkload.batch, []

    def batch(self, split, indices):
        found = original(self, split, indices)
        if split == "train":
            asked.append(indices.tolist())
            if len(asked) >= 4:
                found["history"][0] = float("nan")
        return found

    stage = attempts()
    monkeypatch.setattr(SeriesWorkload, "batch", batch)
    with pytest.raises(MemfitError) as raised:
        stage.run()
    assert f"samples {asked[3]}" in str(raised.value)
    assert "up to step 5, first in the output of '" in str(raised.value)
