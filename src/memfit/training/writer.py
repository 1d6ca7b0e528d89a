"""Checkpoints written by a thread while training goes on, or at once where memory has no room for a second copy."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memfit.memory import enforcement
from memfit.memory.host import host_memory
from memfit.memory.plan import HEADROOM, Plan
from memfit.process import is_out_of_memory
from memfit.recovery import release_memory
from memfit.step import map_tensors, tensors_of
from memfit.training.checkpoint import prune, save_checkpoint

Contents = tuple[Mapping[str, Tensor], dict[str, Any], dict[str, Any], tuple[str, ...]]
"""What `save_checkpoint` takes: weights, state, record, links."""


def room_for_copies(plan: Plan) -> int:
    """Count the bytes on the host that are free for copies while a stage trains: on a CPU, what its budget leaves."""
    free = host_memory().free_bytes
    if torch.device(plan.device).type != "cpu":
        return free
    peak = max(plan.measured_peak_bytes or 0, enforcement.peak_bytes(plan.device))
    return min(free, int(plan.budget_bytes * (1 - HEADROOM)) - peak)


@dataclass
class CheckpointWriter:
    """Writes one checkpoint at a time into a folder, and removes those that are no longer kept.

    As a context manager it ends with the last write done. What a write raises is raised by the next call. A write that
    runs out of memory is repeated once, by itself, with what could be released.
    """

    checkpoints: Path
    keep: int
    device: str
    room: Callable[[], int]
    """Says how many bytes of host memory a copy may take."""
    copies: bool = True
    """False: every write waits."""
    _thread: threading.Thread | None = field(default=None, init=False)
    _error: Exception | None = field(default=None, init=False)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None:
            self._thread.join()

    def write(self, contents: Contents, *, wait: bool) -> None:
        """Write a checkpoint; with `wait`, or where a copy of it has no room, it is durable on return."""
        self.finish()
        copied = self._copy(contents) if self.copies and not wait else None
        if copied is None:
            self._save(contents)
        else:
            self._thread = threading.Thread(target=self._save_later, args=(copied,), name="checkpoint")
            self._thread.start()

    def give_way(self) -> bool:
        """End the write under way and copy nothing from now on; tell whether a copy was held."""
        held, self.copies = self._thread is not None, False
        self.finish()
        return held

    def check(self) -> None:
        """Raise what the write under way raised, without waiting for it."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the write under way. Raises: what it raised."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error

    def _copy(self, contents: Contents) -> Contents | None:
        weights, state, record, links = contents
        weight_bytes = sum(tensor.nbytes for tensor in weights.values())
        needed = 2 * weight_bytes + sum(tensor.nbytes for tensor in tensors_of(state))  # writing copies weights again
        if needed > self.room():
            return None
        try:
            copied = {name: _on_host(tensor) for name, tensor in weights.items()}
            return copied, map_tensors(_on_host, state), record, links
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        copied = {}
        release_memory(self.device)
        return None

    def _save_later(self, contents: Contents) -> None:
        try:
            self._save(contents)
        except Exception as error:  # noqa: BLE001  (raised again where training next looks)
            self._error = error.with_traceback(None)  # which would hold the copy

    def _save(self, contents: Contents) -> None:
        try:
            save_checkpoint(self.checkpoints, *contents)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release_memory(self.device)  # what was being written is gone again: once more, with all there is
            save_checkpoint(self.checkpoints, *contents)
        prune(self.checkpoints, self.keep)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
