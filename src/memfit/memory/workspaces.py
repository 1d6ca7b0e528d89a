"""What kernels take while they run, beyond their outputs, and what libraries keep: by device."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memfit.memory.devices import Device

MIB = 2**20
_MATMULS = frozenset(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::mv", "aten::dot"))
_CONVOLUTIONS = frozenset(("aten::convolution", "aten::convolution_backward"))
_OPTIMIZER_IMPORTS = 77 * MIB
"""Resident bytes that the first optimizer brings: torch.optim wraps its steps with torch._dynamo, which imports sympy.

Measured with torch 2.13 and CPython 3.11: 72 MiB when it is made, 5 MiB with its first step.
"""
_PLAIN_CHANNELS = 3
_KERNEL_CODE = 10 * MIB
"""Pages of libtorch_cpu, oneDNN included, that the first products and convolutions touch: 6 to 16 MiB measured."""
_GEMM_BUFFERS = 8 * MIB
"""What MKL keeps per thread for packed operands: blocks of 2 to 5.5 MB were seen, which are never freed."""


class Workspaces:
    """Called by the recorder after every operator."""

    def __init__(self, device: Device, lasting: Callable[[int, str], None]) -> None:
        self.device = device
        self._lasting = lasting
        self._handles: set[str] = set()

    def __call__(self, name: str, args: tuple[Any, ...]) -> int:
        """Return the bytes that an operator's kernel may take for as long as it runs.

        They enter upper bounds alone: which algorithm cuDNN picks, and what that needs, is not documented.
        """
        if self.device.kind == "cpu":
            return self._on_cpu(name, args)
        if name in _MATMULS:
            self._open_handle()
        if name == "aten::convolution_backward":
            return _relaid_operands(*args[:3], groups=args[9])
        return 0

    def _on_cpu(self, name: str, args: tuple[Any, ...]) -> int:
        """Return what the kernel surely takes; libraries are loaded by whoever needs them first."""
        if torch.is_grad_enabled():
            self._load("optimizer", _OPTIMIZER_IMPORTS)
        if name in _MATMULS or name in _CONVOLUTIONS:
            self._load("gemm", _KERNEL_CODE + _GEMM_BUFFERS * torch.get_num_threads())
        if name == "aten::convolution":
            return _blocked_forward(args[0], args[1], args[3:9])
        if name == "aten::convolution_backward":
            return _blocked_backward(*args[:3], wants_input=args[10][0])
        return 0

    def _load(self, library: str, num_bytes: int) -> None:
        if library not in self._handles:
            self._handles.add(library)
            self._lasting(num_bytes, library)

    def _open_handle(self) -> None:
        """Take cuBLAS's workspace, one for each thread that calls it; the backward pass has a thread of its own.

        Source: aten/src/ATen/cuda/CublasHandlePool.cpp.
        """
        thread = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
        if thread not in self._handles:
            self._handles.add(thread)
            hopper = self.device.compute_capability is not None and self.device.compute_capability >= (9, 0)
            self._lasting(32 * MIB if hopper else 8 * MIB + 128 * 1024, "cublas")


def _relaid_operands(grad_output: Tensor, x: Tensor, weight: Tensor, *, groups: int) -> int:
    """Sum a dense convolution's operands: tensor cores want them channels-last, and cuDNN then makes copies."""
    if groups > 1 or weight.shape[2:].numel() == 1:
        return 0
    return sum(tensor.untyped_storage().nbytes() for tensor in (grad_output, x, weight))


def _blocked_forward(x: Tensor, weight: Tensor, settings: Sequence[Any]) -> int:
    """Return the larger of what oneDNN holds beside a convolution's output: the input, or the output, relaid in blocks.

    A tensor that is not channels-last is copied into blocks of 16 channels and back, one after the other; three or
    fewer channels are read as they are. Source: mkldnn_convolution in aten/src/ATen/native/mkldnn/Conv.cpp.
    """
    if _is_channels_last(x):
        return 0
    operand = x.numel() if x.shape[1] > _PLAIN_CHANNELS else 0
    return max(_output_values(x, weight, settings), operand) * x.element_size()


def _output_values(x: Tensor, weight: Tensor, settings: Sequence[Any]) -> int:
    """Count outputs; the settings are stride, padding, dilation, transposed, output padding, groups."""
    *spatial, transposed, more, groups = settings
    sides = list(zip(x.shape[2:], weight.shape[2:], *(_spread(each, x) for each in spatial), strict=True))
    if transposed:
        grown = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in sides]
        size = [side + padded for side, padded in zip(grown, _spread(more, x), strict=True)]
    else:
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return int(x.shape[0] * channels * math.prod(size))


def _blocked_backward(grad_output: Tensor, x: Tensor, weight: Tensor, *, wants_input: bool) -> int:
    """Return what oneDNN holds beside the gradients: the operands in blocks of channels, and the relaid weights."""
    if _is_channels_last(x) or _is_channels_last(grad_output):
        return 0
    operands = grad_output.numel() + (x.numel() if x.shape[1] > _PLAIN_CHANNELS else 0)
    return operands * x.element_size() + weight.numel() * weight.element_size() * int(wants_input)


def _is_channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.dim()])


def _spread(setting: Any, x: Tensor) -> list[int]:
    """Repeat a setting for every spatial dimension."""
    return list(setting) * (x.dim() - 2) if len(setting) == 1 else list(setting)
