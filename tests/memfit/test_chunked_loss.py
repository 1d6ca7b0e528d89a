"""Cross-entropy in chunks: the same numbers as in one piece, and less memory, in a simulation as for real."""

from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memfit
from memfit import chunked_loss
from memfit.chunked_loss import chunking, linear_cross_entropy, reset_used, used
from memfit.errors import ConfigError
from memfit.memory.enforcement import process_status
from memfit.memory.estimate import estimate
from memfit.process import run_child
from memfit.step import TrainingProgram

MIB = 2**20


@contextmanager
def chunks_of(rows):
    """Chunks of so few rows that small tensors have several."""
    with (
        mock.patch.object(chunked_loss, "CHUNK_ELEMENTS", 0),
        mock.patch.object(chunked_loss, "MIN_CHUNK_ROWS", rows),
        chunking(True),
    ):
        yield


def reference(hidden, weight, target, *, bias=None, **how):
    return F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, -2), target.flatten(), **how)


def gradients(loss, factor, *tensors):
    """The loss and what it leaves in each tensor that needs a gradient."""
    return [loss, *torch.autograd.grad(loss * factor, [t for t in tensors if t is not None and t.requires_grad])]


def problem(shape=(3, 5), width=6, classes=11, *, with_bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(classes, width, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(classes, generator=generator).to(dtype).requires_grad_() if with_bias else None
    return hidden, weight, torch.randint(classes, shape, generator=generator), bias


def assert_near(got, wanted, share):
    """Differences are a share of the largest value."""
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert (one - other).abs().max() <= share * other.abs().max().clamp(min=1e-30)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple),
    width=st.integers(1, 9),
    classes=st.integers(2, 40),
    rows=st.integers(1, 9),
    with_bias=st.booleans(),
    reduction=st.sampled_from(["sum", "mean"]),
    ignored=st.sampled_from([None, -100, 1]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    factor=st.sampled_from([1.0, 0.03, 4096.0]),
    seed=st.integers(0, 99),
)
def test_chunks_give_the_loss_and_the_gradients_of_one_piece(
    shape, width, classes, rows, with_bias, reduction, ignored, label_smoothing, factor, seed
):
    hidden, weight, target, bias = problem(shape, width, classes, with_bias=with_bias, seed=seed)
    how = {"reduction": reduction, "label_smoothing": label_smoothing}
    if ignored is not None:
        target.view(-1)[1::2] = ignored  # the first stays, so that something counts
        target.view(-1)[0] = 0
        how["ignore_index"] = ignored
    wanted = gradients(reference(hidden, weight, target, bias=bias, **how), factor, hidden, weight, bias)
    with chunks_of(rows):
        got = gradients(linear_cross_entropy(hidden, weight, target, bias=bias, **how), factor, hidden, weight, bias)
    assert_near(got, wanted, 2e-6)


def test_gradients_are_those_of_finite_differences():
    hidden, weight, target, bias = problem(dtype=torch.float64)
    target[0, 0] = -100

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, target, bias=bias, reduction="mean", label_smoothing=0.2)

    with chunks_of(4):
        assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_under_autocast_chunks_are_as_near_as_rounding(dtype, with_bias):
    hidden, weight, target, bias = problem((64,), 32, 100, with_bias=with_bias)
    with torch.autocast("cpu", dtype=dtype):
        plain = reference(hidden, weight, target, bias=bias, reduction="sum")
    wanted = gradients(plain, 8.0, hidden, weight, bias)
    with chunks_of(16):
        with torch.autocast("cpu", dtype=dtype):
            loss = linear_cross_entropy(hidden, weight, target, bias=bias)
        got = gradients(loss, 8.0, hidden, weight, bias)
    assert loss.dtype == torch.float32
    assert_near(got, wanted, 2 * torch.finfo(dtype).eps)


def test_fp16_gradients_are_scaled_before_they_are_rounded():
    """Without a loss scale most of the softmax of a large vocabulary is below what fp16 can hold."""
    hidden, weight, target, _ = problem((8,), 4, 60_000, with_bias=False)
    with chunks_of(4):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = linear_cross_entropy(hidden, weight * 0.01, target, reduction="mean")
        (scaled,) = torch.autograd.grad(loss * 2.0**16, weight)
    assert (scaled != 0).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_model_that_is_of_half_precision_itself_stays_so(dtype, reduction):
    hidden, weight, target, bias = problem((64,), 32, 100, dtype=dtype)
    wanted = gradients(reference(hidden, weight, target, bias=bias, reduction=reduction), 1.0, hidden, weight, bias)
    with chunks_of(16):
        loss = linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction)
        got = gradients(loss, 1.0, hidden, weight, bias)
    assert_near(got, wanted, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    tensors = dict(zip(("hidden", "weight", "target", "bias"), problem(), strict=True))
    tensors[frozen].requires_grad_(False)
    wanted = reference(**tensors, reduction="sum")
    wanted.backward()
    trained = [tensors[name] for name in ("hidden", "weight", "bias") if name != frozen]
    expected = [tensor.grad for tensor in trained]
    for tensor in trained:
        tensor.grad = None
    with chunks_of(4):
        linear_cross_entropy(**tensors).backward()
    assert_near([tensor.grad for tensor in trained], expected, 2e-6)
    assert tensors[frozen].grad is None


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight, target, bias = problem()
    with chunks_of(4), torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, target, bias=bias)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(hidden, weight, target, bias=bias, reduction="sum").detach())


