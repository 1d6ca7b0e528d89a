"""The child that exports: a fresh process each time, because exporters keep state between exports."""

from pathlib import Path
from typing import Any

from memfit.export.bundle import export_bundle
from memfit.export.signature import Signature
from memfit.memory import budget
from memfit.memory.plan import Plan
from memfit.process import Emit
from memfit.training.checkpoint import load_checkpoint
from memfit.workloads.registry import load_workload


def run(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Export the trained model into `job["export_dir"]`; return its card.

    job: workload, data_dir, model, loss, plan, weights, export_dir, opset, samples, atol, rtol, card.
    """
    plan = Plan.from_dict(job["plan"])
    workload = load_workload(job)
    emit({"event": "phase", "phase": "export"})
    model = workload.variants()[plan.variant or next(iter(workload.variants()))]()
    model.load_state_dict(load_checkpoint(Path(job["weights"])).weights)
    spec = workload.export(job["samples"])
    budget.reset_peak("cpu")
    return export_bundle(
        Path(job["export_dir"]),
        workload.inference_module(model.eval()),
        inputs=[Signature(**entry) for entry in spec.inputs],
        outputs=[Signature(**entry) for entry in spec.outputs],
        sample_inputs=spec.sample_inputs,
        card={**job["card"], **spec.card},
        support_files=spec.support_files,
        opset=job["opset"],
        tolerances=_tolerances(job),
        on_progress=lambda phase: emit({"event": "phase", "phase": phase}),
    )


def _tolerances(job: dict[str, Any]) -> dict[str, float] | None:
    """Return the config's tolerances; where it states only one, the other is the strictest."""
    given = {name: job[name] for name in ("atol", "rtol") if job[name] is not None}
    return {"atol": 0.0, "rtol": 0.0, **given} if given else None
