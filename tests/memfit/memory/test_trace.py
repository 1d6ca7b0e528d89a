"""Recorded births and deaths: by hand for a tiny step, and byte for byte against the same step on real tensors."""

import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memfit.memory.devices import find_device
from memfit.memory.simulate import simulate
from memfit.memory.trace import Storage, Trace
from memfit.step import TrainingProgram, map_tensors, tensors_of


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, on real tensors."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def hold(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self.died(key, size))
                self.live += size
        self.peak = max(self.peak, self.live)

    def died(self, key, size):
        self.alive.pop(key, None)
        self.live -= size


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 100)

    def forward(self, x):
        return self.head(self.layers(self.embedding(x))).transpose(1, 2)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, groups=2), nn.BatchNorm2d(16), nn.GELU(), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def program_of(build, make_batch, optimizer=sgd):
    return TrainingProgram(
        variants={"only": build},
        make_batch=lambda n, _seq_len=None: make_batch(n),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["y"]),
        optimizer=optimizer,
    )


def tokens(n):
    return {"x": torch.zeros(n, 24, dtype=torch.int64), "y": torch.zeros(n, 24, dtype=torch.int64)}


def images(n):
    return {"x": torch.zeros(n, 3, 32, 32), "y": torch.zeros(n, dtype=torch.int64)}


def loop_body(model, optimizer, batch):
    loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def really(program, size):
    """Run the loop body on real tensors, momentum included; return the most bytes that were alive at once."""
    model = program.build()
    optimizer = program.optimizer(model)
    host, meter = program.make_batch(size), LiveBytes()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    meter.hold([*model.parameters(), *model.buffers()])
    meter.hold(value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    with meter:
        loop_body(model, optimizer, map_tensors(torch.clone, host))
    return meter.peak


@pytest.mark.parametrize(("build", "make_batch"), [(Encoder, tokens), (ConvNet, images)])
@pytest.mark.parametrize("size", [2, 7])
def test_the_live_peak_is_that_of_the_same_step_on_real_tensors(build, make_batch, size):
    program = program_of(build, make_batch)
    trace = simulate(program, find_device("cpu"), micro_batch_size=size, step=loop_body, resumed=True, num_steps=1)
    for storage in trace.storages:
        if storage.category == "workspaces":  # what libraries take beside tensors
            storage.num_bytes = 0
    assert trace.peak()[1] == really(program, size)


@pytest.fixture
def tiny():
    """A linear layer of 3 x 4 weights and 3 biases on 5 samples, SGD with momentum, on a card."""
    program = TrainingProgram(
        variants={"only": lambda: nn.Sequential(nn.Linear(4, 3), nn.Identity())},
        make_batch=lambda n, _seq_len: torch.zeros(n, 4),
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=sgd,
    )
    return simulate(program, find_device("t4"), micro_batch_size=5, num_steps=1)


def bytes_of(trace, category):
    return sum(storage.num_bytes for storage in trace.storages if storage.category == category)


def test_storages_are_named_by_what_they_are(tiny):
    state = (3 * 4 + 3) * 4
    assert bytes_of(tiny, "parameters") == state
    assert bytes_of(tiny, "optimizer_state") == state
    assert bytes_of(tiny, "gradients") == state
    assert bytes_of(tiny, "buffers") == 0
    kept = Counter(storage.op for storage in tiny.storages if storage.category == "activations")
    assert kept["aten::addmm"] == 1  # the output, which squaring needs again
    assert {storage.module for storage in tiny.storages if storage.op == "aten::addmm"} == {"0"}


def test_only_the_part_of_a_batch_that_is_moved_is_on_the_device():
    program = program_of(ConvNet, images)
    trace = simulate(program, find_device("t4"), micro_batch_size=4, accumulation_steps=2, num_steps=1)
    moved = [(storage.num_bytes, storage.op) for storage in trace.storages if storage.category == "batch"]
    assert moved == 2 * [(4 * 3 * 32 * 32 * 4, "aten::empty_like"), (4 * 8, "aten::empty_like")]
    assert not any(storage.op in ("aten::slice", "aten::narrow") for storage in trace.storages)


def test_phases_are_recognized_in_their_order(tiny):
    names = [name for _, name in tiny.marks]
    order = [name for name, before in zip(names, [None, *names], strict=False) if name != before]
    assert order[0] == "build"
    assert order.index("resume") < order.index("begin") < order.index("backward")
    assert order[order.index("begin") :][:3] == ["begin", "forward", "backward"]
    assert "optimizer" in order[order.index("backward") :]
    gradients = {storage.phase for storage in tiny.storages if storage.category == "gradients"}
    assert gradients == {"backward"}


def test_every_death_follows_its_birth_and_happens_once(tiny):
    alive = set()
    for event in tiny.events:
        if event >= 0:
            assert event not in alive
            alive.add(event)
        else:
            alive.remove(~event)


def test_a_step_that_repeats_leaves_nothing_behind():
    program = program_of(ConvNet, images)
    ends = []
    for num_steps in (2, 4):
        trace = simulate(program, find_device("rtx-3060"), micro_batch_size=4, num_steps=num_steps)
        ends.append(list(trace.live_bytes())[-1][1])
    assert ends[0] == ends[1]


def test_workspaces_that_are_only_possible_enter_upper_bounds_alone():
    trace = Trace([Storage(100, "activations", "forward"), Storage(7, "workspaces", "forward")], [0, 1, ~1, ~0])
    trace.possible.add(1)
    assert trace.sizes() == [100, 0]
    assert trace.sizes(upper=True) == [100, 7]
    assert trace.peak() == (0, 100)


def test_an_empty_trace_has_no_peak():
    assert Trace().peak() == (0, 0)


def test_nothing_of_a_model_that_the_builder_keeps_is_changed():
    model = ConvNet().eval()
    before = {name: (value.clone(), value.device) for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    program = program_of(lambda: model, images)
    for phase in ("train", "evaluate"):
        simulate(program, find_device("t4"), micro_batch_size=3, phase=phase)
    after = model.state_dict()
    assert all(
        torch.equal(value, after[name]) and device == after[name].device for name, (value, device) in before.items()
    )
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_nothing_of_a_batch_that_the_maker_keeps_is_changed():
    batch = images(6)
    program = program_of(ConvNet, lambda _n: batch)
    simulate(program, find_device("t4"), micro_batch_size=6)
    assert all(tensor.device.type == "cpu" for tensor in tensors_of(batch))
