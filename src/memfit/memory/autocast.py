"""Autocast on tensors that hold no memory: torch has none for `meta`, so it is applied from its operator lists."""

from typing import Any

import torch
from torch import Tensor


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operators that autocast runs in the lower precision and in fp32; source: "CUDA Ops / CPU Ops that can autocast" in
# torch's documentation of torch.amp, and aten/src/ATen/autocast_mode.h. Other operators follow their inputs.
_LOWER = _words("""
    __matmul__ __rmatmul__ addbmm addmm addmv addr baddbmm bmm chain_matmul linear matmul mm mv conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc convolution prelu multi_dot einsum linalg_vecdot
    scaled_dot_product_attention lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    """)
_CUDA_ONLY_LOWER = frozenset(("prelu", "mv", "addmv", "addr"))
_CUDA_FP32 = _words("""
    __pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cosh cosine_embedding_loss
    cdist cosine_similarity cumprod cumsum dist erfinv exp expm1 group_norm hinge_embedding_loss kl_div l1_loss
    layer_norm native_layer_norm log log10 log_softmax log1p log2 margin_ranking_loss mse_loss
    multilabel_margin_loss multi_margin_loss nll_loss nll_loss_nd cross_entropy_loss huber_loss norm pdist
    poisson_nll_loss pow prod reciprocal renorm rsqrt sinh smooth_l1_loss soft_margin_loss softmax sum softplus tan
    triplet_margin_loss rms_norm logsumexp frobenius_norm nuclear_norm linalg_vector_norm linalg_matrix_norm
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
    upsample_bicubic2d _upsample_bicubic2d_aa
    """)
_CPU_FP32 = _words("""
    avg_pool3d binary_cross_entropy grid_sampler polar prod quantile nanquantile stft cdist trace view_as_complex
    cholesky inverse pinverse mse_loss cosine_embedding_loss nll_loss nll_loss_nd hinge_embedding_loss
    poisson_nll_loss smooth_l1_loss cross_entropy_loss l1_loss huber_loss margin_ranking_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss ctc_loss kl_div multilabel_margin_loss binary_cross_entropy_with_logits
    """)
_PROMOTE = _words("""
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put scatter_add tensordot index_copy
    """)


class Autocast:
    """The autocast regions that are open, as (enabled, dtype), and the casts of parameters made in them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.stack: list[tuple[bool, torch.dtype]] = []
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        self._fp32 = _CUDA_FP32 if kind == "cuda" else _CPU_FP32
        self._lower = _LOWER if kind == "cuda" else _LOWER - _CUDA_ONLY_LOWER

    @property
    def dtype(self) -> torch.dtype | None:
        """The lower precision of the innermost region, or None outside of any."""
        return self.stack[-1][1] if self.stack and self.stack[-1][0] else None

    def leave(self) -> None:
        """Close a region; the outermost one forgets its casts."""
        self.stack.pop()
        if not self.stack:
            self._casts.clear()

    def apply(self, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Cast the arguments of operator `name` as the innermost region does."""
        lower = self.dtype
        if lower is None:
            return args, kwargs
        if name in self._lower:
            dtype = lower
        elif name in self._fp32 and kwargs.get("dtype") is None:
            dtype = torch.float32
        elif name in _PROMOTE:
            floats = [value.dtype for value in args if isinstance(value, Tensor) and value.is_floating_point()]
            dtype = torch.float32 if torch.float32 in floats else lower
        else:
            return args, kwargs
        return self.cast(tuple(args), dtype), {key: self.cast(value, dtype) for key, value in kwargs.items()}

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """Cast floating tensors on the device; casts of parameters are kept for the region, as torch does."""
        if isinstance(value, list | tuple):
            return type(value)(self.cast(item, dtype) for item in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        if value.device.type != "meta":
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = (value, value.to(dtype))
        return self._casts[id(value)][1]
