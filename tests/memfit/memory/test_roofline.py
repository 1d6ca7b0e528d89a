"""How long operators take: the slower of computing and moving bytes, on tensors that hold nothing."""

from dataclasses import replace

import pytest
import torch

from memfit.memory.devices import Device, find_device
from memfit.memory.roofline import BANDWIDTH_SHARE, COMPUTE_SHARE, Roofline

T4 = find_device("t4")


def meta(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def matmul_seconds(device: Device, size: int, dtype=torch.float32) -> float:
    a, b = meta(size, size, dtype=dtype), meta(size, size, dtype=dtype)
    return Roofline(device).seconds(torch.ops.aten.mm.default, (a, b), {}, torch.mm(a, b))


def test_a_large_product_takes_what_its_flops_take():
    expected = 2 * 8192**3 / (T4.tflops["fp32"] * 1e12 * COMPUTE_SHARE)
    assert matmul_seconds(T4, 8192) == pytest.approx(expected, rel=0.01)


def test_half_precision_computes_at_its_own_rate():
    assert matmul_seconds(T4, 8192) / matmul_seconds(T4, 8192, torch.float16) == pytest.approx(65.0 / 8.1, rel=0.05)


def test_a_precision_whose_rate_is_not_known_computes_like_fp32():
    assert matmul_seconds(T4, 8192, torch.bfloat16) == pytest.approx(matmul_seconds(T4, 8192), rel=0.01)


def test_an_elementwise_operator_takes_what_its_bytes_take():
    a = meta(2**26)
    expected = 3 * 4 * 2**26 / (T4.bandwidth_gbs * 1e9 * BANDWIDTH_SHARE)
    assert Roofline(T4).seconds(torch.ops.aten.add.Tensor, (a, a), {}, a) == pytest.approx(expected, rel=0.01)


def test_lists_of_operands_are_moved_too():
    roofline, one, many = Roofline(T4), [meta(2**24)], [meta(2**24)] * 4
    few = roofline.seconds(torch.ops.aten._foreach_add.List, (one, one), {}, one)
    assert roofline.seconds(torch.ops.aten._foreach_add.List, (many, many), {}, many) > 3.5 * few


def test_a_small_operator_takes_a_launch():
    a = meta(1)
    seconds = Roofline(T4).seconds(torch.ops.aten.add.Tensor, (a, a), {}, a)
    assert 1e-6 < seconds < 2e-5
    newest = Roofline(find_device("h200")).seconds(torch.ops.aten.add.Tensor, (a, a), {}, a)
    assert newest == pytest.approx(seconds, rel=0.01)


def test_a_view_and_what_makes_no_tensor_take_nothing():
    a = meta(2**20)
    assert Roofline(T4).seconds(torch.ops.aten.view.default, (a, [2**20]), {}, a) == 0.0
    assert Roofline(T4).seconds(torch.ops.aten.sym_size.int, (a, 0), {}, 2**20) == 0.0


@pytest.mark.parametrize("size", [64, 512, 4096])
def test_a_faster_card_is_no_slower(size):
    assert matmul_seconds(find_device("h100"), size) <= matmul_seconds(find_device("a100-40"), size)
    assert matmul_seconds(find_device("a100-40"), size) <= matmul_seconds(T4, size)


def test_rates_are_known_only_where_both_are():
    assert Roofline(T4).known
    assert not Roofline(replace(T4, tflops={})).known
    assert not Roofline(replace(T4, bandwidth_gbs=None)).known
    assert not Roofline(find_device("cpu")).known
