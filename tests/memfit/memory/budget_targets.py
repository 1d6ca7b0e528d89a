"""What the children of test_budget.py run under a budget; copied to where they can import it."""

import torch

from memfit.memory import budget
from memfit.process import is_out_of_memory

MIB = 2**20


def fill(payload, emit):
    """Take blocks until the budget refuses one, drop them, and show that the process still works."""
    budget.enforce_budget(payload["budget_bytes"], "cpu")
    blocks, refused = [], None
    try:
        for _ in range(100):
            blocks.append(torch.ones(64 * MIB // 4))
    except RuntimeError as error:
        refused = str(error) if is_out_of_memory(error) else None
    taken = len(blocks)
    blocks.clear()
    again = float(torch.ones(64 * MIB // 4).sum())
    return {"taken": taken, "refused": refused, "again": again, "peak_bytes": budget.peak_bytes("cpu")}


def peaks(payload, emit):
    """Measure the peak with a block held, and again after a reset without it."""
    held = torch.ones(256 * MIB // 4)
    high, now = budget.peak_bytes("cpu"), budget.now_bytes("cpu")
    del held
    budget.reset_peak("cpu")
    return {"high": high, "now": now, "low": budget.peak_bytes("cpu")}
