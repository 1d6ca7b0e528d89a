"""Optimizers and learning-rate schedules by name, on torch's own."""

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from memfit.errors import ConfigError

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}


def build_optimizer(model: nn.Module, settings: Mapping[str, Any]) -> Optimizer:
    """Build `settings["name"]` over the trainable parameters; weight decay spares biases and norms (1-d)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = settings.get("weight_decay", 0.0)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    extra = {k: v for k, v in settings.items() if k not in ("name", "weight_decay")}
    if "betas" in extra:
        extra["betas"] = tuple(extra["betas"])
    return OPTIMIZERS[settings["name"]]([group for group in groups if group["params"]], **extra)


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Name the optimizer's parameters in the order in which its state counts them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def freeze_all_but(model: nn.Module, patterns: list[str]) -> nn.Module:
    """Leave trainable only the parameters whose name matches one of the shell-style patterns.

    What the model froze when it was built, such as a shared backbone, stays frozen.
    Raises: ConfigError for a pattern that matches nothing, and where nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            heads = sorted({name.split(".")[0] for name in names})
            raise ConfigError(f"train: {pattern!r} matches no parameter. Top-level modules are {heads}; try 'name.*'.")
    for name, parameter in model.named_parameters():
        matches = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(parameter.requires_grad and matches)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"train: expected patterns of parameters to train, got {patterns}: the model has those frozen."
        )
    return model


class Schedule:
    """A learning-rate schedule: stepped after every update, told the monitored value after every epoch."""

    def __init__(self, optimizer: Optimizer, settings: Mapping[str, Any], total_steps: int, mode: str) -> None:
        self.plateau: lr_scheduler.ReduceLROnPlateau | None = None
        self.factor: lr_scheduler.LambdaLR | None = None
        if settings["name"] == "plateau":
            self.plateau = lr_scheduler.ReduceLROnPlateau(
                optimizer, "min" if mode == "min" else "max", factor=settings["factor"], patience=settings["patience"]
            )
        else:
            self.factor = lr_scheduler.LambdaLR(optimizer, lr_factor(settings, total_steps))

    def after_step(self) -> None:
        """Advance by one optimizer step."""
        if self.factor is not None:
            self.factor.step()

    def after_epoch(self, value: float) -> None:
        """Tell a plateau schedule the monitored value."""
        if self.plateau is not None:
            self.plateau.step(value)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return (self.plateau or self.factor).state_dict()  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state."""
        (self.plateau or self.factor).load_state_dict(state)  # type: ignore[union-attr]


def lr_factor(settings: Mapping[str, Any], total_steps: int) -> Callable[[int], float]:
    """Return step -> factor of the stage's lr, for constant, cosine and step schedules with linear warm-up."""
    warm_up = int(settings.get("warmup_steps", 0))
    name = settings["name"]

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        if name == "cosine":
            done = min(1.0, (step - warm_up) / max(1, total_steps - warm_up))
            floor = settings["final_factor"]
            return float(floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
        if name == "step":
            return float(settings["factor"] ** ((step - warm_up) // settings["every_steps"]))
        return 1.0

    return factor
