"""The state of a stage's training: everything that a resumed run must find again."""

import math
import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from memfit.step import TrainingStep
from memfit.training.optimizers import Schedule


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
    epochs_since_best: int = 0
    seconds: float = 0.0
    """Training time so far, over all attempts."""
    events_bytes: int = 0
    """Length of the event log when the checkpoint was written."""
    sums: dict[str, float] = field(default_factory=dict)
    """Train losses of the epoch under way, summed over samples."""
    samples: int = 0
    """Samples of the epoch under way."""

    def improves(self, value: float | None, mode: str) -> bool:
        """Tell whether a monitored value is the best so far; one that is undefined or not a number never is."""
        if value is None or math.isnan(value):
            return False
        return self.best_value is None or (value < self.best_value if mode == "min" else value > self.best_value)


def sample_order(num_samples: int, *, seed: int, stage: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch's samples: a pure function of seed, stage and epoch."""
    return np.random.default_rng([seed, stage, epoch]).permutation(num_samples)


def seed_everything(seed: int) -> None:
    """Seed every source of randomness that training may use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries draw from the global generator)
    torch.manual_seed(seed)


def capture(step: TrainingStep, schedule: Schedule, progress: Progress) -> dict[str, Any]:
    """Collect the state of optimizer, scaler, schedule, random generators and progress."""
    return {
        "optimizer": step.optimizer.state_dict(),
        "scaler": step.scaler.state_dict(),
        "schedule": schedule.state_dict(),
        "progress": asdict(progress),
        "random": {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": list(random.getstate()[1]),
            "numpy": _numpy_state(),
        },
    }


def restore(state: dict[str, Any], step: TrainingStep, schedule: Schedule) -> Progress:
    """Put a captured state back; the model's weights are the caller's to load first."""
    step.optimizer.load_state_dict(state["optimizer"])
    step.scaler.load_state_dict(state["scaler"])
    schedule.load_state_dict(state["schedule"])
    generators = state["random"]
    torch.set_rng_state(generators["torch"])
    if generators["cuda"]:
        torch.cuda.set_rng_state_all(generators["cuda"])
    random.setstate((3, tuple(generators["python"]), None))
    kind, keys, position, has_gauss, gauss = generators["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    return Progress(**state["progress"])


def _numpy_state() -> list[Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [kind, [int(key) for key in keys], *rest]
