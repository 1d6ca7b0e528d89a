"""Whether a program's loss is what it is taken for: found out on a few real samples, before anything is planned."""

import math

import torch
from torch import Tensor

from memfit.errors import ConfigError
from memfit.memory.plan import Candidate
from memfit.step import Batch, TrainingProgram, loss_terms

_SAME = 1e-3
"""Relative difference up to which two losses are the same number; single precision is far better."""


def check_loss(program: TrainingProgram, candidate: Candidate) -> None:
    """Run the loss on two samples and on each of them alone, on the CPU, and compare.

    Raises: ConfigError where the loss is not finite, has no graph, is not a tensor, is a sum where a mean is
    expected, or does not decompose over samples.
    """
    size = 2 * program.min_micro_batch_size
    with torch.random.fork_rng(devices=[]):
        batch = program.batch(size, candidate.seq_len)
        model = program.build(candidate.variant)
        _check_value(program, model.train(), batch)
        if program.decomposes and program.count is None and _is_scalar(program, model.eval(), batch):
            _check_mean(program, model, batch, size // 2)


def _is_scalar(program: TrainingProgram, model: torch.nn.Module, batch: Batch) -> bool:
    assert program.loss is not None
    return isinstance(program.loss(model, batch), Tensor)  # with gradients: a penalty on them may be part of it


def _check_value(program: TrainingProgram, model: torch.nn.Module, batch: Batch) -> None:
    for name, value in loss_terms(program, model, batch).items():
        if not isinstance(value, Tensor) or value.dim():
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"loss {name!r}: expected a tensor without dimensions, got {got}. Reduce it.")
        if not torch.isfinite(value):
            raise ConfigError(
                f"loss {name!r}: expected a finite number, got {value.item()}. Check make_batch and loss."
            )
        if not value.requires_grad:
            raise ConfigError(
                f"loss {name!r}: expected a value that parameters can be trained with, got one without a graph. "
                "Do not detach it, and leave some parameters trainable."
            )


def _check_mean(program: TrainingProgram, model: torch.nn.Module, batch: Batch, half: int) -> None:
    """A mean over the samples is the mean of its halves; a sum is twice that; anything else does not decompose."""

    def value(part: Batch) -> float:
        assert program.loss is not None
        loss = program.loss(model, part)
        assert isinstance(loss, Tensor)
        return float(loss.detach())

    whole, parts = value(batch), [value(part) for part in program.split(batch, [half, half])]
    mean = sum(parts) / 2
    if math.isclose(whole, mean, rel_tol=_SAME, abs_tol=1e-6):
        return
    if math.isclose(whole, 2 * mean, rel_tol=_SAME, abs_tol=1e-6):
        raise ConfigError(
            f"loss: expected a mean over the samples, got a sum: {whole:.6g} for two halves of {parts[0]:.6g} and "
            f"{parts[1]:.6g}. Return the mean, or a sum per term ({{'loss': value}}) with count={{'loss': n}}."
        )
    raise ConfigError(
        f"loss: expected a mean over the samples, got {whole:.6g} for two halves of {parts[0]:.6g} and {parts[1]:.6g}. "
        "If it counts something else than samples (tokens, masked positions), return sums per term and give count; "
        "if it compares samples with each other, declare decomposes=False: then a batch is never cut."
    )
