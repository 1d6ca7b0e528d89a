"""The child that trains: its budget, the host's memory, and what it says when either is too little."""

import pytest
import torch
from safetensors.torch import load_file

from memfit.errors import ChildOutOfMemoryError, DoesNotFitError, Resumable
from memfit.memory import enforcement, host
from memfit.memory.host import Memory
from memfit.process import run_child
from memfit.training import worker
from memfit.workloads.series import SeriesWorkload

MIB = 2**20


def test_the_plans_budget_is_enforced_before_anything_is_built(attempts, monkeypatch):
    enforced = []
    monkeypatch.setattr(enforcement, "enforce_budget", lambda *given: enforced.append(given))
    attempt = attempts(stage={"epochs": 1})
    attempt.run()
    assert enforced == [(2**31, "cpu")]
    phases = [event["phase"] for event in attempt.emitted if event["event"] == "phase"]
    assert phases == ["build", "train", "evaluate", "save"]


def test_a_global_batch_that_the_host_cannot_hold_is_refused_before_training(attempts, monkeypatch):
    made = []
    original = SeriesWorkload.batch

    def batch(self, split, indices):
        made.append(len(indices))
        return original(self, split, indices)

    monkeypatch.setattr(SeriesWorkload, "batch", batch)
    monkeypatch.setattr(host, "host_memory", lambda: Memory(2**30, 100))
    attempt = attempts(plan={"global_batch_size": 10**9})
    with pytest.raises(
        DoesNotFitError, match=r"train:first: expected the host's free memory .* got 0 MiB free of 1024"
    ):
        attempt.run()
    assert made == [6]  # one micro-batch, to see how large a sample is
    assert not attempt.folder.exists()


@pytest.mark.parametrize(("keep", "before"), [(1, {"step-10", "step-13"}), (3, {"step-10", "step-12", "step-13"})])
def test_a_resumed_stage_asks_only_for_the_disk_of_checkpoints_to_come(attempts, monkeypatch, keep, before):
    """All in all those that are kept, the best one, and one being written."""
    asked = []
    monkeypatch.setattr(worker, "check_free_disk", lambda _folder, num_bytes, _what: asked.append(num_bytes))
    attempt = attempts(stage={"epochs": 2, "keep_checkpoints": keep, "checkpoint_every_steps": 6})
    with pytest.raises(Resumable):
        attempt.run(stop_after=13)
    assert {path.name for path in attempt.checkpoints.glob("step-*")} == before
    attempt.run()
    weights = load_file(attempt.checkpoints / "last" / "model.safetensors").values()
    checkpoint_bytes = 3 * sum(tensor.nbytes for tensor in weights)
    assert asked == [(keep + 2) * checkpoint_bytes, (keep + 2 - len(before)) * checkpoint_bytes]


def test_running_out_at_every_size_says_what_was_tried_and_what_to_do(attempts, monkeypatch):
    def refuse(self, model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 bytes")

    monkeypatch.setattr(SeriesWorkload, "loss", refuse)
    attempt = attempts()
    with pytest.raises(
        DoesNotFitError,
        match=r"train:first: train_step: expected a global batch of 16 .* micro-batches of 1, checkpointing blocks: "
        r"CUDA out of memory.* Raise plan\.budget, or lower the stage's global_batch_size; what checkpoints",
    ):
        attempt.run()
    assert [event["micro_batch_size"] for event in attempt.of_kind("layout")] == [3, 1, 1]


def test_a_real_child_is_held_to_its_budget(attempts, tmp_path):
    attempt = attempts(stage={"epochs": 1}, plan={"budget_bytes": 600 * MIB})
    fitting = run_child("memfit.training.worker:run", attempt.job, log=tmp_path / "log").unwrap("training")
    assert 0 < fitting["peak_bytes"] <= 600 * MIB
    attempt = attempts("small", stage={"epochs": 1}, plan={"budget_bytes": 270 * MIB})
    with pytest.raises(ChildOutOfMemoryError, match=r"phase '(build|train)'"):
        run_child("memfit.training.worker:run", attempt.job, log=tmp_path / "log").unwrap("training")
