"""A model and its data, as memfit trains them. Replace what is marked; `memfit run config.toml` does the rest."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import memfit


class Net(nn.Module):
    """Replace: your model. It takes the arrays named in `inputs`, as tensors."""

    def __init__(self, hidden: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        widths = [8, *[hidden] * num_layers]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [n, 8] to a number per sample, [n]."""
        return self.head(self.body(x)).squeeze(1)  # type: ignore[no-any-return]


def prepare(data: dict[str, Any], directory: Path) -> None:
    """Replace: read your sources, and write arrays; done once, until the settings or this file change.

    `data` is the table [data] of the config. Split so that nothing of validation and test is in train.
    """
    generator = np.random.default_rng(data.get("seed", 0))
    for split, rows in (("train", data["rows"]), ("validation", data["rows"] // 5), ("test", data["rows"] // 5)):
        x = generator.normal(size=(rows, 8)).astype(np.float32)
        y = np.sin(2 * x[:, 0]) * x[:, 1] + 0.5 * x[:, 2] ** 2 + generator.normal(scale=0.1, size=rows)
        np.save(directory / f"{split}_x.npy", x)
        np.save(directory / f"{split}_y.npy", y.astype(np.float32))


def build(directory: Path) -> memfit.Task:
    """Say what is trained. It may also take `data` and `loss`: the tables of the config."""
    splits = {
        split: {name: np.load(directory / f"{split}_{name}.npy", mmap_mode="r") for name in ("x", "y")}
        for split in ("train", "validation", "test")
    }
    return memfit.Task(
        model=Net,  # called with the settings in [model]
        splits=splits,
        inputs=("x",),
        loss=lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"]),
        predict=lambda model, x: {"y_predicted": model(x)},
        score=score,
        baselines=baselines,
        facts={"unit": "", "headline": "mae"},
    )


def score(truth: dict[str, Any], predictions: dict[str, Any]) -> dict[str, float]:
    """Say how good the predictions of a split are."""
    errors = predictions["y_predicted"] - truth["y"]
    return {"mae": np.abs(errors).mean(), "rmse": np.sqrt((errors**2).mean())}


def baselines(train: Any, split: Any) -> dict[str, dict[str, Any]]:
    """The simplest guesses: a model that does not beat them has learned nothing."""
    return {"train_mean": {"y_predicted": np.full(len(split["y"]), np.mean(train["y"]), dtype=np.float32)}}
