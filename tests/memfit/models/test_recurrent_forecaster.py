"""Recurrent forecasters: normalization, heads, attention and teacher forcing."""

import dataclasses

import pytest
import torch
from torch import nn

from memfit.errors import ConfigError
from memfit.models.forecaster_settings import ATTENTIONS, CELLS, NORMS, ForecasterSettings
from memfit.models.normalization import Normalization
from memfit.models.recurrent_forecaster import RecurrentForecaster

SCALE = {"value_mean": 50.0, "value_std": 10.0, "feature_mean": [1.0, -2.0], "feature_std": [2.0, 0.5]}
DECODER = {"head": "seq2seq", "forcing_samples": 100}


def build(**settings):
    torch.manual_seed(0)
    return RecurrentForecaster(
        ForecasterSettings(**{"horizon": 4, "hidden": 6, **settings}), Normalization(**SCALE)
    ).eval()


def history_of(n=5, steps=7):
    torch.manual_seed(1)
    return torch.randn(n, steps, 3) * torch.tensor([10.0, 2.0, 0.5]) + torch.tensor([50.0, 1.0, -2.0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("head", ["direct", *ATTENTIONS])
def test_every_kind_of_net_forecasts_from_any_length(cell, norm, bidirectional, head):
    decoder = {} if head == "direct" else {**DECODER, "attention": head}
    model = build(cell=cell, norm=norm, bidirectional=bidirectional, num_layers=2, dropout=0.1, **decoder)
    for steps in (1, 7, 12):
        value, alignment, _ = model(history_of(steps=steps))
        assert value.shape == (5, 4)
        assert (alignment is None) == (head in ("direct", "none"))
        if alignment is not None:
            assert alignment.shape == (5, 4, steps)
            torch.testing.assert_close(alignment.sum(-1), torch.ones(5, 4))
    model.train()(history_of(), history_of()[:, :4, 0], torch.rand(5, 4))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("num_layers", [1, 5])
def test_without_normalization_it_is_torchs_own_stack(num_layers):
    model = build(cell="lstm", bidirectional=True, num_layers=num_layers, predict_change=False)
    own = nn.LSTM(3, 6, num_layers, batch_first=True, bidirectional=True)
    weights = {}
    for index, layer in enumerate(model.layers):
        weights |= {name.replace("l0", f"l{index}"): value for name, value in layer.layer.state_dict().items()}
    own.load_state_dict(weights)
    x = history_of()
    scaled = (x - torch.tensor([50.0, 1.0, -2.0])) / torch.tensor([10.0, 2.0, 0.5])
    _, (last, _) = own(scaled)
    torch.testing.assert_close(model(x)[0], model.head(torch.cat([last[-2], last[-1]], -1)))


@pytest.mark.parametrize("settings", [{}, {**DECODER, "attention": "luong"}])
def test_an_output_of_zero_is_persistence(settings):
    model = build(**settings)
    for parameter in (model.head.out if settings else model.head).parameters():
        nn.init.zeros_(parameter)
    x = history_of()
    found = model.normalization.denormalize(model(x)[0])
    torch.testing.assert_close(found, x[:, -1:, 0].expand(-1, 4))


def test_attention_weighs_as_in_the_papers():
    encoded, query = torch.randn(2, 5, 6), torch.randn(2, 6)
    luong = build(**DECODER, attention="luong").head.attention
    context, weights = luong(query, luong.keys(encoded), encoded)
    energies = torch.einsum("nh,hw,ntw->nt", query, luong.keys.weight, encoded)
    torch.testing.assert_close(weights, energies.softmax(-1))
    torch.testing.assert_close(context, torch.einsum("nt,ntw->nw", weights, encoded))
    bahdanau = build(**DECODER, attention="bahdanau").head.attention
    _, weights = bahdanau(query, bahdanau.keys(encoded), encoded)
    inner = torch.tanh(bahdanau.query(query)[:, None] + encoded @ bahdanau.keys.weight.T)
    torch.testing.assert_close(weights, (inner @ bahdanau.energy.weight[0]).softmax(-1))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_forced_step_sees_the_true_values_before_it_and_none_after(attention):
    model = build(**DECODER, attention=attention, forcing_end=1.0).train()
    x, target, draws = history_of(), history_of()[:, :4, 0], torch.rand(5, 4)
    value, *_ = model(x, target, draws)
    for step in range(4):
        changed = target.clone()
        changed[:, step] += 30.0
        other, *_ = model(x, changed, draws)
        torch.testing.assert_close(other[:, : step + 1], value[:, : step + 1])
        assert step == 3 or not torch.allclose(other[:, step + 1], value[:, step + 1])


def test_without_forcing_or_out_of_training_it_decodes_greedily():
    model = build(**DECODER, forcing_start=0.0)
    x, target, draws = history_of(), history_of()[:, :4, 0], torch.rand(5, 4)
    greedy, *_ = model(x)
    assert torch.equal(model.train()(x, target, draws)[0], greedy)
    forced = build(**DECODER)
    assert torch.equal(forced(x, target, draws)[0], greedy)
    assert int(forced.samples_trained) == 0


def test_the_share_of_forcing_falls_with_the_samples_trained():
    model = build(**DECODER, forcing_start=0.9, forcing_end=0.1).train()
    shares = torch.cat([model._forcing(30) for _ in range(5)])
    expected = 0.9 - 0.8 * (torch.arange(150) / 100).clamp(max=1.0)
    torch.testing.assert_close(shares, expected)
    assert int(model.state_dict()["samples_trained"]) == 150


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cell": "qrnn"}, "cell: expected one of rnn, lstm, gru"),
        ({"num_layers": 6}, "num_layers: expected 1 to 5, got 6"),
        ({"attention": "luong"}, "attention: expected none with head direct"),
        ({"dropout": 1.0}, "dropout: expected at least 0"),
        ({"forcing_end": 2.0}, "forcing_end: expected 0 to 1"),
        ({"horizon": 0}, "horizon: expected 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ForecasterSettings(horizon=4), **settings)
