"""Stand-ins for fused recurrent kernels: what cuDNN and oneDNN return, keep and hold while they run."""

from typing import Any

import torch
from torch import Tensor

RNN_MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
_RESERVED_PER_CELL = {"rnn_relu": 2, "rnn_tanh": 2, "lstm": 6, "gru": 5}
"""Values per hidden unit, step and direction that the fused recurrent kernels keep for the backward pass."""


class FusedRecurrent(torch.autograd.Function):
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


def onednn_lstm(
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
