"""What a device's kernels keep and cast, told to tensors that hold no memory.

On the `meta` device torch takes the plainest way through an operator: attention keeps its whole matrix, dropout a mask
of floats, recurrent nets every gate. Here those operators are sent the way that the wanted device goes. Autocast is
applied from its documented operator lists, since torch has none for `meta`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_config
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from memfit.memory.devices import Device


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
_RNN_MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
_RESERVED_PER_CELL = {"rnn_relu": 2, "rnn_tanh": 2, "lstm": 6, "gru": 5}
"""Values per hidden unit, step and direction that the fused recurrent kernels keep for the backward pass."""
_MODULES_THAT_ASK = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch.autograd")


class Autocast:
    """The autocast regions that are open, as (enabled, dtype), and the casts of parameters made in them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.stack: list[tuple[bool, torch.dtype]] = []
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def dtype(self) -> torch.dtype | None:
        """The lower precision of the innermost region, or None outside of any."""
        return self.stack[-1][1] if self.stack and self.stack[-1][0] else None

    def leave(self) -> None:
        """Close a region; the outermost one forgets its casts."""
        self.stack.pop()
        if not self.stack:
            self._casts.clear()

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


class Kernels(TorchFunctionMode):
    """Sends operators the way that the wanted device's kernels go."""

    def __init__(
        self,
        device: Device,
        is_host: Callable[[Tensor], bool],
        on_move: Callable[[Tensor], None] = lambda _tensor: None,
    ) -> None:
        super().__init__()
        self.device = device
        self.autocast = Autocast(device.kind)
        self._is_host = is_host
        self._on_move = on_move
        self._factories = _device_constructors()
        cuda = device.kind == "cuda"
        self._fp32 = _CUDA_FP32 if cuda else _CPU_FP32
        self._lower = _LOWER if cuda else _LOWER - _CUDA_ONLY_LOWER

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Rewrite devices, apply autocast, pick the kernel."""
        kwargs = _to_meta(kwargs) if kwargs else {}
        name = getattr(func, "__name__", "")
        if func in self._factories and "device" not in kwargs:
            return self._make(func, args, kwargs)
        if name in ("to", "cuda", "cpu"):
            return self._move(func, name, args, kwargs)
        if self.autocast.dtype is not None:
            args, kwargs = self._precision(name, args, kwargs, self.autocast.dtype)
        special = getattr(self, "_" + name, None) if name in _SPECIAL else None
        return special(func, args, kwargs) if special else func(*args, **kwargs)

    def _make(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Make a tensor on the default device, which on a CPU is the pretended one; single numbers stay real."""
        if self.device.kind != "cpu":
            return func(*args, **kwargs)
        made = func(*args, **kwargs, device="meta")
        return func(*args, **kwargs) if made.dim() == 0 else made

    def _precision(self, name: str, args: Any, kwargs: dict[str, Any], lower: torch.dtype) -> tuple[Any, Any]:
        if name in self._lower:
            dtype = lower
        elif name in self._fp32 and kwargs.get("dtype") is None:
            dtype = torch.float32
        elif name in _PROMOTE:
            floats = [value.dtype for value in args if isinstance(value, Tensor) and value.is_floating_point()]
            dtype = torch.float32 if torch.float32 in floats else lower
        else:
            return args, kwargs
        return self.autocast.cast(tuple(args), dtype), {
            key: self.autocast.cast(value, dtype) for key, value in kwargs.items()
        }

    def _move(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        if name == "cuda":
            return self._arrived(tensor, None) if self._is_host(tensor) else tensor
        if name == "cpu":
            return tensor.detach()
        args = tuple(_to_meta(args))
        wanted = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, str | torch.device)]
        if wanted and torch.device(wanted[0]).type == "meta" and self._is_host(tensor):
            dtypes = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
            return self._arrived(tensor, dtypes[0] if dtypes else None)
        return func(*args, **kwargs)

    def _arrived(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        moved = torch.empty_like(tensor, device="meta", dtype=dtype)
        self._on_move(moved)
        return moved

    def _dropout(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x, p, train = _bind(("input", "p", "train"), args, kwargs)
        if self.device.kind == "cuda" and train and 0 < p < 1 and x.numel():
            return torch.native_dropout(x, p, True)[0]
        return func(x, p, train)

    def _scaled_dot_product_attention(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        q, k, v, mask, p, causal, scale, gqa = _bind(names, args, kwargs)
        call = _Attention(q, k, v, mask, p or 0.0, bool(causal), scale, bool(gqa))
        return call.run(call.kernel(self.device), func)

    def _lstm(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return self._recurrent("lstm", func, args, kwargs)

    def _gru(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return self._recurrent("gru", func, args, kwargs)

    def _rnn_tanh(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return self._recurrent("rnn_tanh", func, args, kwargs)

    def _rnn_relu(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return self._recurrent("rnn_relu", func, args, kwargs)

    def _recurrent(self, mode: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a whole recurrent stack as one fused kernel: outputs, states and one reserve for the backward pass."""
        packed = isinstance(args[1], Tensor) and not isinstance(args[2], Tensor | list | tuple | bool)
        if packed or kwargs:
            return func(*args, **kwargs)
        if self.device.kind == "cpu":
            plain = mode != "lstm" or args[1][0].shape != args[1][1].shape  # a projected one is not oneDNN's
            return func(*args) if plain else _onednn_lstm(*args)
        x, hidden, flat, _bias, layers, dropout, train, bidirectional, _batch_first = args
        h, c = hidden if mode == "lstm" else (hidden, hidden)
        settings = (mode, layers, dropout if train else 0.0, 2 if bidirectional else 1)
        outputs = _FusedRecurrent.apply(settings, x, h, c, *flat)  # type: ignore[no-untyped-call]
        return outputs if mode == "lstm" else outputs[:2]


_SPECIAL = frozenset(("dropout", "scaled_dot_product_attention", *_RNN_MODES))


def _bind(names: tuple[str, ...], args: Any, kwargs: dict[str, Any]) -> list[Any]:
    bound = dict(zip(names, args, strict=False)) | kwargs
    return [bound.get(name) for name in names]


def _to_meta(values: Any) -> Any:
    """Replace a CUDA device among arguments: the tensors that stand for it are on `meta`."""
    if isinstance(values, dict):
        return {key: _to_meta(value) for key, value in values.items()}
    if isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        return type(values)(_to_meta(value) for value in values)
    if isinstance(values, torch.device) and values.type == "cuda":
        return torch.device("meta")
    if isinstance(values, str) and values.startswith("cuda"):
        return "meta"
    return values


class _Attention:
    """One call of scaled dot product attention; shapes query [..., heads, L, E], key and value [..., heads, S, E]."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: Any, gqa: bool
    ) -> None:
        self.q, self.k, self.v, self.mask, self.p, self.causal, self.scale, self.gqa = (
            q,
            k,
            v,
            mask,
            p,
            causal,
            scale,
            gqa,
        )

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


class _FusedRecurrent(torch.autograd.Function):
    """Stand-in for cuDNN's recurrent operator: keeps input, output, weights and one reserve."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Any:
        """Allocate what the operator returns and what it keeps; x is [steps, batch, input] or batch first."""
        mode, layers, dropout, directions = settings
        rows = x.shape[0] * x.shape[1]
        weight_buffer = x.new_empty(sum(weight.numel() for weight in weights))
        output = x.new_empty((*x.shape[:2], h.shape[-1] * directions))
        hn, cn = torch.empty_like(h), torch.empty_like(c)
        masks = (layers - 1) * rows * directions * h.shape[-1] if dropout else 0
        reserve = x.new_empty(_RESERVED_PER_CELL[mode] * layers * directions * rows * c.shape[-1] + masks)
        ctx.save_for_backward(x, h, c, output, reserve, weight_buffer, *weights)
        return output, hn, cn

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        """Allocate a gradient for each input; those of the weights are parts of one buffer."""
        x, h, c, _output, _reserve, buffer, *weights = ctx.saved_tensors
        parts = torch.empty_like(buffer).split([weight.numel() for weight in weights])
        shaped = [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
        return None, torch.empty_like(x), torch.empty_like(h), torch.empty_like(c), *shaped


def _onednn_lstm(
    x: Tensor,
    hidden: Any,
    weights: Any,
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM as torch does on a CPU: one oneDNN kernel for each layer and direction, in training too.

    Source: mkldnn_rnn in aten/src/ATen/native/mkldnn/RNN.cpp.
    """
    x = (x.transpose(0, 1) if batch_first else x).contiguous()
    directions, last = 2 if bidirectional else 1, []
    for layer in range(layers):
        outputs = []
        for cell in range(layer * directions, (layer + 1) * directions):
            count = 4 if has_biases else 2
            of_cell = weights[cell * count : (cell + 1) * count]
            output, *states = _OneDnnLstm.apply(x, hidden[0][cell], hidden[1][cell], *of_cell)  # type: ignore[no-untyped-call]
            outputs.append(output)
            last.append(states)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < layers - 1:
            x = torch.dropout(x, dropout, True)
    h, c = (torch.stack(states) for states in zip(*last, strict=True))
    return x.transpose(0, 1) if batch_first else x, h, c


class _OneDnnLstm(torch.autograd.Function):
    """Stand-in for oneDNN's LSTM layer: x is [steps, batch, inputs]; keeps a workspace for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Any:
        """Allocate what the layer returns, keeps, and holds while it runs: relaid weights and the gates."""
        output = x.new_empty((*x.shape[:2], h.shape[-1]))
        hn, cn = torch.empty_like(h), torch.empty_like(c)
        forward_bytes, _ = _lstm_workspace(x, h.shape[-1])
        workspace = x.new_empty(forward_bytes, dtype=torch.uint8)
        _while_it_runs = _lstm_scratch(x, weights, h.shape[-1], backward=False)
        ctx.save_for_backward(x, h, c, output, hn, cn, workspace, *weights)
        return output, hn, cn

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        """Allocate gradients, in fp32 whatever the precision; the workspace's second part is written only now."""
        x, h, c, *_, workspace = ctx.saved_tensors[:7]
        weights = ctx.saved_tensors[7:]
        _, backward_bytes = _lstm_workspace(x, h.shape[-1])
        _written_now = workspace.new_empty(backward_bytes)
        gradients = [torch.empty_like(tensor, dtype=torch.float32) for tensor in (x, h, c, *weights)]
        _while_it_runs = _lstm_scratch(x, weights, h.shape[-1], backward=True)
        return tuple(gradients)


def _lstm_workspace(x: Tensor, hidden: int) -> tuple[int, int]:
    """Return the bytes of one layer's workspace that its forward pass writes, and those that its backward pass does.

    Forward: gates and cell states; backward: the gradients of outputs, inputs, hidden and cell states. What is reserved
    for other layers and directions stays unwritten, so it is not resident. Source: set_workspace_sizes in
    src/cpu/rnn/rnn_utils.hpp of oneDNN 3; which parts are written was measured, for four shapes in fp32 and bf16.
    """
    steps, batch, inputs = x.shape
    item, states = x.element_size(), (steps + 1) * batch
    forward = steps * batch * _padded(4 * hidden, item) + states * hidden
    return forward * item, states * (3 * _padded(max(inputs, hidden), 4) + hidden) * 4


def _padded(size: int, item: int) -> int:
    """Pad a row to 64 bytes, and further where rows would fall on the same cache lines (get_good_ld in oneDNN)."""
    line = 64 // item
    size = -(-size // line) * line
    return size + line if size % 256 == 0 else size


def _lstm_scratch(x: Tensor, weights: Any, hidden: int, *, backward: bool) -> list[Tensor]:
    """Allocate what oneDNN holds while a layer runs: weights with padded rows, and the gates of all steps in fp32.

    In bf16 no such gates were seen; the backward pass takes a copy of the outputs' gradients in fp32 in place of them.
    """
    rows, single = x.shape[0] * x.shape[1], x.dtype == torch.float32
    padded = [matrix.shape[1] * _padded(matrix.shape[0], 4) for matrix in weights if matrix.dim() == 2]
    held = [x.new_empty(size) for size in padded]
    if backward:
        held += [x.new_empty(size, dtype=torch.float32) for size in padded]
    if single or backward:
        held.append(x.new_empty(rows * (_padded(4 * hidden, 4) if single else hidden), dtype=torch.float32))
    return held


@contextmanager
def pretend(kernels: Kernels) -> Iterator[None]:
    """Make torch on `meta` act as on the wanted device, for what a function mode cannot reach."""
    regions, cuda = kernels.autocast, kernels.device.kind == "cuda"

    def begin(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, **_ignored: Any) -> None:
        lower = dtype or (torch.float16 if cuda else torch.bfloat16)
        self.meant = device_type in (kernels.device.kind, "meta")
        self.region = (enabled and self.meant, lower)

    def enter(self: Any) -> Any:
        if self.meant:
            regions.stack.append(self.region)
        return self

    def leave(self: Any, *_error: Any) -> None:
        if self.meant:
            regions.leave()

    foreach = [*torch.utils._foreach_utils._get_foreach_kernels_supported_devices(), *(["meta"] if cuda else [])]
    region = torch.amp.autocast_mode.autocast
    changes: list[tuple[Any, str, Any]] = [
        (region, "__init__", begin),
        (region, "__enter__", enter),
        (region, "__exit__", leave),
        (torch, "is_autocast_enabled", lambda *_device: regions.dtype is not None),
        (torch, "get_autocast_dtype", lambda *_device: regions.dtype or torch.float16),
        (torch.amp, "is_autocast_available", lambda _device: True),
        (import_module("torch.optim.optimizer"), "_get_foreach_kernels_supported_devices", lambda: foreach),
        (torch.utils._foreach_utils, "_get_foreach_kernels_supported_devices", lambda: foreach),
        (symbolic_config, "meta_nonzero_assume_all_nonzero", True),
    ]
    # Functions written in Python hand themselves over whole, and what they call would then go unseen: make them go on.
    for module in map(import_module, _MODULES_THAT_ASK):
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            changes += [(module, name, lambda *_args: False)] * hasattr(module, name)
    with ExitStack() as stack:
        for target, name, value in changes:
            stack.callback(setattr, target, name, getattr(target, name))
            setattr(target, name, value)
        yield
