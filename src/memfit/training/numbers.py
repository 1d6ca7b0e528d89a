"""Where numbers go bad: the first layer, or else the first gradient, that is not finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memfit.step import Batch, TrainingStep, num_samples, term_counts


def first_bad(step: TrainingStep, batch: Batch) -> str:
    """Train on a batch again, without the update, and name what is first not finite; the model stays as it is.

    Random states are those of now: with dropout the masks are others than they were.
    """
    with _watching(step.model) as found:
        step.gradients(batch, term_counts(step.program, batch), num_samples(batch))
    named = {name: parameter.grad for name, parameter in step.model.named_parameters() if parameter.grad is not None}
    bad = [name for name, gradient in named.items() if not _finite(gradient)]
    step.optimizer.zero_grad(set_to_none=True)
    if found:
        return f"first in the output of {found[0]}"
    if bad:
        return f"first in gradients: of {bad[-1]!r} and {len(bad) - 1} more"  # they are computed from the last on
    return "not seen again when the batch was repeated"


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[str]]:
    """Collect the layers whose output is not finite while their input is, as they run."""
    found: list[str] = []

    def look(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not all(map(_finite, tree_leaves(output))):
                found.append(f"{name!r} ({type(module).__name__})")

        return module.register_forward_hook(hook)

    leaves = {name: module for name, module in model.named_modules() if not any(module.children())}
    handles = [look(name or "the model", module) for name, module in leaves.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())
