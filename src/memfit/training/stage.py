"""The state of a stage's training: everything that a resumed run must find again."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from memfit.random_state import from_plain, random_states, set_random_states, to_plain
from memfit.recovery import RecoveringStep
from memfit.training.optimizers import Schedule, parameter_names


@dataclass
class Progress:
    """Where a stage stands. Plain values: it goes into the checkpoint and the events."""

    epoch: int = 0
    """Epochs completed."""
    batch: int = 0
    """Global batches completed of the epoch under way."""
    step: int = 0
    """Optimizer steps completed."""
    best_value: float | None = None
    best_epoch: int = 0
    best_step: int = 0
    """Of the checkpoint with the best weights so far; 0: none yet."""
    epochs_since_best: int = 0
    seconds: float = 0.0
    """Training time so far, over all attempts."""
    stall_seconds: float = 0.0
    """Of that, what training waited for checkpoints."""
    events_bytes: int = 0
    """Length of the event log when the checkpoint was written."""
    sums: dict[str, float] = field(default_factory=dict)
    """Train losses of the epoch under way, summed over samples."""
    samples: int = 0
    """Samples of the epoch under way."""
    eval_batch_size: int = 0
    """What evaluation came down to where memory ran out; 0: as planned."""
    bad_steps: list[list[int]] = field(default_factory=list)
    """Samples of the last steps in a row whose numbers were not finite."""
    norms: list[float] = field(default_factory=list)
    """What `SpikeGuard` remembers, as the next."""
    spikes_in_a_row: int = 0
    skipped: int = 0
    """Updates that were skipped as spikes."""
    health: dict[str, Any] = field(default_factory=dict)
    """What `HealthWatch` has seen of the epoch under way: plain values and a tensor of flags."""

    def improves(self, value: float | None, mode: str) -> bool:
        """Tell whether a monitored value is the best so far; one that is undefined or not a number never is."""
        if value is None or math.isnan(value):
            return False
        return self.best_value is None or (value < self.best_value if mode == "min" else value > self.best_value)


def sample_order(num_samples: int, *, seed: int, stage: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch's samples: a pure function of seed, stage and epoch."""
    return np.random.default_rng([seed, stage, epoch]).permutation(num_samples)


def capture(step: RecoveringStep, schedule: Schedule, progress: Progress) -> dict[str, Any]:
    """Collect the state of optimizer, scaler, schedule, random generators, layout and progress."""
    return {
        "optimizer": step.optimizer.state_dict(),
        "optimizer_kind": type(step.optimizer).__name__,
        "parameters": parameter_names(step.model, step.optimizer),
        "scaler": step.scaler.state_dict(),
        "schedule": schedule.state_dict(),
        "progress": asdict(progress),
        "random": to_plain(random_states()),
        "layout": asdict(step.state),
    }


def restore(state: dict[str, Any], step: RecoveringStep, schedule: Schedule) -> Progress:
    """Put a captured state back; the model's weights are the caller's to load first."""
    step.optimizer.load_state_dict(state["optimizer"])
    step.scaler.load_state_dict(state["scaler"])
    schedule.load_state_dict(state["schedule"])
    step.resume(state["layout"])
    set_random_states(from_plain(state["random"]))
    return Progress(**state["progress"])
