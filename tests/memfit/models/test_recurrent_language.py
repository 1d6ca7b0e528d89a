"""The recurrent language model: causal, the same in pieces as in one, trained as planned, exported for any length."""

import fnmatch
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from memfit.chunked_loss import linear_cross_entropy
from memfit.memory.devices import find_device
from memfit.memory.simulate import simulate
from memfit.models.language_settings import LanguageSettings
from memfit.models.recurrent_language import BLOCKS, SLOWEST_TOKENS, RecurrentLanguageModel
from memfit.step import StepLayout, TrainingProgram, TrainingStep

SETTINGS = {"name": "recurrent", "vocab_size": 50, "d_model": 16, "num_layers": 2}


def build(**changes):
    """Build a model whose parameters are all drawn widely, so that every part of it says something."""
    torch.manual_seed(0)
    model = RecurrentLanguageModel(LanguageSettings(**(SETTINGS | changes)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def draw_tokens(n=3, steps=40, seed=0):
    return torch.randint(50, (n, steps), generator=torch.Generator().manual_seed(seed))


def test_maps_tokens_to_rows_and_logits():
    model = build(state_width=24)
    hidden, state = model.stream(draw_tokens(), model.initial_state(3))
    assert hidden.shape == (3, 40, 16)
    assert state.shape == model.initial_state(3).shape == (3, 2, 24)
    assert torch.equal(model.hidden(draw_tokens()), hidden)
    torch.testing.assert_close(model(draw_tokens()), hidden @ model.embedding.weight.T)
    assert build().initial_state(2).shape == (2, 2, 32)


@pytest.mark.parametrize("cuts", [[1] * 40, [7, 1, 32], [39, 1]])
def test_reads_in_pieces_as_in_one(cuts):
    model, tokens = build(), draw_tokens()
    whole, end = model.stream(tokens, model.initial_state(3))
    state, rows = model.initial_state(3), []
    for piece in tokens.split(cuts, 1):
        hidden, state = model.stream(piece, state)
        rows.append(hidden)
    torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(state, end, atol=1e-5, rtol=0)


@pytest.mark.parametrize("place", [0, 20, 39])
def test_a_token_changes_its_own_row_and_later_ones_only(place):
    model, tokens = build(), draw_tokens()
    other = tokens.clone()
    other[:, place] = (tokens[:, place] + 1) % 50
    before, after = model.hidden(tokens), model.hidden(other)
    assert torch.equal(before[:, :place], after[:, :place])
    assert (before - after)[:, place : place + 8].abs().amax(-1).min() > 1e-4


def test_padding_at_the_end_changes_no_token_and_no_gradient_before_it():
    model, tokens = build(), draw_tokens()
    padded = torch.cat([tokens, draw_tokens(steps=9, seed=1)], 1)
    torch.testing.assert_close(model.hidden(padded)[:, :40], model.hidden(tokens), atol=1e-6, rtol=0)
    gradients = []
    for rows in (model.hidden(tokens), model.hidden(padded)[:, :40]):
        model.zero_grad()
        rows.square().sum(-1).log().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_reading_token_by_token():
    model, tokens = build().double(), draw_tokens()
    gradients = []
    for pieces in (tokens.split(40, 1), tokens.split(1, 1)):
        state, loss = model.initial_state(3).double(), torch.zeros((), dtype=torch.float64)
        for piece in pieces:
            hidden, state = model.stream(piece, state)
            loss = loss + (hidden * torch.arange(16)).sin().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for name, one, other in zip(dict(model.named_parameters()), *gradients):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def test_time_constants_of_a_new_net_are_spread_from_one_to_hundreds_of_tokens():
    mixer = RecurrentLanguageModel(LanguageSettings(**(SETTINGS | {"state_width": 512}))).blocks[0].mixer
    tokens = -1 / torch.sigmoid(mixer.decay.bias.detach().double()).log()
    assert tokens.min() >= 1.0
    assert tokens.max() <= SLOWEST_TOKENS + 1e-3
    for some in (tokens, tokens[:64], tokens[256:320]):  # what a narrow net has, and what it gets when it grows
        shares = some.log().sort().values / torch.tensor(SLOWEST_TOKENS).double().log()
        even = (torch.arange(len(some)) + 0.5) / len(some)
        assert (shares - even).abs().max() < 0.05


def test_parameters_have_the_names_that_growth_and_adapters_know():
    model = build()
    names = {name: parameter for name, parameter in model.named_parameters() if "blocks.0." in name}
    layers = ("mixer.value", "mixer.decay", "mixer.gate", "mixer.out", "ff.gate", "ff.up", "ff.down")
    expected = {f"blocks.0.{name}.weight" for name in (*layers, "mixer_norm", "ff_norm")} | {
        "blocks.0.mixer.decay.bias"
    }
    assert set(names) == expected
    writing = {
        name
        for name, _ in model.named_parameters()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in model.writers)
    }
    ends = {f"blocks.{layer}.{name}.weight" for layer in range(2) for name in ("mixer.out", "ff.down")}
    assert writing == ends | {"embedding.weight"}


def test_zeros_in_new_channels_of_the_stream_change_nothing():
    model, wide = build(), build(d_model=24, state_width=32, ff_width=64)
    state = wide.state_dict()
    for name, old in model.state_dict().items():
        new = state[name]
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in model.writers):
            new.zero_()
        place = tuple(slice(size) for size in old.shape)
        new[place] = old * (16 / 24) ** 0.5 if "norm" in name else old
    tokens = draw_tokens()
    torch.testing.assert_close(wide(tokens), model(tokens), atol=2e-5, rtol=1e-5)


