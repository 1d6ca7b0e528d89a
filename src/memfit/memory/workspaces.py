"""What kernels take while they run, beyond their outputs, and what libraries keep: by device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memfit.memory.devices import Device

MIB = 2**20
_MATMULS = frozenset(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::mv", "aten::dot"))


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
        if self.device.kind != "cuda":
            return 0
        if name in _MATMULS:
            self._open_handle()
        if name == "aten::convolution_backward":
            return _relaid_operands(*args[:3], groups=args[9])
        return 0

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
