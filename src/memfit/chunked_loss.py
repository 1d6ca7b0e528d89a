"""Cross-entropy of a linear layer over a large vocabulary, without ever holding all of its logits.

A program whose loss calls `linear_cross_entropy` gives memfit one more exact lever: rows are taken in chunks, and the
backward pass computes a chunk's logits again. One implementation for every torch: the one that torch has from 2.13 on
ignores autocast, knows no label smoothing, and hides from a simulation what it allocates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memfit.errors import ConfigError

CHUNK_ELEMENTS = 2**24
"""Logits of one chunk, 64 MiB in fp32; two of them are held at once."""
MIN_CHUNK_ROWS = 128
"""Fewer rows would leave a GPU idle: every chunk reads and writes the gradient of the whole weight."""
_REDUCTIONS = ("sum", "mean")


@dataclass
class _State:
    enabled: bool = False
    used: bool = False


# Of the process, not of a context: autograd's own threads, which recompute checkpointed blocks, must see the same.
_state = _State()


@contextmanager
def chunking(enabled: bool) -> Iterator[None]:
    """Turn chunks on or off, in all threads; enter it around forward and backward pass alike."""
    before, _state.enabled = _state.enabled, enabled
    try:
        yield
    finally:
        _state.enabled = before


def used() -> bool:
    """Tell whether `linear_cross_entropy` was called since `reset_used`."""
    return _state.used


def reset_used() -> None:
    """Forget earlier calls."""
    _state.used = False


def chunk_rows(num_classes: int) -> int:
    """Say how many rows one chunk has."""
    return max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // num_classes)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "sum",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return F.cross_entropy(F.linear(hidden, weight, bias), target, ...), in chunks where `chunking` is on.

    hidden [..., E], weight [V, E], bias [V], target [...] with class numbers; the result is a scalar. A weight in half
    precision takes products with wider rows in its own precision, and the loss in fp32, as autocast does.
    reduction: "sum", or "mean" over the targets that are not ignored.
    Raises: ConfigError for another reduction, and where hidden and target differ in shape.
    """
    if reduction not in _REDUCTIONS:
        raise ConfigError(f"reduction: expected one of {_REDUCTIONS}, got {reduction!r}. Sum, and weigh afterwards.")
    if hidden.shape[:-1] != target.shape:
        raise ConfigError(
            f"target: expected a class number for each row of hidden, {list(hidden.shape[:-1])}, got a shape of "
            f"{list(target.shape)}. Give hidden [..., E] and target [...]."
        )
    _state.used = True
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).long()
    lower = _autocast_dtype(hidden.device.type) or _half(weight, hidden)
    if not _state.enabled or len(rows) <= chunk_rows(len(weight)):
        narrow = lower is not None and lower == weight.dtype
        logits = F.linear(rows.to(weight.dtype), weight, bias).float() if narrow else F.linear(rows, weight, bias)
        return F.cross_entropy(
            logits, labels, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
        )
    head = _Head(ignore_index, label_smoothing, lower)
    loss: Tensor = _Chunked.apply(head, rows, weight, bias, labels)  # type: ignore[no-untyped-call]
    if reduction == "mean":
        loss = loss / (labels != ignore_index).sum()
    return loss.to(hidden.dtype) if head.lower is None else loss


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    available = torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if available and torch.is_autocast_enabled(device_type) else None


def _half(weight: Tensor, hidden: Tensor) -> torch.dtype | None:
    """Return the precision of a weight that is narrower than the rows."""
    return weight.dtype if torch.finfo(weight.dtype).bits < torch.finfo(hidden.dtype).bits else None


@dataclass(frozen=True)
class _Head:
    """How rows become a loss; autocast is applied by hand, since the backward pass runs outside of its region."""

    ignore_index: int
    label_smoothing: float
    lower: torch.dtype | None
    """Precision of the matrix products under autocast; None: that of the tensors."""

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor if self.lower is None else tensor.to(self.lower)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Sum over a chunk's rows; autocast takes the loss in fp32."""
        logits = logits if self.lower is None else logits.float()
        return F.cross_entropy(
            logits, target, reduction="sum", ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )

    def slope(self, logits: Tensor, target: Tensor, gradient: Tensor) -> Tensor:
        """Differentiate `loss` times `gradient`: softmax less the smoothed target, zero where a row is ignored."""
        kept = target != self.ignore_index
        slope = torch.softmax(logits if self.lower is None else logits.float(), dim=1)
        slope.scatter_add_(1, (target * kept)[:, None], slope.new_full((len(target), 1), self.label_smoothing - 1))
        slope.sub_(self.label_smoothing / slope.shape[1]).mul_((kept * gradient)[:, None])
        return slope.to(logits.dtype)


class _Chunked(torch.autograd.Function):
    """Keeps only its inputs; the backward pass takes the gradient of one chunk's logits at a time.

    Gradients are taken in the backward pass, not ahead of it, so that fp16 sees them scaled as the loss is.
    """

    @staticmethod
    def forward(ctx: Any, head: _Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, target)
        lower_weight, lower_bias = head.cast(weight), None if bias is None else head.cast(bias)
        total = hidden.new_zeros((), dtype=_wide(hidden))
        for rows, labels in _chunks(len(weight), hidden, target):
            total += head.loss(F.linear(head.cast(rows), lower_weight, lower_bias), labels)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        head, (hidden, weight, bias, target) = ctx.head, ctx.saved_tensors
        lower_weight, lower_bias = head.cast(weight), None if bias is None else head.cast(bias)
        _, for_hidden, for_weight, for_bias, _ = ctx.needs_input_grad
        hidden_gradient = torch.empty_like(hidden) if for_hidden else None
        weight_sum = torch.zeros_like(weight, dtype=_wide(weight)) if for_weight else None
        bias_sum = torch.zeros_like(bias, dtype=_wide(bias)) if for_bias else None
        for rows, labels, place in _chunks(len(weight), hidden, target, hidden_gradient):
            lower_rows = head.cast(rows)
            slope = head.slope(F.linear(lower_rows, lower_weight, lower_bias), labels, gradient)
            if place is not None:
                place.copy_(slope @ lower_weight)
            if weight_sum is not None:
                _add_product(weight_sum, slope.T, lower_rows)
            if bias_sum is not None:
                bias_sum += slope.sum(0, dtype=bias_sum.dtype)
        return (
            None,
            hidden_gradient,
            None if weight_sum is None else weight_sum.to(weight.dtype),
            None if bias_sum is None else bias_sum.to(bias.dtype),
            None,
        )


def _chunks(num_classes: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Cut tensors into views of as many rows as a chunk has."""
    rows, count = chunk_rows(num_classes), len(next(tensor for tensor in tensors if tensor is not None))
    for start in range(0, count, rows):
        yield tuple(None if tensor is None else tensor[start : start + rows] for tensor in tensors)


def _wide(tensor: Tensor) -> torch.dtype:
    """Sums over chunks are taken in fp32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