def program(**changes):
    def loss(model, batch):
        return {"nll": linear_cross_entropy(model.hidden(batch["tokens"][:, :-1]), model.head, batch["tokens"][:, 1:])}

    return TrainingProgram(
        build_model=lambda: build(**changes).train(),
        make_batch=lambda n, seq_len=None: {"tokens": draw_tokens(n, (seq_len or 32) + 1)},
        loss=loss,
        count=lambda batch: {"nll": batch["tokens"][:, 1:].numel()},
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
        blocks=BLOCKS,
    )


def gradients_of(layout):
    own = program()
    model = own.build()
    step = TrainingStep(layout, own, model, own.optimizer(model))
    batch = own.batch(4)
    sums = step.gradients(batch, own.count(batch), 4)
    return float(sums["nll"]), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("layout", "tolerance"),
    [
        (StepLayout(3), 1e-5),
        (StepLayout(1, checkpointing="blocks"), 1e-6),
        (StepLayout(2, checkpointing="blocks", chunked_loss=True), 1e-5),
        (StepLayout(1, precision="bf16"), 0.1),
    ],
)
def test_every_way_to_fit_a_step_gives_the_same_gradients(layout, tolerance):
    loss, gradients = gradients_of(StepLayout(1))
    other, found = gradients_of(layout)
    assert other == pytest.approx(loss, rel=tolerance)
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-7, name


def test_training_lowers_the_loss():
    own = program(num_layers=1)
    model = own.build()
    step = TrainingStep(StepLayout(1), own, model, own.optimizer(model), clip=1.0)
    losses = [step(own.batch(4)).losses["nll"] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("kind", "precision"), [("cpu", "fp32"), ("cpu", "bf16"), ("t4", "fp16")])
def test_a_step_can_be_simulated_and_needs_as_much_more_as_there_are_tokens_more(kind, precision):
    peaks = [
        simulate(program(), find_device(kind), micro_batch_size=4, precision=precision, seq_len=length).peak()[1]
        for length in (64, 128, 256)
    ]
    assert peaks[1] > peaks[0]
    assert (peaks[2] - peaks[1]) / (peaks[1] - peaks[0]) == pytest.approx(2.0, rel=0.05)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "bundle"
    script = Path(__file__).with_name("recurrent_language_export.py")
    command = [sys.executable, "-W", "error", script, folder, json.dumps(SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("recurrent_language_export", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = build()
    model.load_state_dict(torch.load(folder.with_suffix(".pt"), weights_only=True))
    return folder / "model.onnx", module.Reader(model), json.loads(done.stdout)


@pytest.mark.parametrize(("n", "steps"), [(1, 1), (5, 1), (1, 9), (3, 200)])
def test_the_exported_graph_agrees_for_any_batch_and_length(exported, n, steps):
    path, reader, _ = exported
    tokens, state = draw_tokens(n, steps), torch.randn(n, 2, 32, generator=torch.Generator().manual_seed(n))
    with torch.no_grad():
        expected = reader(tokens, state)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = session.run(None, {"tokens": tokens.numpy(), "state": state.numpy()})
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-4, rtol=1e-5)


def test_the_exported_graph_is_standard_and_scans_once_a_layer(exported):
    path, _, card = exported
    graph = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 20)]
    assert not graph.functions
    assert [node.op_type for node in graph.graph.node].count("Scan") == 2
    assert all(entry["within"] for batch in card["parity"]["batches"] for entry in batch["outputs"].values())
