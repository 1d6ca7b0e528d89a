"""A step simulated without memory: what a program may do, what is counted, and that nothing is left changed."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from memfit.errors import ConfigError
from memfit.memory.devices import find_device
from memfit.memory.simulate import CannotSimulateError, simulate
from memfit.step import TrainingProgram

T4 = find_device("t4")
WIDTH = 64


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return x + self.body(x)


def stack(depth=6):
    return nn.Sequential(*(Block() for _ in range(depth)))


def program_of(build=stack, **changes):
    given = {
        "make_batch": lambda n, _seq_len=None: {"x": torch.zeros(n, WIDTH)},
        "loss": lambda model, batch: model(batch["x"]).square().mean(),
        "optimizer": lambda model: torch.optim.Adam(p for p in model.parameters() if p.requires_grad),
        "blocks": (Block,),
    }
    return TrainingProgram(variants={"only": build}, **given | changes)


def run(program, size=8, **options):
    return simulate(program, T4, micro_batch_size=size, **options)


def bytes_of(trace, category):
    return sum(storage.num_bytes for storage in trace.storages if storage.category == category)


def peak(trace):
    """Tensors at the peak: without the workspaces of libraries, which dwarf these small models."""
    return trace.peak()[1] - bytes_of(trace, "workspaces")


def size_of(model):
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


# What a program may do


@pytest.mark.parametrize("given", [7, 9])
def test_a_batch_of_another_size_than_asked_for_is_refused(given):
    program = program_of(make_batch=lambda n, _seq_len=None: {"x": torch.zeros(given, WIDTH)})
    with pytest.raises(ConfigError, match=f"make_batch: expected 8 samples, got {given}"):
        run(program)


class Computing(nn.Module):
    """Reads values of tensors while it is built, as RegNet and nets with stochastic depth do."""

    def __init__(self, read):
        super().__init__()
        widths = read(torch.linspace(8, 16, 3))
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise([WIDTH, *widths, WIDTH])))
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x):
        return self.layers(x) * self.scale


@pytest.mark.parametrize(
    "read",
    [
        lambda widths: [int(width) for width in widths],
        lambda widths: [round(width.item()) for width in widths],
        lambda widths: widths.int().tolist(),
        lambda widths: [int(width) for width in widths.numpy()],
    ],
    ids=["int", "item", "tolist", "numpy"],
)
def test_constructors_that_compute_with_tensors_are_run_for_real(read):
    trace = run(program_of(lambda: Computing(read)))
    assert bytes_of(trace, "parameters") == size_of(Computing(read))
    assert bytes_of(trace, "buffers") == WIDTH * 4


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.from_numpy(np.zeros((n, WIDTH), np.float32)),
        lambda n: torch.tensor(np.zeros((n, WIDTH), np.float32)),
        lambda n: torch.stack([torch.as_tensor([float(i)] * WIDTH) for i in range(n)]),
        lambda n: torch.zeros(int(torch.tensor(n).item()), WIDTH),
    ],
    ids=["from_numpy", "tensor", "as_tensor", "item"],
)
def test_batches_may_be_made_from_real_values(make):
    trace = run(program_of(make_batch=lambda n, _seq_len=None: {"x": make(n)}))
    assert bytes_of(trace, "batch") == 2 * 8 * WIDTH * 4  # two steps


def test_choosing_by_a_mask_is_counted_as_if_everything_were_chosen():
    seen = []

    def loss(model, batch):
        chosen = batch["x"][batch["x"][:, 0] > 0]
        seen.append(tuple(chosen.shape))
        return model(chosen).square().mean()

    run(program_of(loss=loss))
    assert set(seen) == {(8, WIDTH)}


def test_values_that_are_read_are_assumed_and_said_to_be():
    def loss(model, batch):
        value = model(batch["x"]).square().mean()
        assert value.item() == 1.0
        assert not torch.isnan(value).any()
        assert (value == value).all()
        return value

    trace = run(program_of(loss=loss))
    assert any("_local_scalar_dense of torch.float32" in note and "assumed" in note for note in trace.notes)


def test_a_program_that_needs_real_values_says_that_it_cannot_be_simulated():
    with pytest.raises(CannotSimulateError):
        run(program_of(loss=lambda model, batch: torch.tensor(model(batch["x"]).detach().numpy()).mean()))


@pytest.mark.parametrize(
    "move",
    [
        lambda value: value.to("cuda"),
        lambda value: value.to(torch.device("cuda", 0), non_blocking=True),
        lambda value: value.cuda(),
    ],
)
def test_a_step_of_ones_own_may_move_things_to_cuda(move):
    def step(model, optimizer, batch):
        model = move(model) if isinstance(move, nn.Module) else model.to("cuda")
        target = torch.zeros(len(batch["x"]), WIDTH, device="cuda")
        loss = nn.functional.mse_loss(model(move(batch["x"])), move(target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    trace = run(program_of(loss=None), step=step, resumed=False)
    plain = run(program_of())
    assert bytes_of(trace, "gradients") > 0
    assert bytes_of(trace, "parameters") == bytes_of(plain, "parameters")


def test_what_a_step_of_ones_own_returns_lives_until_the_next_one():
    out_bytes, begins = 8 * WIDTH * 4, []
    for keep in (False, True):

        def step(model, optimizer, batch, keep=keep):
            out = model(batch["x"])
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            return out.detach() if keep else None

        trace = run(program_of(loss=None), step=step, resumed=False)
        last = max(index for index, phase in trace.marks if phase == "begin")
        begins.append(dict(trace.live_bytes())[last - 1])
    assert begins[1] - begins[0] == out_bytes


def test_what_a_step_of_ones_own_returned_dies_as_the_next_backward_pass_begins():
    def step(model, optimizer, batch):
        result = torch.zeros(12345, device="cuda")
        model(batch["x"]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return result

    trace = run(program_of(loss=None), step=step, resumed=False, num_steps=2)
    results = [number for number, storage in enumerate(trace.storages) if storage.num_bytes == 12345 * 4]
    backward = [index for index, phase in trace.marks if phase == "backward"]
    assert len(results) == len(backward) == 2
    assert ~results[0] in trace.events[backward[1] : backward[1] + 2]  # it, and the batch of its step


# What is counted


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_checkpointing_lowers_the_peak(precision):
    options = {"size": 512, "precision": precision}
    plain, checkpointed = (run(program_of(), checkpointing=name, **options) for name in ("none", "blocks"))
    assert peak(checkpointed) < 0.7 * peak(plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_is_computed_again_has_the_precision_of_the_first_time(precision):
    trace = run(program_of(), size=100, precision=precision, checkpointing="blocks", num_steps=1)
    products = [storage for storage in trace.storages if storage.op == "aten::addmm"]
    first, again = (
        Counter(storage.num_bytes for storage in products if storage.phase == phase)
        for phase in ("forward", "backward")
    )
    itemsize = 4 if precision == "fp32" else 2
    assert first == {100 * 4 * WIDTH * itemsize: 6, 100 * WIDTH * itemsize: 6}
    assert again[100 * 4 * WIDTH * itemsize] == 6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_halves_most_activations_and_no_state(precision):
    single, lower = (run(program_of(), size=512, precision=name) for name in ("fp32", precision))
    for category in ("parameters", "gradients", "optimizer_state"):
        assert bytes_of(lower, category) == bytes_of(single, category)
    assert peak(lower) < 0.75 * peak(single)


def test_frozen_parts_have_neither_gradients_nor_optimizer_state():
    def build():
        model = stack()
        for parameter in model[:4].parameters():
            parameter.requires_grad_(False)
        return model

    whole, part = run(program_of(), num_steps=1), run(program_of(build), num_steps=1)
    assert bytes_of(part, "parameters") == bytes_of(whole, "parameters") == size_of(stack())
    assert bytes_of(part, "optimizer_state") == pytest.approx(bytes_of(whole, "optimizer_state") / 3, rel=0.01)
    assert bytes_of(part, "gradients") == bytes_of(whole, "gradients") / 3
    assert part.peak()[1] < whole.peak()[1]


@pytest.mark.parametrize("real", [False, True], ids=["on meta", "built for real"])
def test_tied_weights_are_counted_once(real):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            if real:
                torch.ones(1).item()
            self.table, self.head = nn.Embedding(100, WIDTH), nn.Linear(WIDTH, 100, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.table(x))

    program = program_of(
        Tied,
        make_batch=lambda n, _seq_len=None: {"x": torch.zeros(n, 5, dtype=torch.int64)},
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    )
    trace = run(program, num_steps=1)
    table = 100 * WIDTH * 4
    assert bytes_of(trace, "parameters") == table
    assert bytes_of(trace, "optimizer_state") == table


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_accumulation_adds_nothing_but_the_gradients(precision):
    once, twice, often = (
        run(program_of(), size=256, accumulation_steps=count, precision=precision).peak()[1] for count in (1, 2, 16)
    )
    batch, losses = 256 * WIDTH * 4, 64
    assert once <= twice == often
    assert twice - once <= size_of(stack()) + batch + losses


def test_optimizer_state_is_there_in_the_first_forward_pass_of_a_run_that_goes_on():
    def before_the_first_backward(resumed):
        trace = run(program_of(), resumed=resumed, num_steps=1)
        begin, end = (next(index for index, phase in trace.marks if phase == name) for name in ("begin", "backward"))
        if resumed:
            end = next(index for index, phase in trace.marks if phase == "backward" and index > begin)
        alive = set()
        for event in trace.events[:end]:
            alive.add(event) if event >= 0 else alive.discard(~event)
        return sum(trace.storages[number].num_bytes for number in alive), bytes_of(trace, "optimizer_state")

    fresh, _ = before_the_first_backward(resumed=False)
    resumed, state = before_the_first_backward(resumed=True)
    assert state == 2 * size_of(stack())
    assert resumed - fresh == state


def test_evaluation_keeps_no_activations():
    training, evaluation = run(program_of(), size=256), run(program_of(), size=256, phase="evaluate")
    assert bytes_of(evaluation, "activations") == bytes_of(evaluation, "gradients") == 0
    assert bytes_of(evaluation, "optimizer_state") == 0
    block = 2 * 256 * 4 * WIDTH * 4 + 3 * 256 * WIDTH * 4
    assert peak(evaluation) <= size_of(stack()) + block < peak(training)


def test_evaluation_runs_the_programs_own_and_the_model_in_evaluation_mode():
    seen = []

    def evaluate(model, batch):
        seen.append((model.training, torch.is_grad_enabled(), model(batch["x"]).shape))

    run(program_of(evaluate=evaluate), phase="evaluate")
    assert set(seen) == {(False, False, (8, WIDTH))}


def test_clipping_is_part_of_the_step():
    plain, clipped = (run(program_of(), clip=clip) for clip in (None, 1.0))
    assert clipped.peak()[1] >= plain.peak()[1]


# What is left as it was


def surroundings():
    return {
        "random": torch.random.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "gradients": torch.is_grad_enabled(),
        "device": torch.get_default_device(),
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
    }


def failing(model, batch):
    model(batch["x"])
    raise ArithmeticError("as a program might")


@pytest.mark.parametrize(
    ("build", "make", "loss"),
    [
        (stack, torch.rand, None),
        (lambda: Computing(lambda widths: widths.int().tolist()), torch.rand, None),
        (stack, lambda *shape: torch.from_numpy(torch.rand(*shape).numpy()), None),
        (stack, torch.rand, failing),
    ],
    ids=["on meta", "built for real", "a real batch", "an error"],
)
def test_the_surroundings_are_left_as_they_were(build, make, loss):
    changes = {"make_batch": lambda n, _seq_len=None: {"x": make(n, WIDTH)}} | ({"loss": loss} if loss else {})
    before = surroundings()
    try:
        run(program_of(build, **changes), precision="fp16")
    except CannotSimulateError:
        assert loss is failing
    assert surroundings() == before
