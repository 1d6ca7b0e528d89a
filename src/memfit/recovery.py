"""A training step that comes through running out of memory: the same global batch again, in smaller pieces.

Nothing of the failed attempt stays: gradients, random states and buffers go back to where the step began, so the step
that succeeds is the one of a run that was told to use its layout from there on.
"""

import ctypes
import gc
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from memfit.errors import DoesNotFitError, MemfitError
from memfit.process import is_out_of_memory
from memfit.random_state import random_states, set_random_states
from memfit.step import Batch, TrainingStep, checkpoint_blocks, num_ranks, num_samples

MAX_SPLITS = 5
"""How often a batch is cut into smaller micro-batches before another lever is pulled."""
CLEAN_STEPS = 200
"""Steps without a shortage after which the former micro-batch is tried once more."""


class UpdateInterruptedError(MemfitError):
    """Say that memory ran out in the update: weights and optimizer state may be half new, and must not be used."""


@dataclass(frozen=True)
class Change:
    """A layout that was changed in flight, and why."""

    reason: str
    """"out_of_memory", "allocator_retries", "budget_shrunk" or "grown"."""
    phase: str
    message: str
    accumulation_steps: int
    checkpointing: str
    micro_batch_size: int


@dataclass
class InFlight:
    """What became of the planned layout: plain values, kept in every checkpoint."""

    accumulation_steps: int
    checkpointing: str
    splits: int = 0
    clean_steps: int = 0
    before_split: int = 0
    """Accumulation steps before the last split, if they may be tried once more."""
    grown: bool = False
    retries: int = 0
    """Steps in a row in which CUDA's allocator had to give back its cache to go on."""


