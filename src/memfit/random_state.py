"""Every source of random numbers that training may draw from: seed them, note them, put them back."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed every source of randomness that training may use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries draw from the global generator)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """Note where every generator stands: torch's on the host and on each card, Python's and numpy's."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put every generator back to where `random_states` found it."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002


def to_plain(states: dict[str, Any]) -> dict[str, Any]:
    """Write states with nothing but tensors, lists and numbers, as a checkpoint holds them."""
    kind, keys, *rest = states["numpy"]
    return {
        **states,
        "python": list(states["python"][1]),
        "numpy": [kind, [int(key) for key in keys], *rest],
    }


def from_plain(plain: dict[str, Any]) -> dict[str, Any]:
    """Undo `to_plain`."""
    kind, keys, *rest = plain["numpy"]
    return {
        **plain,
        "python": (3, tuple(plain["python"]), None),
        "numpy": (kind, np.array(keys, dtype=np.uint32), *rest),
    }
