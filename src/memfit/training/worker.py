"""The child that trains one stage: limits, seeds, model, resume, loop."""

import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from memfit.errors import DoesNotFitError
from memfit.files import check_free_disk, disk_errors
from memfit.memory import enforcement
from memfit.memory.host import check_host_memory
from memfit.memory.plan import Plan
from memfit.process import Emit
from memfit.random_state import seed_everything
from memfit.recovery import RecoveringStep, UpdateInterruptedError, release_memory
from memfit.training.checkpoint import newest
from memfit.training.events import EventLog
from memfit.training.inheritance import Inheritance
from memfit.training.loop import StageLoop
from memfit.training.optimizers import Schedule
from memfit.training.program import stage_program
from memfit.training.stage import Progress, restore
from memfit.training.writer import CheckpointWriter, room_for_copies
from memfit.workloads.base import Workload
from memfit.workloads.registry import load_workload

EVENTS = "events.jsonl"


def run(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Train one stage under its plan; return its result.

    job: workload, data_dir, model, loss, stage, stage_index, seed, plan, stage_dir, fingerprint, initial_weights;
    shortages: why children that trained before this one, since the last checkpoint, ran out of memory and died.
    The newest usable checkpoint of the same fingerprint in the stage's folder is resumed. Raises: DoesNotFitError
    before training where the host cannot hold a global batch, and where nothing smaller is left to try; RunStateError
    where the disk is full or gone; ChildOutOfMemoryError.
    """
    plan = Plan.from_dict(job["plan"])
    workload = load_workload(job)
    phases = enforcement.Phases(f"train:{job['stage']['name']}", emit)
    cure = (
        "Raise plan.budget, or lower the stage's global_batch_size; what checkpoints there are in "
        f"{job['stage_dir']} are intact."
    )
    disk = f"Free space or restore {job['stage_dir']}, and resume: the checkpoints in it are intact."
    with (
        disk_errors(phases.step, disk),
        enforcement.within_budget(plan.budget_bytes, plan.device, phases, cure),
    ):
        _check_host(workload, plan, phases.step)
        try:
            result = _train_through(job, plan, workload, phases)
        except DoesNotFitError as error:
            raise DoesNotFitError(f"{phases.step}: {error} {cure}") from None
    return {**result, "peak_bytes": enforcement.peak_bytes(plan.device)}


def _check_host(workload: Workload, plan: Plan, what: str) -> None:
    """Refuse a global batch that the host does not hold, before one is made. The loop makes one at a time, unpinned."""
    num_train = workload.num_samples("train")
    few = min(plan.micro_batch_size, num_train)
    bytes_per_sample = enforcement.host_bytes(workload.batch("train", np.arange(few))) / few
    check_host_memory(int(bytes_per_sample * min(plan.global_batch_size, num_train)), what=what)


def _train_through(job: dict[str, Any], plan: Plan, workload: Workload, phases: enforcement.Phases) -> dict[str, Any]:
    """Train; where memory ran out in an update, throw everything away and go on from the last checkpoint."""
    shortages: list[str] = list(job.get("shortages", ()))
    while True:
        try:
            return _train(job, plan, workload, phases, shortages)
        except UpdateInterruptedError as error:
            shortages.append(str(error))
        release_memory(plan.device)  # outside the handler: a traceback pins the model


def _train(
    job: dict[str, Any], plan: Plan, workload: Workload, phases: enforcement.Phases, shortages: Sequence[str]
) -> dict[str, Any]:
    stage = job["stage"]
    phases("build")
    seed_everything(int(np.random.default_rng([job["seed"], job["stage_index"]]).integers(2**31)))
    program = stage_program(workload, stage, job.get("min_micro_batch_size", 1))
    model = program.build(plan.variant)
    settings = job["model"]["variants"][plan.variant or job["model"]["variant"]]
    inheritance = Inheritance(job["initial_weights"], workload, model, settings) if job["initial_weights"] else None
    if inheritance is not None:
        inheritance.weights()
    model = model.to(plan.device).train()
    step = RecoveringStep(plan, program, model, program.optimizer(model), clip=stage["clip"])
    if inheritance is not None and (
        inheritance.changed if stage["keep_optimizer"] is None else stage["keep_optimizer"]
    ):
        inheritance.moments(step.optimizer)
    steps_per_epoch = -(-workload.num_samples("train") // plan.global_batch_size)
    steps_per_epoch = min(steps_per_epoch, stage["epoch_steps"] or steps_per_epoch)
    schedule = Schedule(step.optimizer, stage["schedule"], steps_per_epoch * stage["epochs"], stage["monitor_mode"])
    checkpoints = Path(job["stage_dir"]) / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    to_come = (
        stage["keep_checkpoints"] + 2 - len(list(checkpoints.glob("step-*")))
    )  # the best one, and one being written
    check_free_disk(checkpoints, _checkpoint_bytes(model) * max(to_come, 1), phases.step)
    progress = _resume(Path(job["stage_dir"]), job["fingerprint"], step, schedule, phases.emit)
    keep_bytes = progress.events_bytes if progress else 0
    with (
        closing(EventLog(Path(job["stage_dir"]) / EVENTS, phases.emit, keep_bytes)) as events,
        CheckpointWriter(checkpoints, stage["keep_checkpoints"], plan.device, partial(room_for_copies, plan)) as writer,
    ):
        if progress is None:
            events.write("stage_start", **_start_facts(job, plan, workload, model, steps_per_epoch))
        else:
            where = {"step": progress.step, "epoch": progress.epoch, "from": str(checkpoints)}
            phases.emit({"event": "resume", **where, "epochs": stage["epochs"], "steps_per_epoch": steps_per_epoch})
        loop = StageLoop(
            workload,
            step,
            schedule,
            progress or Progress(),
            events,
            plan,
            stage,
            job["stage_index"],
            job["seed"],
            writer,
            {"stage": stage["name"], "fingerprint": job["fingerprint"], "model": settings},
            phases,
        )
        for shortage in shortages:
            step.shrink(plan.global_batch_size, "out_of_memory", "update", shortage)
        result = _result(loop.run(), stage, loop.progress)
        events.write("stage_end", **result)
        events.sync()
    return result


def _checkpoint_bytes(model: nn.Module) -> int:
    """Count what a checkpoint may take: weights, and two numbers a weight of optimizer state."""
    return 3 * sum(int(tensor.nbytes) for tensor in model.state_dict().values())


def _result(reason: str, stage: dict[str, Any], progress: Progress) -> dict[str, Any]:
    return {
        "reason": reason,
        "monitor": stage["monitor"],
        "best_epoch": progress.best_epoch,
        "best_value": progress.best_value,
        "epochs": progress.epoch,
        "steps": progress.step,
        "skipped_updates": progress.skipped,
        "seconds": progress.seconds,
        "stall_seconds": progress.stall_seconds,
    }


def _resume(stage_dir: Path, fingerprint: str, step: RecoveringStep, schedule: Schedule, emit: Emit) -> Progress | None:
    log = stage_dir / EVENTS
    found = newest(
        stage_dir / "checkpoints",
        fingerprint,
        log.stat().st_size if log.exists() else 0,
        lambda message: emit({"event": "warning", "message": message}),
    )
    if found is None:
        return None
    step.model.load_state_dict(found.weights)
    return restore(found.state, step, schedule)


def _start_facts(
    job: dict[str, Any], plan: Plan, workload: Workload, model: nn.Module, steps_per_epoch: int
) -> dict[str, Any]:
    parameters = list(model.parameters())
    return {
        "stage": job["stage"]["name"],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "num_train": workload.num_samples("train"),
        "num_validation": workload.num_samples("validation"),
        "epochs": job["stage"]["epochs"],
        "steps_per_epoch": steps_per_epoch,
        "plan": plan.to_dict(),
    }
