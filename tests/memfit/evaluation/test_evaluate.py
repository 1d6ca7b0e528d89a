"""The evaluation child: the frozen test rows, the model beside trivial baselines."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from memfit.errors import CheckpointError, ChildOutOfMemoryError, DoesNotFitError
from memfit.evaluation import evaluate
from memfit.memory import enforcement
from memfit.memory.plan import Plan
from memfit.process import run_child
from memfit.training.checkpoint import save_checkpoint
from memfit.workloads.series import SeriesWorkload

METRICS = {
    "mae", "rmse", "r2", "class_accuracy", "class_f1", "exceeds_accuracy", "below_accuracy", "above_accuracy",
    "precision", "recall", "loss_risk",
}  # fmt: skip


def plan() -> Plan:
    return Plan(
        stage="first",
        device="cpu",
        budget_bytes=2**31,
        global_batch_size=16,
        micro_batch_size=16,
        accumulation_steps=1,
        precision="fp32",
        checkpointing="none",
        variant="light",
        measured_peak_bytes=None,
        eval_batch_size=10,
        step_seconds=None,
        samples_per_second=None,
        verified=True,
        levers=(),
        probes=(),
        fingerprint="",
        reason="",
    )


@pytest.fixture
def job(tmp_path, prepared, tiny_model, monkeypatch):
    monkeypatch.setattr(enforcement, "enforce_budget", lambda *_: None)
    torch.manual_seed(0)
    model = SeriesWorkload(prepared, tiny_model, {}).variants()["light"]()
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path / "checkpoints", model.state_dict(), {}, {"step": 1}, ("best",))
    return {
        "workload": "series",
        "data_dir": str(prepared),
        "model": tiny_model,
        "loss": {},
        "plan": asdict(plan()),
        "gate": {"metric": "", "beat_baselines": True, "at_least": None, "at_most": None},
        "weights": str(tmp_path / "checkpoints" / "best"),
        "run_dir": str(tmp_path / "run"),
    }


def test_writes_the_documented_files(job, prepared, tmp_path):
    returned = evaluate.run(job, lambda _event: None)
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert written == returned
    assert written["schema"] == 1
    assert written["split"] == "test"
    assert written["unit"] == "MW"
    assert written["threshold"] == 10.5
    assert set(written["metrics"]) == METRICS
    assert set(written["baselines"]) == {"persistence", "train_mean", "majority"}
    assert all(set(scores) == METRICS for scores in written["baselines"].values())
    manifest = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))
    assert written["num_rows"] == manifest["borders"]["test"]["num_targets"]


def test_predictions_are_those_that_the_metrics_are_of(job, tmp_path):
    evaluation = evaluate.run(job, lambda _event: None)
    with np.load(tmp_path / "run" / "predictions.npz") as arrays:
        found = {name: arrays[name] for name in arrays.files}
    wanted = {"times", "truth", "value", "class_truth", "class", "exceeds_probability", "persistence"}
    assert wanted <= set(found)
    assert {len(array) for array in found.values()} == {evaluation["num_rows"]}
    assert np.abs(found["value"] - found["truth"]).mean() == pytest.approx(evaluation["metrics"]["mae"], rel=1e-5)
    assert (found["class"] == found["class_truth"]).mean() == pytest.approx(evaluation["metrics"]["class_accuracy"])
    assert found["times"].dtype == np.int64


def test_an_untrained_net_scores_as_persistence_does(job):
    evaluation = evaluate.run(job, lambda _event: None)
    persistence = evaluation["baselines"]["persistence"]
    assert evaluation["metrics"]["mae"] == pytest.approx(persistence["mae"], rel=1e-3)


def test_the_hash_of_the_rows_tells_whether_two_evaluations_compare(job, monkeypatch):
    first = evaluate.run(job, lambda _event: None)["rows_sha256"]
    assert evaluate.run(job, lambda _event: None)["rows_sha256"] == first
    original = SeriesWorkload.truth

    def other(self, split, indices):
        truth = original(self, split, indices)
        return {**truth, "truth": truth["truth"] + 1e-3}

    monkeypatch.setattr(SeriesWorkload, "truth", other)
    assert evaluate.run(job, lambda _event: None)["rows_sha256"] != first


def test_damaged_weights_are_refused_and_nothing_is_written(job, tmp_path):
    weights = tmp_path / "checkpoints" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="it is corrupt"):
        evaluate.run(job, lambda _event: None)
    assert not (tmp_path / "run").exists()


def test_batches_are_of_the_planned_size(job, monkeypatch):
    sizes = []
    original = SeriesWorkload.predict

    def predict(self, model, batch):
        sizes.append(len(batch["target"]))
        return original(self, model, batch)

    monkeypatch.setattr(SeriesWorkload, "predict", predict)
    num_rows = evaluate.run(job, lambda _event: None)["num_rows"]
    assert max(sizes) == plan().eval_batch_size == 10
    assert sum(sizes) == num_rows


def test_the_plans_budget_is_enforced(job, monkeypatch):
    enforced = []
    monkeypatch.setattr(enforcement, "enforce_budget", lambda *given: enforced.append(given))
    evaluate.run(job, lambda _event: None)
    assert enforced == [(2**31, "cpu")]


def test_running_out_names_the_phase_and_what_to_do(job, monkeypatch):
    def refuse(self, model, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(SeriesWorkload, "predict", refuse)
    with pytest.raises(
        ChildOutOfMemoryError, match=r"ran out in phase 'evaluate'.*Raise plan\.budget; the trained weig"
    ):
        evaluate.run(job, lambda _event: None)


def test_a_real_child_refuses_a_budget_that_is_too_small(job, tmp_path):
    job["plan"]["budget_bytes"] = 128 * 2**20
    outcome = run_child("memfit.evaluation.evaluate:run", job, log=tmp_path / "log")
    with pytest.raises(DoesNotFitError, match=r"evaluate: expected a budget above the .* got 128 MiB"):
        outcome.unwrap("step 'evaluate'")
