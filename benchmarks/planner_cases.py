"""Four modules as training programs, sized so that the largest micro-batch that fits lies well inside the ladder."""

import argparse
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cpu_cases import OPTIMIZERS, Layer, Parts, Residual
from benchmarks.step_overhead import commit
from memfit.memory.host import num_cores, processor_title
from memfit.step import TrainingProgram

MIB = 2**20
CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A module in a size, its budget in process bytes, and its global batch."""

    name: str
    module: Callable[..., Parts]
    sizes: dict[str, int] = field(hash=False)
    budget_mib: int
    global_batch_size: int

    @property
    def budget_bytes(self) -> int:
        return self.budget_mib * MIB

    def program(self) -> TrainingProgram:
        """Build the program; nothing is allocated yet. Evaluation is the loss without gradients."""
        build, make_batch, loss, blocks = self.module(**self.sizes)
        return TrainingProgram(
            variants={"only": build},
            make_batch=make_batch,
            loss=loss,
            optimizer=lambda model: OPTIMIZERS["adamw"](model.parameters()),
            blocks=blocks,
            evaluate=loss,
        )


def _classify(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch["x"]), batch["y"])


def _parts(build: Callable[[], nn.Module], shape: tuple[int, ...], blocks: tuple[type[nn.Module], ...] = ()) -> Parts:
    def make_batch(n: int, _seq_len: int | None = None) -> dict[str, Tensor]:
        return {"x": torch.randn(n, *shape), "y": torch.randint(CLASSES, (n,))}

    return build, make_batch, _classify, blocks


class Pooled(nn.Module):
    """Mean over the positions (dimension 1), then a linear head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(dim=1))


class Gated(nn.Module):
    """Elementwise layers between small products: many bytes kept for few operations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = Residual(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def mlp(width: int, depth: int, positions: int) -> Parts:
    """Blocks applied to every position of a sample: large activations, few parameters."""
    return _parts(
        lambda: nn.Sequential(*[Gated(width) for _ in range(depth)], Pooled(width)), (positions, width), (Gated,)
    )


def encoder(width: int, layers: int, length: int) -> Parts:
    return _parts(
        lambda: nn.Sequential(*[Layer(width, causal=False) for _ in range(layers)], Pooled(width)),
        (length, width),
        (Layer,),
    )


class ConvBlock(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.GELU())


def cnn(channels: int, depth: int, size: int) -> Parts:
    """Group normalization, so that a batch may be cut; one resolution."""
    inputs = [3, *[channels] * (depth - 1)]
    return _parts(
        lambda: nn.Sequential(
            *[ConvBlock(n, channels) for n in inputs],
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, CLASSES),
        ),
        (3, size, size),
        (ConvBlock,),
    )


class Recurrent(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.cells, self.pooled = nn.LSTM(width, width, num_layers=layers, batch_first=True), Pooled(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.cells(x)[0])


def lstm(width: int, layers: int, length: int) -> Parts:
    """It has no blocks: recomputing is no lever here."""
    return _parts(lambda: Recurrent(width, layers), (length, width))


CASES = {
    case.name: case
    for case in (
        Case("mlp", mlp, {"width": 64, "depth": 24, "positions": 256}, 600, 48),
        Case("encoder", encoder, {"width": 64, "layers": 4, "length": 128}, 600, 128),
        Case("cnn", cnn, {"channels": 16, "depth": 8, "size": 64}, 700, 48),
        Case("lstm", lstm, {"width": 128, "layers": 2, "length": 128}, 600, 160),
    )
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="all, unless told")


def stamp() -> dict[str, Any]:
    """Say when, where and of what the rows are."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "device": f"{processor_title()} ({platform.machine()}), {num_cores()} cores",
        "torch": torch.__version__,
    }


def cut(total: int, size: int) -> Sequence[int]:
    """Cut a global batch into parts of one size, the rest last: what a loader of that batch size yields."""
    whole, rest = divmod(total, size)
    return [size] * whole + [rest] * (rest > 0)
