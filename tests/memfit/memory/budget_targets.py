"""What the children of test_budget.py run under a budget; copied to where they can import it."""

import numpy as np
import torch
from torch import nn

from memfit.memory import enforcement
from memfit.process import is_out_of_memory

MIB = 2**20
MODELS = {
    "dense": lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1))(torch.ones(32, 64)),
    "convolution": lambda: nn.Conv2d(3, 16, 3)(torch.ones(4, 3, 32, 32)),
    "attention": lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)(torch.ones(4, 16, 64)),
}


def fill(payload, emit):
    """Take ever smaller blocks until the budget refuses them, drop them, and show that the process still works."""
    zeros = np.zeros(payload["lazy_bytes"], np.uint8)  # mapped, and touched only below
    enforcement.enforce_budget(payload["budget_bytes"], "cpu")
    MODELS[payload["model"]]().sum().backward()
    blocks, refused = [], None
    for size in (64 * MIB, 8 * MIB, MIB):
        try:
            while True:
                blocks.append(torch.ones(size // 4))
        except RuntimeError as error:
            refused = str(error) if is_out_of_memory(error) else None
    taken = sum(block.nbytes for block in blocks)
    zeros += 1
    peak = enforcement.peak_bytes("cpu")
    blocks.clear()
    again = float(torch.ones(64 * MIB // 4).sum())
    return {"taken": taken, "refused": refused, "again": again, "peak_bytes": peak}


def peaks(payload, emit):
    """Measure the peak with a block held, and again after a reset without it."""
    held = torch.ones(256 * MIB // 4)
    high, now = enforcement.peak_bytes("cpu"), enforcement.now_bytes("cpu")
    del held
    enforcement.reset_peak("cpu")
    return {"high": high, "now": now, "low": enforcement.peak_bytes("cpu")}
