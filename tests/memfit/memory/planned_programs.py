"""Programs that the planner's children build; copied to where they can import them."""

import time

import torch
from torch import nn

from memfit.step import TrainingProgram

WIDTH, SPREAD = 32, 40960


class Block(nn.Module):
    """Cheap arithmetic, but 160 KiB of activations per sample."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SPREAD))

    def forward(self, x):
        return x + (x.new_ones(len(x), SPREAD) * self.weight).mean(dim=1, keepdim=True)


def mean_square(model, batch):
    """A micro-step costs 20 ms however small it is, so that larger ones are always faster."""
    time.sleep(0.02)
    return model(batch["x"]).pow(2).mean()


def net():
    return nn.Sequential(*[Block() for _ in range(8)], nn.Linear(WIDTH, 1))


def blocks(arguments):
    """Eight blocks: checkpointing them saves most of the memory."""
    return TrainingProgram(
        variants={"only": net},
        make_batch=lambda n, _seq_len: {"x": torch.ones(n + arguments.get("too_many", 0), WIDTH)},
        loss=mean_square,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4),
        blocks=(Block,),
        evaluate=lambda model, batch: model(batch["x"]),
        save=lambda model, _optimizer, folder: torch.save(model.state_dict(), folder / "weights.pt"),
    )


def hungry_evaluation(arguments):
    """Trains in little memory, and needs far more for an evaluation batch."""

    def evaluate(model, batch):
        return torch.ones(len(batch["x"]) * arguments["bytes_per_sample"] // 4)

    plain = blocks(arguments)
    return TrainingProgram(
        variants=plain.variants,
        make_batch=plain.make_batch,
        loss=plain.loss,
        optimizer=plain.optimizer,
        evaluate=evaluate,
    )


def broken(arguments):
    """Fails for a reason that is not memory."""

    def loss(model, batch):
        raise ValueError("the labels do not match the logits")

    return TrainingProgram(
        variants={"only": net},
        make_batch=lambda n, _seq_len: {"x": torch.ones(n, WIDTH)},
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )


class Wide(nn.Module):
    """A residual block that keeps 1.5 MiB per 1024 steps of a sequence."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def wide_net(num_blocks):
    return nn.Sequential(*[Wide() for _ in range(num_blocks)], nn.Linear(64, 1))


def sequences(arguments):
    """A plain net on sequences that any device can be asked about: four blocks, or one."""
    return TrainingProgram(
        variants={"only": lambda: wide_net(4), "light": lambda: wide_net(1)},
        make_batch=lambda n, seq_len: {"x": torch.ones(n, seq_len or 1024, 64)},
        loss=lambda model, batch: model(batch["x"]).pow(2).mean(),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4),
        blocks=(Wide,),
        evaluate=(lambda model, batch: model(batch["x"])) if arguments.get("evaluates", True) else None,
    )


def summed(arguments):
    """Returns a sum where a mean is expected."""
    plain = blocks(arguments)
    return TrainingProgram(
        variants=plain.variants,
        make_batch=plain.make_batch,
        loss=lambda model, batch: model(batch["x"]).pow(2).sum(),
        optimizer=plain.optimizer,
    )
