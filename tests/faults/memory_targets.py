"""What the children of test_out_of_memory.py run under a limit that the kernel enforces."""

import torch

from memfit.memory import enforcement
from memfit.recovery import RecoveringStep
from memfit.step import StepLayout, TrainingProgram

WIDTH, SAMPLES = 512, 24_576


def program():
    return TrainingProgram(
        build_model=lambda: torch.nn.Sequential(
            torch.nn.Linear(64, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 1), torch.nn.Flatten(0)
        ),
        make_batch=lambda n, seq_len=None: {"x": torch.ones(n, 64)},
        loss=lambda model, batch: (model(batch["x"]) - 1).square().mean(),
        optimizer=lambda model: torch.optim.AdamW(model.parameters()),
    )


def train(payload, emit):
    """Train five steps within `extra_bytes` above what the process holds at first, from `accumulation_steps` on."""
    torch.manual_seed(0)
    made = program()
    model = made.build()
    batch = {"x": torch.randn(SAMPLES, 64)}
    changes = []
    step = RecoveringStep(StepLayout(payload["accumulation_steps"]), made, model, made.optimizer(model))
    step.on_change = lambda change: changes.append(change.micro_batch_size)
    if payload["extra_bytes"]:
        enforcement.enforce_budget(enforcement.now_bytes("cpu") + payload["extra_bytes"], "cpu")
    losses = [step(batch).total for _ in range(5)]
    return {"losses": losses, "changes": changes}
