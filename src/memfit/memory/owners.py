"""Whose a storage is: of which module, as what; by looking at the models and optimizers of this process."""

import gc
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from memfit.memory.roofline import flat_tensors

_STATE_COPIES = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adadelta": 2, "Adagrad": 1, "Rprop": 2,
                 "RMSprop": 1, "ASGD": 1, "Muon": 1, "Adafactor": 0}  # fmt: skip


@dataclass
class Owners:
    """Whose a storage is, by its key."""

    storages: dict[int, tuple[str, int]] = field(default_factory=dict)
    trainable: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Key of a trained parameter's storage -> (device, bytes)."""

    def add(self, tensors: Any, category: str, owner: int) -> None:
        """Note storages that nobody owns yet; what is no tensor is passed over."""
        for tensor in flat_tensors(tensors):
            with suppress(NotImplementedError, RuntimeError):  # no storage: sparse, or a subclass's own
                self.storages.setdefault(tensor.untyped_storage()._cdata, (category, owner))

    def add_parameter(self, parameter: Tensor, owner: int) -> None:
        """Note a parameter and its gradient."""
        self.add((parameter,), "parameters", owner)
        self.add((parameter.grad,), "gradients", owner)
        if parameter.requires_grad:
            with suppress(NotImplementedError, RuntimeError):
                storage = parameter.untyped_storage()
                self.trainable[storage._cdata] = (str(storage.device), storage.nbytes())


def instances(kind: type) -> list[Any]:
    """Find all objects of a kind in this process."""
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]


def qualified_names(modules: list[nn.Module]) -> dict[int, str]:
    """Name modules as in their model; those of all models but the largest have its class before them."""
    inner = {id(child) for module in modules for child in module.children()}
    roots = [module for module in modules if id(module) not in inner]
    roots.sort(key=lambda root: -sum(parameter.nbytes for parameter in root.parameters()))
    names: dict[int, str] = {}
    for index, root in enumerate(roots):
        kind = type(root).__name__
        for name, module in root.named_modules():
            path = name if index == 0 else f"{kind}.{name}"
            names.setdefault(id(module), path if name else f"({kind})")
    return names


def find_owners(modules: list[nn.Module], optimizers: list[Optimizer]) -> Owners:
    """Note what models and optimizers own: what comes first keeps it."""
    owners = Owners()
    for module in modules:
        for parameter in module.parameters(recurse=False):
            owners.add_parameter(parameter, id(module))
        owners.add(tuple(module.buffers(recurse=False)), "buffers", id(module))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owners.add_parameter(parameter, 0)
        for trained, state in optimizer.state.items():
            owner = owners.storages.get(_key(trained), ("", 0))[1]
            owners.add(state.values() if isinstance(state, dict) else (), "optimizer_state", owner)
    return owners


def _key(tensor: Any) -> int:
    return tensor.untyped_storage()._cdata if isinstance(tensor, Tensor) else 0


def expected_state(optimizers: list[Optimizer], trainable: int) -> int:
    """Predict the state of one optimizer of torch over all trained parameters, in bytes; 0 for unknown kinds."""
    if len(optimizers) != 1:
        return 0
    optimizer = optimizers[0]
    settings = optimizer.defaults
    copies = _STATE_COPIES.get(type(optimizer).__name__, 0)
    extra = bool(settings.get("amsgrad")) + bool(settings.get("centered"))
    if type(optimizer).__name__ in ("SGD", "RMSprop"):
        extra += bool(settings.get("momentum"))
    return (copies + extra) * trainable


def repeated_blocks(modules: list[nn.Module], names: dict[int, str]) -> dict[str, list[str]]:
    """List repeated modules that have parts of their own, by class: what activation checkpointing may wrap."""
    found: dict[str, list[str]] = {}
    for module in modules:
        if any(True for _ in module.children()) and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            found.setdefault(type(module).__name__, []).append(names[id(module)])
    return {kind: paths for kind, paths in found.items() if len(paths) > 1}
