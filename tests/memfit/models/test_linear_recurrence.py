"""The parallel scan against one step after the other."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.models.linear_recurrence import CHUNK, linear_recurrence

LENGTHS = [1, 2, CHUNK, 2 * CHUNK, 2 * CHUNK + 1, 127, 128, 1000]


def step_by_step(decay, value, initial=None):
    state = value.new_zeros(value[:, 0].shape) if initial is None else initial
    states = []
    for one, other in zip(decay.unbind(1), value.unbind(1), strict=True):
        state = one * state + other
        states.append(state)
    return torch.stack(states, 1)


def draw(n, steps, channels, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    decay = torch.rand(n, steps, channels, generator=generator, dtype=torch.float64)
    value, initial = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (decay.shape, (n, channels))
    )
    return decay.to(dtype), value.to(dtype), initial.to(dtype)


@pytest.mark.parametrize("steps", LENGTHS)
def test_agrees_with_one_step_after_the_other(steps):
    decay, value, initial = draw(3, steps, 5)
    torch.testing.assert_close(linear_recurrence(decay, value, initial), step_by_step(decay, value, initial))
    torch.testing.assert_close(linear_recurrence(decay, value), step_by_step(decay, value))


@pytest.mark.parametrize("steps", LENGTHS)
def test_gradients_agree_with_one_step_after_the_other(steps):
    inputs = [tensor.requires_grad_() for tensor in draw(3, steps, 5)]
    weight = torch.randn(3, steps, 5, dtype=torch.float64)
    got = torch.autograd.grad((linear_recurrence(*inputs) * weight).sum(), inputs)
    expected = torch.autograd.grad((step_by_step(*inputs) * weight).sum(), inputs)
    for name, one, other in zip(("decay", "value", "initial"), got, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("steps", [1, 5, 2 * CHUNK + 3])
def test_gradients_are_the_limits_of_differences(steps):
    inputs = [tensor.requires_grad_() for tensor in draw(2, steps, 2)]
    assert torch.autograd.gradcheck(linear_recurrence, inputs)
    assert torch.autograd.gradcheck(linear_recurrence, inputs[:2])
    assert torch.autograd.gradcheck(lambda value: linear_recurrence(inputs[0].detach(), value), inputs[1])


@pytest.mark.parametrize("low", [0.0, 1e-38, 0.99, 1.0])
@pytest.mark.parametrize("high", [0.0, 1.0])
def test_rounds_as_little_as_one_step_after_the_other_for_any_decays(low, high):
    decay, value, initial = draw(2, 4001, 8)
    decay = torch.where(decay < 0.5, low, high) if high == 0.0 else low + (high - low) * decay
    decay[:, :, 0], decay[:, :, 1] = 1.0, 0.0
    single = [tensor.float().requires_grad_() for tensor in (decay, value, initial)]
    double = [tensor.detach().double().requires_grad_() for tensor in single]
    truth = step_by_step(*double)
    scale = truth.abs().amax(1, keepdim=True) + 1e-3
    states, plain = linear_recurrence(*single), step_by_step(*single)
    assert states.dtype == torch.float32
    error, usual = (((found - truth).abs() / scale).max().item() for found in (states, plain))
    assert error <= 2 * usual + 1e-6
    expected = torch.autograd.grad(truth.sum(), double)
    got, usual_gradients = torch.autograd.grad(states.sum(), single), torch.autograd.grad(plain.sum(), single)
    for found, other, true in zip(got, usual_gradients, expected, strict=True):
        error, usual = (((each - true).abs().max() / true.abs().max()).item() for each in (found, other))
        assert error <= 2 * usual + 1e-6


def test_a_decay_of_zero_forgets_whatever_came_before():
    decay, value, initial = draw(1, 100, 1, torch.float32)
    value[0, 40], decay[0, 50] = 1e30, 0.0
    decay[0, 51:] = 1.0
    states = linear_recurrence(decay, value, initial)
    torch.testing.assert_close(states[0, 50:], value[0, 50:].cumsum(0))


def test_later_inputs_change_no_earlier_state():
    decay, value, initial = draw(2, 77, 3, torch.float32)
    states = linear_recurrence(decay, value, initial)
    other = linear_recurrence(decay[:, :40], value[:, :40], initial)
    torch.testing.assert_close(states[:, :40], other)
    torch.testing.assert_close(linear_recurrence(decay[:, 40:], value[:, 40:], other[:, -1]), states[:, 40:])


def test_takes_views_and_gradients_of_any_layout():
    decay, value, initial = (tensor.requires_grad_() for tensor in draw(40, 3, 5))
    views = decay.transpose(0, 1), value.transpose(0, 1)
    states = linear_recurrence(*views, initial[:3])
    torch.testing.assert_close(states, step_by_step(*views, initial[:3]))
    gradients = torch.autograd.grad(states.sum(), (decay, value))  # of stride 0
    for got, expected in zip(gradients, torch.autograd.grad(step_by_step(*views, initial[:3]).sum(), (decay, value))):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_single_precision(dtype):
    value = torch.full((1, 3000, 1), 1.0, dtype=dtype, requires_grad=True)
    decay = torch.ones(1, 3000, 1, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        states = linear_recurrence(decay, value)
    assert states.dtype == torch.float32
    assert states[0, -1, 0].item() == 3000.0  # in bf16, 256 + 1 is 256
    states[:, -1].sum().backward()
    assert decay.grad.dtype == value.grad.dtype == dtype
    torch.testing.assert_close(value.grad.float(), torch.ones(1, 3000, 1))


def test_keeps_no_more_than_decays_states_and_start_for_the_backward_pass():
    decay, value, initial = (tensor.requires_grad_() for tensor in draw(2, 40, 3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        states = linear_recurrence(decay, value, initial)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in (decay, states, initial)}


def test_takes_few_operators_one_after_the_other():
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten.addcmul.default, torch.ops.aten.addcmul.out)
            return func(*args, **(kwargs or {}))

    counts = {}
    for steps in (CHUNK**2, CHUNK**3, CHUNK**4):
        with Counter() as counter:
            linear_recurrence(torch.ones(1, steps, 1), torch.ones(1, steps, 1))
        counts[steps] = counter.count
    assert list(counts.values()) == [3 * CHUNK - 1, 5 * CHUNK - 2, 7 * CHUNK - 3]


def test_runs_on_tensors_that_hold_no_memory():
    decay, value, initial = (torch.empty_like(tensor, device="meta").requires_grad_() for tensor in draw(2, 100, 3))
    states = linear_recurrence(decay, value, initial)
    states.sum().backward()
    assert states.shape == decay.grad.shape == value.grad.shape == (2, 100, 3)
    assert initial.grad.shape == (2, 3)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"decay: expected the shape of value, \[2, 3, 4\], got \[2, 1, 4\]"):
        linear_recurrence(torch.ones(2, 1, 4), torch.ones(2, 3, 4))
