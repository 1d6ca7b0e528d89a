"""What belongs to a layer, how its weights spread, and the singular values of what is recurrent."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memfit.training import layers
from memfit.training.layers import layers_of, recurrent_singular_values, weight_figures


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(3))
        self.tokens = nn.Embedding(11, 6)
        self.conv = weight_norm(nn.Conv1d(6, 4, 3))
        self.rnn = nn.LSTM(4, 5, num_layers=2, bidirectional=True)
        self.cell = nn.GRUCell(10, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 2)


def units(model: nn.Module) -> dict[str, int]:
    return {layer.name: layer.num_units for layer in layers_of(model)}


def test_parameters_belong_to_the_module_that_owns_them_and_units_are_rows_of_weights():
    expected = {
        "(model)": 0, "tokens": 0, "conv": 4, "rnn.l0": 2 * 2 * 20, "rnn.l1": 2 * 2 * 20, "cell": 2 * 15, "norm": 0,
        "head": 2,
    }  # fmt: skip
    assert units(Mixed()) == expected


def test_the_layers_hold_every_parameter_once():
    model = Mixed()
    held = [weight.parameter for layer in layers_of(model) for weight in layer.weights]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    assert len(held) == len(list(model.parameters()))


def test_what_is_not_trained_has_no_layer():
    model = Mixed()
    for parameter in (*model.conv.parameters(), model.head.weight):
        parameter.requires_grad_(requires_grad=False)
    found = {layer.name: layer for layer in layers_of(model)}
    assert "conv" not in found
    assert [tuple(weight.parameter.shape) for weight in found["head"].weights] == [(2,)]
    assert found["head"].num_units == 0


def test_inputs_of_a_transposed_convolution_are_no_units():
    assert units(nn.ConvTranspose1d(3, 5, 2)) == {"(model)": 0}


def test_the_figures_of_weights_are_those_of_all_of_a_layers_weights_and_biases_count_in_the_norm_alone():
    model = Mixed()
    with torch.no_grad():
        model.rnn.weight_ih_l0.add_(3.0)
    found = dict(zip(units(model), weight_figures(layers_of(model)), strict=False))
    own = [parameter for name, parameter in model.rnn.named_parameters() if "_l0" in name]
    weights = torch.cat([parameter.detach().flatten() for parameter in own if parameter.dim() > 1]).double()
    expected = [weights.mean(), weights.std(correction=0), weights.min(), weights.max()]
    got = [found["rnn.l0"][name] for name in ("mean", "std", "min", "max")]
    assert got == pytest.approx([float(value) for value in expected], rel=1e-5)
    assert found["rnn.l0"]["weight_norm"] == pytest.approx(
        math.sqrt(sum(float(parameter.detach().double().square().sum()) for parameter in own)), rel=1e-6
    )


def test_the_last_figures_are_those_of_the_whole_net():
    model = nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 3))
    *_, total = weight_figures(layers_of(model))
    everything = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert total["weight_norm"] == pytest.approx(float(everything.norm()), rel=1e-6)


def test_weights_that_are_all_alike_have_no_spread():
    assert [figures["std"] for figures in weight_figures(layers_of(nn.RMSNorm(1000)))] == [0.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_shows_in_its_layers_figures(value):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight[1, 1] = value
    bad, good, _total = weight_figures(layers_of(model))
    assert not math.isfinite(bad["weight_norm"])
    assert math.isnan(bad["max"])
    assert all(map(math.isfinite, good.values()))


def test_half_precision_weights_have_figures_too():
    model = nn.Linear(64, 64).bfloat16()
    figures = weight_figures(layers_of(model))[0]
    assert figures["weight_norm"] == pytest.approx(float(nn.utils.get_total_norm(model.parameters()).float()), rel=0.01)


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of all that operators return and that was not there before."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(leaf.untyped_storage()._cdata) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        found = func(*args, **(kwargs or {}))
        new = [leaf for leaf in tree_leaves(found) if torch.is_tensor(leaf)]
        self.bytes += sum(leaf.nbytes for leaf in new if id(leaf.untyped_storage()._cdata) not in before)
        return found


def test_neither_weights_nor_gradients_are_copied():
    model = nn.Sequential(nn.Linear(500, 500), nn.Conv2d(20, 300, 5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = layers_of(model)
    with AllocatedBytes() as allocated, torch.no_grad():
        weight_figures(found)
        for layer in found:
            for weight in layer.weights:
                weight.rows()
    assert 0 < allocated.bytes < 20_000 < model[0].weight.nbytes / 10


def test_a_norm_per_unit_or_what_has_the_norm_of_all():
    linear, tokens = nn.Linear(3, 4), nn.Embedding(9, 2, sparse=True)
    linear(torch.ones(2, 3))[:, 1].sum().backward()
    tokens(torch.tensor([3, 3, 5])).sum().backward()
    (layer,), (rows,) = layers_of(linear), layers_of(tokens)
    kernel, bias = layer.weights
    assert kernel.rows().tolist() == pytest.approx([0.0, 2 * math.sqrt(3), 0.0, 0.0])
    assert bias.rows() is linear.bias.grad
    assert rows.weights[0].rows().tolist() == pytest.approx([math.sqrt(2 * 4 + 2 * 1)])


def test_singular_values_are_told_by_gate():
    model = Mixed()
    found = recurrent_singular_values(model)
    names = [f"rnn.weight_hh_l{layer}{end}" for layer in (0, 1) for end in ("", "_reverse")]
    assert list(found) == [*names, "cell.weight_hh"]
    assert list(found["cell.weight_hh"]) == ["reset", "update", "new"]
    assert list(found[names[0]]) == ["input", "forget", "cell", "output"]
    forget = np.linalg.svd(model.rnn.weight_hh_l0.detach().numpy()[5:10], compute_uv=False)
    assert found[names[0]]["forget"] == pytest.approx([forget[0], forget[2], forget[4]], rel=1e-4)
    assert list(recurrent_singular_values(nn.RNN(2, 3))) == ["weight_hh_l0"]
    assert recurrent_singular_values(nn.Linear(3, 3)) == {}


def test_singular_values_that_would_take_long_are_left_out(monkeypatch):
    monkeypatch.setattr(layers, "MAX_SINGULAR_WORK", 4 * 5**3)
    assert list(recurrent_singular_values(Mixed())) == ["rnn.weight_hh_l0"]


def test_a_recurrent_matrix_that_is_not_finite_or_not_trained_has_no_singular_values():
    model = nn.RNN(2, 3, num_layers=2)
    model.weight_hh_l0.requires_grad_(requires_grad=False)
    with torch.no_grad():
        model.weight_hh_l1[0, 0] = float("nan")
    found = recurrent_singular_values(model)
    assert list(found) == ["weight_hh_l1"]
    assert all(math.isnan(value) for value in found["weight_hh_l1"]["hidden"])
