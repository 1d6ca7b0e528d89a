"""Which kernel scaled dot product attention takes on a device, and that kernel's operator."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memfit.memory.devices import Device


@dataclass(frozen=True)
class Attention:
    """One call of scaled dot product attention; shapes query [..., heads, L, E], key and value [..., heads, S, E]."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    p: float
    causal: bool
    scale: float | None
    gqa: bool

    def kernel(self, device: Device) -> str:
        """Choose as torch does (aten/.../transformers/cuda/sdp_utils.cpp): flash, efficient, math."""
        if self.q.dim() != 4 or not self.q.dtype.is_floating_point:
            return "math"
        if device.kind == "cpu":
            return "flash_cpu" if self._suits_flash_on_cpu() else "math"
        capability = device.compute_capability or (0, 0)
        half = self.q.dtype in (torch.float16, torch.bfloat16)
        if "flash" in device.attention_kernels and half and self._suits_flash(capability):
            return "flash"
        width, alignment = self.q.shape[-1], 8 if half and capability >= (7, 0) else 4 if capability >= (8, 0) else 1
        aligned = width == self.k.shape[-1] and not (width % alignment or self.v.shape[-1] % alignment)
        allowed = self.q.dtype != torch.bfloat16 or capability >= (8, 0)
        grouped = self.gqa and self.q.shape[1] != self.k.shape[1]
        return (
            "efficient" if "efficient" in device.attention_kernels and aligned and allowed and not grouped else "math"
        )

    def _suits_flash_on_cpu(self) -> bool:
        """Tell what torch 2.13 decides in aten/.../transformers/sdp_utils_cpp.cpp; grouped heads are fine."""
        operands = (self.q, self.k, self.v)
        if self.p or (self.mask is not None and self.mask.requires_grad):
            return False
        same = all(each.shape[-1] == self.q.shape[-1] and each.stride(-1) == 1 for each in operands)
        return same and all(each.shape[-2] for each in operands)

    def _suits_flash(self, capability: tuple[int, int]) -> bool:
        width, same = self.q.shape[-1], self.q.shape[-1] == self.k.shape[-1] == self.v.shape[-1]
        if capability < (8, 0) or self.mask is not None or not same or width > 256:
            return False
        if self.causal and self.q.shape[-2] != self.k.shape[-2]:
            return False
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (self.q, self.k, self.v))
        small_chip = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)  # too little shared memory to go backward
        return not (trains and small_chip) or width <= 192 or (width > 224 and self.p == 0)

    def run(self, kernel: str, func: Any) -> Tensor:
        """Call the kernel's own operator, whose backward pass is known to autograd."""
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (self.q, self.k, self.v))
        if kernel == "flash":
            out = torch.ops.aten._scaled_dot_product_flash_attention(
                self.q, self._grouped(self.k), self._grouped(self.v), self.p, self.causal, False, scale=self.scale
            )[0]
        elif kernel == "efficient":
            out = torch.ops.aten._scaled_dot_product_efficient_attention(
                self.q, self.k, self.v, self._bias(), needs_grad, self.p, self.causal, scale=self.scale
            )[0]
        elif kernel == "flash_cpu":
            mask = self.mask
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=self.q.dtype).masked_fill_(mask, -math.inf)
            out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                self.q, self.k, self.v, 0.0, self.causal, attn_mask=mask, scale=self.scale
            )[0]
        else:
            out = func(
                self.q, self.k, self.v, attn_mask=self.mask, dropout_p=self.p, is_causal=self.causal, scale=self.scale,
                enable_gqa=self.gqa,
            )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    def _grouped(self, keys: Tensor) -> Tensor:
        heads = self.q.shape[1]
        return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], 1)

    def _bias(self) -> Tensor | None:
        mask = self.mask
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=self.q.dtype).masked_fill_(mask, -math.inf)
        if mask.shape[-1] % 8:  # the kernel wants aligned rows: a padded copy
            mask = torch.nn.functional.pad(mask, (0, 8 - mask.shape[-1] % 8))[..., : mask.shape[-1]]
        return mask.expand(self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2])