@dataclass
class RecoveringStep(TrainingStep):
    """A TrainingStep that repeats itself with less memory where memory runs out.

    Each shortage halves the micro-batch, up to MAX_SPLITS times and down to the program's smallest; then activation
    checkpointing is turned on; then it gives up with DoesNotFitError, nothing of the model changed by the failed step.
    A shortage in the update raises UpdateInterruptedError: go back to a checkpoint, as `TrainingStep` cannot be
    repeated from there. Under torch.distributed all ranks change together.
    """

    on_change: Callable[[Change], None] = lambda _change: None
    """Told of every change before the step goes on."""
    relieve: Callable[[], bool] = lambda: False
    """Asked first where memory ran out: frees what is held beside the step, and tells whether there was anything."""
    clean_steps: int = CLEAN_STEPS
    state: InFlight = field(init=False)
    _changing: set[str] | None = field(default=None, init=False)
    """Buffers that a step was seen to change; None before the first step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.state = InFlight(self.layout.accumulation_steps, self.layout.checkpointing)

    def __call__(self, batch: Batch) -> Any:
        """Train on one global batch, however often it takes."""
        self._grow_once(self._size(batch))
        before = _allocator_retries(self.layout.device)
        stats = super().__call__(batch)
        self.state.clean_steps += 1
        retried = _allocator_retries(self.layout.device) > before
        self.state.retries = self.state.retries + 1 if retried else 0
        if self.state.retries == 2 and self._can_split(self._size(batch)):  # the next one may fail
            message = "the allocator gave back its cache in two steps in a row"
            self._split(self._size(batch), "allocator_retries", "train_step", message)
        return stats

    def gradients(self, batch: Batch, counts: Mapping[str, float] | None, size: int) -> dict[str, Tensor]:
        """Add up the gradients of a global batch, in smaller pieces where memory runs out."""
        moment = _Moment.of(self.model, self._changing)
        while True:
            message = ""
            try:
                sums = super().gradients(batch, counts, size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error)[:300] or type(error).__name__
            if not _any_rank(bool(message), self.layout.device):  # outside the handler: a traceback pins tensors
                self._changing = moment.changed(self.model, self._changing)
                return sums
            sums = {}
            self.optimizer.zero_grad(set_to_none=True)
            moment.put_back(self.model)
            relieved = _any_rank(self.relieve(), self.layout.device)
            release_memory(self.layout.device)
            if not relieved:
                message = message or "memory ran out on another rank"
                self.shrink(self._size(batch), "out_of_memory", "train_step", message)

    def update(self) -> tuple[Tensor, bool]:
        """Update the weights. Raises: UpdateInterruptedError where memory runs out, on any rank; never repeats."""
        message = ""
        try:
            done = super().update()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = str(error)[:300] or type(error).__name__
        if _any_rank(bool(message), self.layout.device):
            raise UpdateInterruptedError(message or "memory ran out on another rank")
        return done

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on with the layout of a checkpoint: `asdict(step.state)` of when it was written."""
        self.state = InFlight(**state)
        self._lay_out()

    def can_shrink(self, size: int) -> bool:
        """Tell whether there is a layout with less memory for a global batch of `size`."""
        return self._can_split(size) or self._can_checkpoint()

    def shrink(self, size: int, reason: str, phase: str, message: str) -> None:
        """Pull the next lever for a global batch of `size`, between two steps; after an update that ran out, once a
        checkpoint from before it is restored. Raises: DoesNotFitError where there is none.
        """
        if self._can_split(size):
            self._split(size, reason, phase, message)
        elif self._can_checkpoint():
            self.state.checkpointing = "blocks"
            self._change(size, reason, phase, message)
        else:
            raise DoesNotFitError(
                f"{phase}: expected a global batch of {size} samples to fit in pieces, ran out of memory even with "
                f"micro-batches of {self._micro(size)}, checkpointing {self.state.checkpointing}: {message} "
                "End other processes, or allow more: a lower precision, a lighter variant."
            )

    def _can_checkpoint(self) -> bool:
        return self.state.checkpointing == "none" and bool(self.program.blocks)

    def _can_split(self, size: int) -> bool:
        smallest = max(self.program.min_micro_batch_size, 1)
        return self.state.splits < MAX_SPLITS and self.program.decomposes and self._micro(size) > smallest

    def _split(self, size: int, reason: str, phase: str, message: str) -> None:
        state, micro = self.state, max(self._micro(size) // 2, self.program.min_micro_batch_size, 1)
        state.before_split = 0 if state.grown else state.accumulation_steps
        state.accumulation_steps, state.splits = math.ceil(size / micro), state.splits + 1
        self._change(size, reason, phase, message)

    def _grow_once(self, size: int) -> None:
        """Try the micro-batch before the last split once more, when long enough nothing ran out."""
        state = self.state
        if state.before_split and state.clean_steps >= self.clean_steps:
            state.accumulation_steps, state.before_split, state.grown = state.before_split, 0, True
            state.splits -= 1
            self._change(size, "grown", "train_step", f"nothing ran out in {state.clean_steps} steps")

    def _change(self, size: int, reason: str, phase: str, message: str) -> None:
        self.state.clean_steps = self.state.retries = 0
        self._lay_out()
        levers = self.state.accumulation_steps, self.state.checkpointing
        self.on_change(Change(reason, phase, message, *levers, self._micro(size)))

    def _lay_out(self) -> None:
        levers: dict[str, Any] = {name: getattr(self.state, name) for name in ("accumulation_steps", "checkpointing")}
        names = {each.name for each in fields(self.layout)}  # type: ignore[arg-type]
        if "micro_batch_size" in names:
            levers["micro_batch_size"] = self._micro(self.layout.global_batch_size)  # type: ignore[attr-defined]
        self.layout = replace(self.layout, **levers)  # type: ignore[type-var]
        if self.layout.checkpointing == "blocks":
            checkpoint_blocks(self.model, self.program.blocks)

    def _size(self, batch: Batch) -> int:
        """Count the samples of a whole global batch: the last one of an epoch may be smaller."""
        return max(num_samples(batch), getattr(self.layout, "global_batch_size", 0) // num_ranks())

    def _micro(self, size: int) -> int:
        return math.ceil(size / self.state.accumulation_steps)


@dataclass(frozen=True)
class _Moment:
    """What a forward pass may change besides gradients, as it was when a step began."""

    random: dict[str, Any]
    buffers: dict[str, Tensor]
    versions: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, changing: set[str] | None) -> "_Moment":
        """Note random states, and those buffers that steps are known to change; all of them before the first."""
        named = dict(model.named_buffers())
        kept = {name: buffer.clone() for name, buffer in named.items() if changing is None or name in changing}
        return cls(random_states(), kept, {name: buffer._version for name, buffer in named.items()})

    def changed(self, model: nn.Module, changing: set[str] | None) -> set[str]:
        """Name the buffers that steps change; kernels do not always count what they write, so values are compared."""
        named = dict(model.named_buffers())
        if changing is None:
            changing = {name for name, value in self.buffers.items() if not torch.equal(named[name], value)}
        return changing | {name for name, buffer in named.items() if buffer._version != self.versions.get(name)}

    @torch.no_grad()
    def put_back(self, model: nn.Module) -> None:
        """Undo what an attempt did."""
        set_random_states(self.random)
        named = dict(model.named_buffers())
        for name, value in self.buffers.items():
            named[name].copy_(value)


def release_memory(device: str) -> None:
    """Give back what nothing holds any more: to the device, and on a CPU to the system."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _allocator_retries(device: str) -> int:
    if torch.device(device).type != "cuda":
        return 0
    return int(torch.cuda.memory_stats_as_nested_dict(device).get("num_alloc_retries", 0))


def _any_rank(failed: bool, device: str) -> bool:
    """Vote before any other collective: one rank that ran out makes all of them repeat."""
    if num_ranks() == 1:
        return failed
    vote = torch.tensor([float(failed)], device=device)
    torch.distributed.all_reduce(vote)
    return bool(vote.item())
