"""The child that exports: a fresh process each time, because exporters keep state between exports."""

from pathlib import Path
from typing import Any

import torch

from memfit.export.bundle import export_bundle
from memfit.export.signature import Signature
from memfit.memory import budget, enforcement
from memfit.memory.plan import Plan
from memfit.process import Emit
from memfit.starting_point import WEIGHTS
from memfit.training.checkpoint import load_checkpoint
from memfit.workloads.base import Workload
from memfit.workloads.registry import load_workload


def run(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Export the trained model into `job["export_dir"]`; return its card.

    job: workload, data_dir, model, loss, plan, weights, export_dir, opset, samples, atol, rtol, card. It runs on the
    CPU under the plan's budget; that of a GPU says nothing there, and what is free on the host, less a margin, is the
    cap. Raises: DoesNotFitError or ChildOutOfMemoryError where that is too little; ExportError.
    """
    plan = Plan.from_dict(job["plan"])
    workload = load_workload(job)
    phases = enforcement.Phases("export", emit)
    cap, cure = _cap(plan, job["weights"])
    with enforcement.within_budget(cap, "cpu", phases, cure):
        return _export(job, plan, workload, phases)


def _cap(plan: Plan, weights: str) -> tuple[int, str]:
    """Return the bytes that the export may take, and what to do where they are too few."""
    intact = f"the trained weights in {weights} are intact."
    if torch.device(plan.device).type == "cpu":
        return plan.budget_bytes, f"Raise plan.budget, or export a smaller variant; {intact}"
    free = budget.resolve_budget("auto", "cpu") + enforcement.now_bytes("cpu")
    return free, f"End what else runs on this host, and run it again; {intact}"


def _export(job: dict[str, Any], plan: Plan, workload: Workload, phases: enforcement.Phases) -> dict[str, Any]:
    phases("export")
    model = workload.variants()[plan.variant or next(iter(workload.variants()))]()
    model.load_state_dict(load_checkpoint(Path(job["weights"])).weights)
    spec = workload.export(job["samples"])
    weights = {WEIGHTS: Path(job["weights"]) / "model.safetensors"} if job["with_weights"] else {}
    return export_bundle(
        Path(job["export_dir"]),
        workload.inference_module(model.eval()),
        inputs=[Signature(**entry) for entry in spec.inputs],
        outputs=[Signature(**entry) for entry in spec.outputs],
        sample_inputs=spec.sample_inputs,
        card={**job["card"], **spec.card},
        support_files=spec.support_files | weights,
        requirements=spec.requirements,
        opset=job["opset"],
        tolerances=_tolerances(job),
        on_progress=phases,
    )


def _tolerances(job: dict[str, Any]) -> dict[str, float] | None:
    """Return the config's tolerances; where it states only one, the other is the strictest."""
    given = {name: job[name] for name in ("atol", "rtol") if job[name] is not None}
    return {"atol": 0.0, "rtol": 0.0, **given} if given else None
