"""The child that scores the trained model and the baselines on the frozen test rows."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from memfit.evaluation.gate import judge
from memfit.files import atomic_path, write_json
from memfit.memory import enforcement
from memfit.memory.plan import Plan
from memfit.process import Emit
from memfit.training.checkpoint import load_checkpoint
from memfit.training.evaluate import evaluate_in_pieces
from memfit.workloads.base import Arrays, Illustrating, Workload
from memfit.workloads.registry import load_workload

SPLIT = "test"


def run(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Write evaluation.json and predictions.npz into `job["run_dir"]`; return the evaluation.

    job: workload, data_dir, model, loss, plan, weights (a checkpoint's folder), run_dir, gate. Raises: DoesNotFitError
    or ChildOutOfMemoryError where the plan's budget is too small for it.
    """
    plan = Plan.from_dict(job["plan"])
    workload = load_workload(job)
    cure = f"Raise plan.budget; the trained weights in {job['weights']} are intact."
    phases = enforcement.Phases("evaluate", emit)
    with enforcement.within_budget(plan.budget_bytes, plan.device, phases, cure):
        phases("evaluate")
        return _evaluate(job, plan, workload, emit)


def _evaluate(job: dict[str, Any], plan: Plan, workload: Workload, emit: Emit) -> dict[str, Any]:
    model = workload.variants()[plan.variant or next(iter(workload.variants()))]()
    model.load_state_dict(load_checkpoint(Path(job["weights"])).weights)
    model = model.to(plan.device).eval()

    def on_shrink(batch_size: int, message: str) -> None:
        shortage = {"reason": "out_of_memory", "phase": "evaluate", "message": message}
        emit({"event": "layout", **shortage, "eval_batch_size": batch_size})

    losses, predictions = evaluate_in_pieces(
        workload, model, SPLIT, batch_size=plan.eval_batch_size, layout=plan, on_shrink=on_shrink
    )
    truth = workload.truth(SPLIT, np.arange(workload.num_samples(SPLIT)))
    baselines = workload.baselines(SPLIT)
    facts = {"headline": "mae", **workload.describe()}
    evaluation = {
        "schema": 1,
        "split": SPLIT,
        "num_rows": workload.num_samples(SPLIT),
        "rows_sha256": _hash_rows(truth),
        **facts,
        "losses": losses,
        "metrics": workload.score(truth, predictions),
        "baselines": {name: workload.score(truth, found) for name, found in baselines.items()},
        "gate": judge(job["gate"], facts["headline"], workload.score, truth, predictions, baselines),
        "illustrations": workload.illustrate(model) if isinstance(workload, Illustrating) else {},
    }
    _write_predictions(Path(job["run_dir"]) / "predictions.npz", truth, predictions)
    write_json(Path(job["run_dir"]) / "evaluation.json", evaluation)
    return evaluation


def _hash_rows(truth: Arrays) -> str:
    """Hash the truth in order: two evaluations are comparable only where this is equal."""
    digest = hashlib.sha256()
    for name in sorted(truth):
        digest.update(name.encode() + np.ascontiguousarray(truth[name]).tobytes())
    return digest.hexdigest()


def _write_predictions(path: Path, truth: Arrays, predictions: Arrays) -> None:
    arrays = {**truth, **predictions}
    if "class_probabilities" in arrays:
        arrays["class"] = arrays["class_probabilities"].argmax(axis=1)
    with atomic_path(path) as temporary, temporary.open("wb") as opened:
        np.savez_compressed(opened, **arrays)  # type: ignore[arg-type]
