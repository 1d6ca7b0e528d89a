"""Notices, between two steps, that there is less memory than the next one takes: another process, a lower limit."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from memfit.memory import enforcement
from memfit.memory.host import host_memory
from memfit.memory.plan import HEADROOM, Plan
from memfit.recovery import RecoveringStep, release_memory

EVERY_SECONDS = 1.0
"""How often the memory at hand is looked at; a look took 0.4 ms on a CPU with two cores."""


def memory_at_hand(device: str) -> int:
    """Count the bytes that this process may hold by now: what it has, and what is free around it."""
    if torch.device(device).type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return enforcement.now_bytes(device) + max(host_memory().free_bytes, 0)


@dataclass
class MemoryWatch:
    """Makes a step smaller before memory that has gone makes it fail, and keeps the process within what is left.

    What the step takes is its planned or measured peak, the larger one; of a smaller one it is taken that what grows
    with the micro-batch shrinks with it. Where nothing smaller is left, or the estimate was too low, the limit on the
    process turns the shortage into one that `RecoveringStep` comes through.
    """

    plan: Plan
    step: RecoveringStep
    relieve: Callable[[], bool]
    """Frees what is held beside the step; tells whether there was anything."""
    _looked: float = field(default=float("-inf"), init=False)
    _peak_before: int = field(init=False)
    _expected: int = field(init=False)
    """Bytes that the step takes with its present layout, as far as known."""
    _limit: int = field(init=False)

    def __post_init__(self) -> None:
        self._peak_before = enforcement.peak_bytes(self.plan.device)
        self._expected = self.plan.measured_peak_bytes or 0
        self._scale(self.plan.accumulation_steps / self.step.state.accumulation_steps)  # a resumed one may be smaller
        self._limit = self.plan.budget_bytes

    def _scale(self, share: float) -> None:
        """Take it that what a step holds beyond what lies there between steps shrinks with the micro-batch."""
        held = enforcement.now_bytes(self.plan.device)
        self._expected = min(self._expected, held + int(max(self._expected - held, 0) * share))

    def __call__(self) -> None:
        """Look at the memory at hand, if it is time to; call it between two steps."""
        now = time.monotonic()
        if now - self._looked < EVERY_SECONDS:
            return
        self._looked = now
        device = self.plan.device
        peak = enforcement.peak_bytes(device)
        if peak > self._peak_before:
            self._expected, self._peak_before = max(self._expected, peak), peak
        at_hand = min(memory_at_hand(device), self.plan.budget_bytes)
        if self._expected > at_hand:
            self._shrink(at_hand)
        elif self._limit < at_hand:
            self._enforce(at_hand)

    def _shrink(self, at_hand: int) -> None:
        self.relieve()
        release_memory(self.plan.device)
        message = (
            f"{at_hand / 2**20:.0f} MiB were at hand, and a step takes {self._expected / 2**20:.0f} MiB: another "
            "process took memory, or a limit was lowered"
        )
        while self._expected > at_hand * (1 - HEADROOM) and self.step.can_shrink(self.plan.global_batch_size):
            before = self.step.state.accumulation_steps
            self.step.shrink(self.plan.global_batch_size, "budget_shrunk", "train_step", message)
            self._scale(before / self.step.state.accumulation_steps)
        self._enforce(at_hand)

    def _enforce(self, at_hand: int) -> None:
        if abs(at_hand - self._limit) > HEADROOM * self._limit or at_hand == self.plan.budget_bytes:
            self._limit = at_hand
            enforcement.enforce_budget(at_hand, self.plan.device)
