"""Larger language models that compute what the smaller ones did: weights, and optimizer moments, carried over.

Function-preserving transformations: Net2Net (Chen et al., 2016), for transformers Gesmundo and Maile, 2023. The
residual stream is widened with zeros: what writes into it has zeros for the new channels, what reads it is drawn anew
there, and so are inner units, whose outputs are multiplied with zeros at first. New blocks, at the end, write zeros.
"""

import fnmatch
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from memfit.models.language import LanguageModel

BACKBONE = "backbone."


def grow(
    tensors: Mapping[str, Tensor], model: LanguageModel, role: Literal["weight", "moment", "square"]
) -> dict[str, Tensor]:
    """Carry tensors of the parameters of a smaller model, by name, over to a larger one of the same kind.

    tensors: values ("weight"), or an optimizer's means of gradients ("moment") or of their squares ("square"). Of
    weights, all of the new model's are returned; of the others, those of parameters that the smaller model had: new
    entries of a mean are 0, of a mean of squares the old entries' mean.
    """
    found = {}
    for name, new in model.state_dict().items():
        if name in tensors:
            old = _as_norm(tensors[name], new, role) if _is_norm(model, name) else tensors[name]
            found[name] = _pasted(old, _canvas(new, old, role, writes=_writes(model, name)))
        elif role == "weight":
            found[name] = torch.zeros_like(new) if _writes(model, name) else new.clone()
    return found


def _as_norm(old: Tensor, new: Tensor, role: str) -> Tensor:
    """Scale gains as the root mean square shrinks where channels of zeros are added; gradients the other way."""
    shrink = math.sqrt(old.numel() / new.numel())
    scaled: Tensor = old * {"weight": shrink, "moment": 1 / shrink, "square": 1 / shrink**2}[role]
    return scaled


def _canvas(new: Tensor, old: Tensor, role: str, *, writes: bool) -> Tensor:
    """Make what stands where the smaller model had nothing."""
    if role == "square":
        return torch.full_like(new, float(old.mean()))
    return torch.zeros_like(new) if writes or role == "moment" else new.clone()


def _pasted(old: Tensor, canvas: Tensor) -> Tensor:
    canvas[tuple(slice(size) for size in old.shape)] = old.to(canvas)
    return canvas


def _writes(model: LanguageModel, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in model.writers)


def _is_norm(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.RMSNorm)


def become_backbone(tensors: Mapping[str, Tensor], model: nn.Module, role: str) -> dict[str, Tensor]:
    """Carry a model's weights over to experts as their frozen backbone; nothing of it is trained on."""
    if role != "weight":
        return {}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state | {BACKBONE + name: tensor.to(state[BACKBONE + name].dtype) for name, tensor in tensors.items()}
