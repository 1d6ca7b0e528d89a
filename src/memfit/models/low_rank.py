"""Low-rank changes to the linear layers of a trained model (LoRA: Hu et al., 2021)."""

import copy
import fnmatch
import math
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfit.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)


class LowRankLinear(nn.Linear):
    """A linear layer and a change of rank r: weight + alpha / r * lora_b @ lora_a, which begins as none at all.

    The weight [out, in] and the bias are those of the layer given, not copies. lora_a [r, in] and lora_b [out, r] are
    in fp32 even where the weight is in half precision, for an optimizer's small steps would be lost there.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would take memory for a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features, dtype=dtype))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank, dtype=dtype))
        nn.init.normal_(self.lora_a, std=1 / math.sqrt(self.in_features))
        self.scale = alpha / rank
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        wide = x.to(self.lora_a.dtype) if self.weight.dtype != self.lora_a.dtype else x
        change = F.linear(F.linear(wide, self.lora_a), self.lora_b)
        out = F.linear(x, self.weight, self.bias)
        return out + (self.scale * change).to(out.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain layer that computes the same; its weight is a new one."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        change = self.scale * self.lora_b @ self.lora_a
        total = (self.weight.to(change.dtype) + change).to(self.weight.dtype)
        layer.weight = nn.Parameter(total, requires_grad=self.weight.requires_grad)
        layer.bias = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"{super().extra_repr()}, rank={len(self.lora_a)}"


def add_low_rank(model: Model, *, rank: int, alpha: float, targets: Iterable[str]) -> Model:
    """Give the linear layers whose names match a low-rank change, in place; return the model.

    targets: shell-style patterns of whole names, such as "*.query" or "blocks.*". A layer inside a backbone (a module
    of that name) is taken only by a pattern that has the word as well, "backbone.*.q_proj": "*" leaves it alone. Layers
    that were changed before stay as they are. What else is trained is left to the caller.
    Raises: ConfigError where no linear layer matches.
    """
    patterns = tuple(targets)
    layers = {name: module for name, module in _linears(model) if any(_matches(name, each) for each in patterns)}
    if not layers:
        known = [name for name, _ in _linears(model)]
        raise ConfigError(
            f"lora_targets: expected patterns that match a linear layer, got {list(patterns)}. Layers are named "
            f"{', '.join(known[:8]) or 'not at all: there are none'}{' ...' if len(known) > 8 else ''}."
        )
    plain = dict.fromkeys(module for module in layers.values() if not isinstance(module, LowRankLinear))
    changed = {module: LowRankLinear(module, rank=rank, alpha=alpha) for module in plain}
    for name, module in layers.items():
        if module in changed:
            model.set_submodule(name, changed[module])
    return model


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """List linear layers under all their names; not those of other subclasses, which may use their weight elsewhere."""
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in (nn.Linear, LowRankLinear):
            assert isinstance(module, nn.Linear)
            yield name, module


def _matches(name: str, pattern: str) -> bool:
    inside = "backbone" in name.split(".")
    return fnmatch.fnmatchcase(name, pattern) and (not inside or "backbone" in pattern)


def merged(model: Model) -> Model:
    """Return a copy with all low-rank changes added to their weights, and plain layers in their place, for export.

    The copy shares the memory of every other tensor with the model: a large backbone is not held twice.
    """
    shared: dict[int, object] = {id(tensor): _shared(tensor) for tensor in (*model.parameters(), *model.buffers())}
    plain = {id(module): module.merged() for module in model.modules() if isinstance(module, LowRankLinear)}
    return copy.deepcopy(model, {**shared, **plain})


def _shared(tensor: Tensor) -> Tensor:
    """Return another tensor on the same memory, so that one may move to another device and the other stays."""
    alias = tensor.detach()
    return nn.Parameter(alias, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else alias
