"""The recurrence y_t = decay_t y_{t-1} + value_t over a whole sequence, by a parallel scan.

Steps compose associatively (Blelloch, 1990; for recurrent nets: Martin and Cundy, 2018): two of them are one step,
whose decay is the product. Sequences are cut into chunks. All chunks are reduced to one step each, at the same time;
these steps are a shorter recurrence of the same kind, which gives the state before each chunk; from there all chunks
run at the same time. Nothing is divided by and no logarithm taken: any decays in [0, 1] will do, for any number of
steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 16
"""Steps of a chunk: shorter ones make more levels, longer ones more operators one after the other (benchmarks/scan.py).
"""
SERIAL_ELEMENTS = 2**15
"""What torch gives to one thread on a CPU. To wake another one takes longer than to add so few, and waits for it where
the cores are busy: the samples are taken in groups, so that operators are no larger."""


def linear_recurrence(decay: Tensor, value: Tensor, initial: Tensor | None = None) -> Tensor:
    """Return y [n, T, C] with y_t = decay_t * y_{t-1} + value_t and y_{-1} = initial.

    decay in [0, 1] and value: [n, T, C], T >= 1; initial: [n, C], zeros if None. The state is kept in fp32 at least,
    and returned so, whatever the inputs' precision. Raises ValueError where the shapes differ.
    """
    if decay.shape != value.shape:
        raise ValueError(f"decay: expected the shape of value, {list(value.shape)}, got {list(decay.shape)}")
    dtype = torch.promote_types(torch.promote_types(decay.dtype, value.dtype), torch.float32)
    decay, value = decay.to(dtype), value.to(dtype)
    start = value.new_zeros((value.shape[0], value.shape[2])) if initial is None else initial.to(dtype)
    if torch.compiler.is_exporting():
        return _as_onnx(decay, value, start)
    result: Tensor = _Recurrence.apply(decay, value, start)  # type: ignore[no-untyped-call]
    return result


class _Recurrence(torch.autograd.Function):
    """Keeps the decays and the result: the gradient is a recurrence too, from the last step to the first."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, value: Tensor, initial: Tensor) -> Tensor:
        """Run the scan."""
        states = value.new_empty(value.shape)
        _scan_groups(decay, value, initial, states)
        ctx.save_for_backward(decay, states, initial)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Sum up what each state's gradient is: its own, and its successor's times the decay between them."""
        decay, states, initial = ctx.saved_tensors
        for_decay, _, for_initial = ctx.needs_input_grad
        sums = gradient.new_empty(gradient.shape)
        last = gradient[:, -1]
        sums[:, -1] = last
        _scan_groups(decay[:, 1:], gradient[:, :-1], last, sums[:, :-1], reverse=True)
        slope = None
        if for_decay:
            slope = torch.empty_like(sums)
            torch.mul(sums[:, 0], initial, out=slope[:, 0])
            torch.mul(sums[:, 1:], states[:, :-1], out=slope[:, 1:])
        return slope, sums, sums[:, 0] * decay[:, 0] if for_initial else None


def _scan_groups(decay: Tensor, value: Tensor, initial: Tensor, out: Tensor, *, reverse: bool = False) -> None:
    """Run `_scan` on all samples at once; on a CPU, on groups of them."""
    rows = max(len(out), 1)
    if out.device.type == "cpu":
        elements = out.shape[1] * out.shape[2]
        rows = max(CHUNK * SERIAL_ELEMENTS // max(elements, 1), 1)
    for group in zip(*(tensor.split(rows) for tensor in (decay, value, initial, out)), strict=True):
        _scan(*group, reverse=reverse)


def _scan(decay: Tensor, value: Tensor, initial: Tensor, out: Tensor, *, reverse: bool = False) -> None:
    """Fill out [n, T, C] with the states; `reverse`: from the last step to the first."""
    num_steps = decay.shape[1]
    if num_steps <= 2 * CHUNK:
        _run(initial, *(_in_order(tensor, 1, reverse) for tensor in (decay, value, out)))
        return
    num_chunks, rest = divmod(num_steps, CHUNK)
    first, last = (
        (slice(rest, None), slice(rest)) if reverse else (slice(num_steps - rest), slice(num_steps - rest, None))
    )
    decays, values, outs = (
        _in_order(tensor[:, first].unflatten(1, (num_chunks, CHUNK)), 2, reverse) for tensor in (decay, value, out)
    )
    states = out.new_empty((out.shape[0], num_chunks + 1, out.shape[2]))
    before, after = (states[:, 1:], states[:, :-1]) if reverse else (states[:, :-1], states[:, 1:])
    begin, end = (-1, 0) if reverse else (0, -1)
    states[:, begin] = initial
    _scan(*_reduce(decays, values), initial, after, reverse=reverse)
    _run(before, decays, values, outs)
    if rest:
        _scan(decay[:, last], value[:, last], states[:, end], out[:, last], reverse=reverse)


def _in_order(tensor: Tensor, dim: int, reverse: bool) -> Sequence[Tensor]:
    """Cut a tensor into its steps, the first to be taken first."""
    steps = tensor.unbind(dim)
    return steps[::-1] if reverse else steps


def _reduce(decays: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the one step that stands for several: the product of their decays, and where zeros would end."""
    product = decays[0] * decays[1]
    end = torch.addcmul(values[1], decays[1], values[0])
    for decay, value in zip(decays[2:], values[2:], strict=True):
        product.mul_(decay)
        torch.addcmul(value, decay, end, out=end)
    return product, end


def _run(state: Tensor, decays: Sequence[Tensor], values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Take one step after the other."""
    for decay, value, out in zip(decays, values, outs, strict=True):
        torch.addcmul(value, decay, state, out=out)
        state = out


def _as_onnx(decay: Tensor, value: Tensor, initial: Tensor) -> Tensor:
    """Stand for ONNX's Scan while exporting: the number of steps stays open."""
    from torch._higher_order_ops.scan import scan  # loads torch's compiler: only an export may wait for it

    def step(state: Tensor, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        state = inputs[0] * state + inputs[1]
        return state, state.clone()

    states: Tensor
    _, states = scan(step, initial.contiguous(), (decay.transpose(0, 1), value.transpose(0, 1)))
    return states.transpose(0, 1)
