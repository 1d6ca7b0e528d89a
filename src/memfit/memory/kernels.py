"""What a device's kernels keep and cast, told to tensors that hold no memory.

On the `meta` device torch takes the plainest way through an operator: attention keeps its whole matrix, dropout a mask
of floats, recurrent nets every gate. Here those operators are sent the way that the wanted device goes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_config
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from memfit.memory.attention import Attention
from memfit.memory.autocast import Autocast
from memfit.memory.devices import Device
from memfit.memory.recurrent import RNN_MODES, FusedRecurrent, onednn_lstm

_MODULES_THAT_ASK = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch.autograd")


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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Rewrite devices, apply autocast, pick the kernel."""
        kwargs = _to_meta(kwargs) if kwargs else {}
        name = getattr(func, "__name__", "")
        if func in self._factories and "device" not in kwargs:
            return self._make(func, args, kwargs)
        if name in ("to", "cuda", "cpu"):
            return self._move(func, name, args, kwargs)
        args, kwargs = self.autocast.apply(name, args, kwargs)
        special = getattr(self, "_" + name, None) if name in _SPECIAL else None
        return special(func, args, kwargs) if special else func(*args, **kwargs)

    def _make(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Make a tensor on the default device, which on a CPU is the pretended one; single numbers stay real."""
        if self.device.kind != "cpu":
            return func(*args, **kwargs)
        made = func(*args, **kwargs, device="meta")
        return func(*args, **kwargs) if made.dim() == 0 else made

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
        call = Attention(q, k, v, mask, p or 0.0, bool(causal), scale, bool(gqa))
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
            return func(*args) if plain else onednn_lstm(*args)
        x, hidden, flat, _bias, layers, dropout, train, bidirectional, _batch_first = args
        h, c = hidden if mode == "lstm" else (hidden, hidden)
        settings = (mode, layers, dropout if train else 0.0, 2 if bidirectional else 1)
        outputs = FusedRecurrent.apply(settings, x, h, c, *flat)  # type: ignore[no-untyped-call]
        return outputs if mode == "lstm" else outputs[:2]


_SPECIAL = frozenset(("dropout", "scaled_dot_product_attention", *RNN_MODES))


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
        (torch._C, "_is_any_autocast_enabled", lambda: regions.dtype is not None),
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