@pytest.mark.parametrize("recomputing", [False, True])
def test_tied_embeddings_under_recomputed_blocks_and_accumulation(recomputing):
    torch.manual_seed(0)
    table, block = nn.Embedding(30, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    ids = torch.randint(30, (4, 6))

    def accumulate(loss):
        table.zero_grad(), block.zero_grad()
        for part in ids.split(2):
            hidden = checkpoint(block, table(part), use_reentrant=False) if recomputing else block(table(part))
            loss(hidden, table.weight, part).backward()
        return [table.weight.grad.clone(), block[0].weight.grad.clone()]

    wanted = accumulate(lambda *given: reference(*given, reduction="sum"))
    with chunks_of(5):
        assert_near(accumulate(linear_cross_entropy), wanted, 2e-6)


def test_a_checkpointed_head_is_recomputed_as_it_was_computed():
    hidden, weight, target, _ = problem()
    wanted = gradients(reference(hidden, weight, target, reduction="sum"), 1.0, hidden, weight)
    with chunks_of(4):
        loss = checkpoint(linear_cross_entropy, hidden, weight, target, use_reentrant=False)
        assert_near(gradients(loss, 1.0, hidden, weight), wanted, 2e-6)


def test_when_all_targets_are_ignored_the_mean_is_not_a_number_and_the_sum_is_zero():
    hidden, weight, target, _ = problem()
    with chunks_of(4):
        assert linear_cross_entropy(hidden, weight, target.fill_(-100), reduction="mean").isnan()
        assert linear_cross_entropy(hidden, weight, target) == 0


def test_chunks_are_taken_only_where_they_are_on():
    def operators():
        hidden, weight, target, _ = problem()
        return type(linear_cross_entropy(hidden, weight, target).grad_fn).__name__

    with mock.patch.object(chunked_loss, "CHUNK_ELEMENTS", 0), mock.patch.object(chunked_loss, "MIN_CHUNK_ROWS", 4):
        assert operators() == "NllLossBackward0"
        with chunking(True):
            assert operators() == "_ChunkedBackward"
            with chunking(False):
                assert operators() == "NllLossBackward0"
            assert operators() == "_ChunkedBackward"
    with chunking(True):
        assert operators() == "NllLossBackward0"  # one chunk is enough


def test_a_chunk_has_fewer_rows_the_larger_the_vocabulary():
    assert [chunked_loss.chunk_rows(classes) for classes in (1000, 50_257, 256_000)] == [16_777, 333, 128]


def test_tells_whether_it_was_used():
    reset_used()
    assert not used()
    hidden, weight, target, _ = problem()
    memfit.linear_cross_entropy(hidden, weight, target)
    assert used()
    reset_used()
    assert not used()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reduction": "none"}, r"reduction: expected one of \('sum', 'mean'\), got 'none'"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target: .*\[3, 5\], got a shape of \[3\]"),
    ],
)
def test_wrong_arguments_are_errors(change, said):
    hidden, weight, target, _ = problem()
    with pytest.raises(ConfigError, match=said):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "target": target, **change})


class Language(nn.Module):
    """Tokens to the next token, with one table for both ends."""

    def __init__(self, classes, width):
        super().__init__()
        self.table, self.mix = nn.Embedding(classes, width), nn.Linear(width, width)

    def forward(self, ids):
        return torch.tanh(self.mix(self.table(ids)))


def language(*, in_chunks, classes=50_257, width=64, length=512):
    def loss(model, batch):
        with chunking(in_chunks):
            return {"loss": linear_cross_entropy(model(batch["ids"]), model.table.weight, batch["ids"]) / length}

    return TrainingProgram(
        build_model=lambda: Language(classes, width),
        make_batch=lambda n, _seq_len=None: {"ids": torch.randint(classes, (n, length))},
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )


@pytest.mark.parametrize("device", ["cpu", "t4"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_simulation_sees_every_chunk(device, precision):
    """The logits of 4096 tokens are 785 MiB in fp32; one chunk of them is 64 MiB."""

    def said(in_chunks):
        program = language(in_chunks=in_chunks)
        return estimate(program, micro_batch_size=8, precision=precision, device=device)

    plain, chunked = said(False), said(True)
    assert plain.live_bytes > 2 * 785 * MIB
    assert 100 * MIB < chunked.live_bytes < 350 * MIB
    assert chunked.peak_bytes < plain.peak_bytes / 4
    assert not chunked.notes


def peak(payload, _emit):
    """Be the child: run a step in chunks or in one piece, report the rise of the peak."""
    torch.manual_seed(0)
    program, before = language(in_chunks=payload["in_chunks"]), process_status()["VmRSS"]
    model, batch = program.build(), program.batch(4)
    program.loss(model, batch)["loss"].backward()
    return process_status()["VmHWM"] - before


def test_the_peak_of_a_process_is_lower_in_chunks(tmp_path, importable):
    target = f"{importable(Path(__file__))}:peak"
    took = [run_child(target, {"in_chunks": each}, log=tmp_path / "log").unwrap("a step") for each in (False, True)]
    assert took[0] > 2 * 390 * MIB
    assert took[1] < took[0] / 2
