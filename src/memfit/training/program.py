"""Assemble the TrainingProgram of a stage: what the probe measures is what the loop trains."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from memfit.step import Batch, TrainingProgram
from memfit.training.checkpoint import write_payload
from memfit.training.optimizers import build_optimizer, freeze_all_but
from memfit.workloads.base import Workload
from memfit.workloads.registry import load_workload


def from_job(job: Mapping[str, Any]) -> TrainingProgram:
    """Build the program of a job: {workload, data_dir, model, loss, stage, min_micro_batch_size}."""
    return stage_program(load_workload(job), job["stage"], job.get("min_micro_batch_size", 1))


def stage_program(workload: Workload, stage: Mapping[str, Any], min_micro_batch_size: int = 1) -> TrainingProgram:
    """Bind a workload and a stage's settings (train, optimizer) into a TrainingProgram."""
    return TrainingProgram(
        variants={
            name: functools.partial(_build_trainable, build, list(stage["train"]))
            for name, build in workload.variants().items()
        },
        make_batch=functools.partial(_make_batch, workload),
        loss=workload.loss,
        count=workload.count,
        optimizer=functools.partial(_build_optimizer, stage["optimizer"]),
        blocks=workload.blocks,
        evaluate=lambda model, batch: (workload.loss(model, batch), workload.predict(model, batch)),
        save=_save,
        min_micro_batch_size=min_micro_batch_size,
    )


def _build_trainable(build: Any, patterns: list[str]) -> nn.Module:
    return freeze_all_but(build(), patterns)


def _build_optimizer(settings: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, settings)


def _make_batch(workload: Workload, size: int, _seq_len: int | None) -> Batch:
    """Cut real training rows, from the start again where there are too few."""
    return workload.batch("train", np.arange(size) % workload.num_samples("train"))


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    write_payload(folder, model.state_dict(), {"optimizer": optimizer.state_dict()})
