"""The child that exports: capped, and clear about it where the cap is too small."""

import pytest
import torch

from memfit.errors import ChildOutOfMemoryError, DoesNotFitError
from memfit.export import worker
from memfit.memory import budget, enforcement
from memfit.memory.plan import Plan
from memfit.process import run_child
from memfit.training.checkpoint import save_checkpoint
from memfit.workloads.series import SeriesWorkload

MIB = 2**20


def plan(**changes) -> Plan:
    settings = {
        "stage": "first",
        "device": "cpu",
        "budget_bytes": 2**31,
        "global_batch_size": 16,
        "micro_batch_size": 16,
        "accumulation_steps": 1,
        "precision": "fp32",
        "checkpointing": "none",
        "variant": "light",
        "measured_peak_bytes": None,
        "eval_batch_size": 16,
        "step_seconds": None,
        "samples_per_second": None,
        "verified": True,
        "levers": (),
        "probes": (),
        "fingerprint": "",
        "reason": "",
    }
    return Plan(**{**settings, **changes})


@pytest.fixture
def export(tmp_path, prepared, tiny_model):
    """Export an untrained net in a child: `export(plan)`."""
    torch.manual_seed(0)
    model = SeriesWorkload(prepared, tiny_model, {}).variants()["light"]()
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path / "checkpoints", model.state_dict(), {}, {"step": 1}, ("best",))

    def run(chosen: Plan):
        job = {
            "workload": "series",
            "data_dir": str(prepared),
            "model": tiny_model,
            "loss": {},
            "plan": chosen.to_dict(),
            "weights": str(tmp_path / "checkpoints" / "best"),
            "export_dir": str(tmp_path / "export"),
            "card": {"name": "tiny"},
            "opset": 20,
            "samples": 8,
            "with_weights": True,
            "atol": None,
            "rtol": None,
        }
        return run_child("memfit.export.worker:run", job, log=tmp_path / "log").unwrap("step 'export'")

    return run


def test_the_export_keeps_to_the_plans_budget(export, tmp_path):
    assert export(plan(budget_bytes=700 * MIB))["name"] == "tiny"
    assert (tmp_path / "export" / "model.onnx").exists()


def test_a_budget_that_is_too_small_names_the_phase_and_leaves_nothing_half_done(export, tmp_path):
    # The child says so itself where it is told; a library that aborts leaves the words to the parent.
    with pytest.raises(ChildOutOfMemoryError, match=r"ran out .*in phase 'graph'.*Raise (plan\.|the )budget"):
        export(plan(budget_bytes=340 * MIB))
    assert not (tmp_path / "export").exists()


def test_a_budget_below_the_libraries_is_refused_at_once(export):
    with pytest.raises(
        DoesNotFitError, match=r"export: expected a budget above the .* got 128 MiB\. Raise plan\.budget"
    ):
        export(plan(budget_bytes=128 * MIB))


def test_the_budget_of_a_gpu_says_nothing_of_the_host(monkeypatch):
    monkeypatch.setattr(budget, "resolve_budget", lambda text, device: {("auto", "cpu"): 5 * 2**30}[text, device])
    monkeypatch.setattr(enforcement, "now_bytes", lambda _device: 300 * MIB)
    cap, cure = worker._cap(plan(device="cuda:1", budget_bytes=700 * MIB), "best")
    assert cap == 5 * 2**30 + 300 * MIB
    assert "host" in cure
    assert worker._cap(plan(budget_bytes=700 * MIB), "best")[0] == 700 * MIB
