"""Faults at chosen allocations, and stages of the tiny series to put them into."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memfit.step import TrainingStep
from memfit.training import checkpoint, evaluate

# The stages of the training tests, trained in this process.
from tests.memfit.training.conftest import attempts, no_limits  # noqa: F401

REFUSED = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried for"
"""What torch says on a CPU."""


class AllocationFault(TorchDispatchMode):
    """Counts operators that make new memory, and fails at one of them as torch's allocator does."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {tensor.untyped_storage()._cdata for tensor in _tensors([args, kwargs or {}])}
        result = function(*args, **(kwargs or {}))
        made = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in before]
        if made:
            self.count += 1
            if self.count == self.at:
                raise RuntimeError(f"{REFUSED} {made[0].nbytes} bytes.")
        return result


def _tensors(found: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]


class Faults:
    """Says at which call of a phase, and at which of its allocations, memory runs out; and counts what there were."""

    def __init__(self) -> None:
        self.wanted: dict[str, list[tuple[int, int]]] = {}
        """phase -> [(the call, counted over the whole run; the allocation within it)]."""
        self.calls: dict[str, int] = {}
        self.allocations: dict[str, int] = {}
        """phase -> the most allocations that a call of it had."""
        self.raised = 0

    def at(self, phase: str, call: int, allocation: int) -> None:
        self.wanted.setdefault(phase, []).append((call, allocation))

    @contextmanager
    def around(self, phase: str) -> Iterator[None]:
        call = self.calls[phase] = self.calls.get(phase, 0) + 1
        at = next((allocation for wanted, allocation in self.wanted.get(phase, []) if wanted == call), None)
        with AllocationFault(at) as fault:
            try:
                yield
            except RuntimeError as error:
                self.raised += REFUSED in str(error)
                raise
            finally:
                self.allocations[phase] = max(self.allocations.get(phase, 0), fault.count)


@pytest.fixture
def faults(monkeypatch) -> Faults:
    """Put faults around a step's forward and backward passes, its update, evaluation, and the checkpoint write."""
    found = Faults()

    def wrap(owner: Any, name: str, phase: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def wrapped(*arguments, **settings):
            with found.around(phase):
                return original(*arguments, **settings)

        monkeypatch.setattr(owner, name, wrapped)

    wrap(TrainingStep, "gradients", "train_step")
    wrap(TrainingStep, "update", "update")
    wrap(evaluate, "evaluate_split", "evaluate")
    wrap(checkpoint, "write_payload", "save")
    return found
