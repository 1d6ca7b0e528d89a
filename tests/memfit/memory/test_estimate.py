"""Estimates: figures that agree with one another, and an answer for every device."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from memfit.errors import ConfigError
from memfit.memory.allocator import CachingAllocator, replay
from memfit.memory.devices import find_device
from memfit.memory.estimate import CATEGORIES, estimate, from_trace
from memfit.memory.simulate import simulate
from memfit.memory.trace import Storage, Trace
from memfit.step import TrainingProgram

KIB, MIB = 2**10, 2**20
WIDTH = 256


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


def perceptron():
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH))


def program_of(build=perceptron, sample=(WIDTH,)):
    return TrainingProgram(
        variants={"only": build},
        make_batch=lambda n, _seq_len=None: torch.zeros(n, *sample),
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=lambda model: torch.optim.AdamW(model.parameters()),
    )


PERCEPTRON, CONV_NET = program_of(), program_of(ConvNet, (3, 32, 32))
programs = pytest.mark.parametrize("program", [PERCEPTRON, CONV_NET], ids=["perceptron", "conv net"])
devices = pytest.mark.parametrize("device", ["t4", "h200", "cpu"])
layouts = pytest.mark.parametrize(
    "layout",
    [{}, {"accumulation_steps": 3}, {"phase": "evaluate"}, {"precision": "fp16"}, {"resumed": False}],
    ids=["plain", "accumulating", "evaluating", "half", "fresh"],
)


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    return loss


@programs
@devices
@layouts
def test_the_figures_of_an_estimate_agree(program, device, layout):
    said, card = estimate(program, micro_batch_size=64, device=device, **layout), find_device(device)
    assert list(said.breakdown) == [*CATEGORIES, "fragmentation"]
    assert sum(said.breakdown.values()) == said.peak_bytes
    assert min(said.breakdown.values()) >= 0
    assert sum(said.breakdown.values()) - said.breakdown["fragmentation"] == said.live_bytes
    assert said.live_bytes <= said.peak_bytes <= said.upper_bytes
    assert said.process_bytes == said.peak_bytes + card.context_bytes
    assert said.fits
    assert said.device == card.name


@programs
@devices
@layouts
def test_the_timelines_highest_moment_is_the_peak_of_the_tensors(program, device, layout):
    said = estimate(program, micro_batch_size=64, device=device, **layout)
    assert max(sum(held.values()) for _, held in said.timeline) == said.live_bytes
    assert {name for _, held in said.timeline for name in held} <= set(CATEGORIES)
    assert min(value for _, held in said.timeline for value in held.values()) >= 0
    assert len(said.timeline) <= 400


def test_the_timeline_follows_the_phases_of_a_step():
    said = estimate(PERCEPTRON, micro_batch_size=64, device="t4")
    phases = list(dict.fromkeys(phase for phase, _ in said.timeline))
    assert [name for name in phases if name in ("forward", "backward", "optimizer")] == [
        "forward",
        "backward",
        "optimizer",
    ]


@programs
@pytest.mark.parametrize(("device", "dip"), [("t4", 0.0), ("cpu", 0.01)])
def test_larger_micro_batches_never_take_less(program, device, dip):
    """On a CPU a kernel's own buffers depend on the shape a little."""
    said = [estimate(program, micro_batch_size=size, device=device) for size in (1, 2, 3, 7, 8, 33, 128, 1000)]
    for name in ("live_bytes", "peak_bytes", "upper_bytes"):
        figures = [getattr(one, name) for one in said]
        assert all(more >= less * (1 - dip) for less, more in pairwise(figures))
    assert said[0].peak_bytes < said[-1].peak_bytes


def test_state_is_named_by_what_it_is():
    held = estimate(PERCEPTRON, micro_batch_size=1, device="t4").breakdown
    size = sum(parameter.numel() * 4 for parameter in perceptron().parameters())
    assert (held["parameters"], held["optimizer_state"], held["gradients"]) == (size, 2 * size, size)


def test_the_same_estimate_twice_is_the_same():
    assert estimate(CONV_NET, micro_batch_size=9, device="l4") == estimate(CONV_NET, micro_batch_size=9, device="l4")


def test_a_step_of_ones_own_is_estimated_in_place_of_memfits():
    program = replace(PERCEPTRON, loss=None)
    said = estimate(program, micro_batch_size=64, device="rtx-3060", step=step)
    assert said.breakdown["optimizer_state"] > 0
    assert sum(said.breakdown.values()) == said.peak_bytes
    assert max(sum(held.values()) for _, held in said.timeline) == said.live_bytes


@pytest.mark.parametrize(("written", "nearest"), [("rtx-306", "rtx-3060"), ("a100", "a100-40"), ("tesla t5", "t4")])
def test_an_unknown_device_is_refused_and_the_nearest_named(written, nearest):
    with pytest.raises(ConfigError, match=f"the nearest valid one is '{nearest}'"):
        estimate(PERCEPTRON, micro_batch_size=1, device=written)


def test_what_is_too_large_for_a_device_does_not_fit_and_is_estimated_all_the_same():
    card = find_device("t4")
    whole = estimate(PERCEPTRON, micro_batch_size=512, device=card)
    small = replace(card, name="small", memory_bytes=card.context_bytes + whole.peak_bytes // 2)
    said = estimate(PERCEPTRON, micro_batch_size=512, device=small)
    assert whole.fits
    assert not said.fits
    assert said.peak_bytes == whole.peak_bytes


def test_cached_segments_that_must_be_given_back_do_not_make_it_too_large():
    sizes = [30 * MIB, 34 * MIB]
    trace = Trace([Storage(size, "activations", "forward") for size in sizes], [0, ~0, 1, ~1])
    card = find_device("t4")
    assert from_trace(trace, card).peak_bytes == 64 * MIB
    tight = from_trace(trace, replace(card, memory_bytes=card.context_bytes + 40 * MIB))
    assert (tight.fits, tight.peak_bytes) == (True, 34 * MIB)


def test_only_possible_workspaces_raise_the_upper_bound_alone():
    storages = [Storage(50 * MIB, "activations", "backward"), Storage(40 * MIB, "workspaces", "backward")]
    certain, possible = Trace(storages, [0, 1, ~1, ~0]), Trace(storages, [0, 1, ~1, ~0], possible={1})
    card = find_device("t4")
    sure, maybe = from_trace(certain, card), from_trace(possible, card)
    assert (sure.peak_bytes, maybe.peak_bytes) == (90 * MIB, 50 * MIB)
    assert maybe.upper_bytes == sure.upper_bytes


def test_the_peak_of_a_card_is_that_of_its_caching_allocator():
    card = find_device("rtx-3060")
    trace = simulate(CONV_NET, card, micro_batch_size=16)
    served = replay(trace.events, trace.sizes(), CachingAllocator())
    assert from_trace(trace, card).peak_bytes == served.peak_reserved


def test_what_holds_most_comes_first():
    said = estimate(PERCEPTRON, micro_batch_size=2048, device="t4")
    held = [size for _, size in said.culprits]
    assert held == sorted(held, reverse=True)
    assert sum(held) <= said.live_bytes
    assert len(held) <= 12
