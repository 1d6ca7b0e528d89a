"""Decoders whose steps are distributions over bins."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from memfit.errors import ConfigError
from memfit.models.forecast_decoder import Bins, Decoder
from memfit.models.forecaster_settings import ATTENTIONS, CELLS, ForecasterSettings

SETTINGS = ForecasterSettings(horizon=3, hidden=6, head="seq2seq", output="bins", num_bins=4, num_layers=2)


def build(**settings):
    torch.manual_seed(0)
    decoder = Decoder(6, dataclasses.replace(SETTINGS, **settings), change_std=0.5).eval()
    for name, weights in decoder.named_parameters():
        weights.data.mul_(3 if "bias" not in name else 1)  # so that steps differ
    return decoder


def given(cell="gru", n=5, steps=7):
    torch.manual_seed(1)
    states = tuple(torch.randn(n, 6) for _ in range(2 if cell == "lstm" else 1))
    return torch.randn(n, steps, 6), [states, states], torch.randn(n) / 10


# Bins


def test_bins_are_spread_evenly_over_the_range():
    assert build().bins.points.tolist() == pytest.approx([-2.0, -2 / 3, 2 / 3, 2.0])
    assert build(predict_change=False, num_bins=3, bin_range=3.0).bins.points.tolist() == [-3.0, 0.0, 3.0]


def test_the_cross_entropy_is_that_of_shares_whose_mean_is_the_truth():
    bins, logits = Bins(5, 2.0), torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    truth = torch.tensor([-2.0, 2.0, 0.0, 0.25, -1.9, 30.0])
    shares = torch.zeros(6, 5)
    for row, (bin_, share) in enumerate([(0, 1.0), (4, 1.0), (2, 1.0), (2, 0.75), (0, 0.9), (4, 1.0)]):
        shares[row, bin_] = share
        shares[row, min(bin_ + 1, 4)] += 1 - share
    torch.testing.assert_close(shares @ bins.points, truth.clamp(-2.0, 2.0))
    torch.testing.assert_close(bins.cross_entropy(logits, truth), F.cross_entropy(logits, shares, reduction="none"))


def test_a_bins_value_is_the_mean_of_what_is_likely_around_it():
    bins, shares = Bins(5, 2.0), torch.tensor([[0.0, 0.0, 0.75, 0.25, 0.0], [0.5, 0.2, 0.1, 0.1, 0.1]])
    values = bins.values(shares.clamp(min=1e-30).log())
    torch.testing.assert_close(values[0], torch.tensor([-2.0, 0.0, 0.25, 0.25, 1.0]))
    torch.testing.assert_close(values[1], torch.tensor([-1.2 / 0.7, -1.2 / 0.8, -0.1 / 0.4, 0.3 / 0.3, 0.3 / 0.2]))
    torch.testing.assert_close(bins.likeliest(shares.log()), values[[0, 1], [2, 0]])


# Search

SEQUENCES = list(itertools.product(range(4), repeat=3))


def log_probabilities(decoder, encoded, states, start):
    """Return those of all sequences, [n, 64], each followed on its own, and their values [n, 64, 3]."""
    totals, values = [], []
    for sequence in SEQUENCES:
        before, hidden, keys, total = start, decoder._begin(states), decoder._keys(encoded), 0.0
        values.append([])
        for choice in sequence:
            logits, hidden, _ = decoder._step(before, hidden, keys, encoded)
            total = total + logits.log_softmax(1)[:, choice]
            before = decoder.bins.values(logits)[:, choice]
            values[-1].append(before)
        totals.append(total)
    return torch.stack(totals, 1), torch.stack([torch.stack(own, 1) for own in values], 1)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_a_beam_as_wide_as_all_sequences_finds_the_true_maximum(cell, attention):
    decoder = build(cell=cell, attention=attention, beam_width=64)
    encoded, states, start = given(cell)
    totals, values = log_probabilities(decoder, encoded, states, start)
    best, place = totals.max(1)
    found = decoder.search(encoded, states, start)
    torch.testing.assert_close(found.log_probability, best)
    torch.testing.assert_close(found.values, values[torch.arange(5), place])
    forced = decoder(encoded, states, start, found.values, torch.ones(5, 3, dtype=torch.bool))
    assert (found.weights is None) == (attention == "none")
    if found.weights is not None:
        torch.testing.assert_close(forced.alignment, found.weights)


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_a_beam_of_one_is_greedy_and_a_wide_one_never_worse(attention):
    encoded, states, start = given(n=40)
    greedy = build(attention=attention)(encoded, states, start)
    one = build(attention=attention).search(encoded, states, start)
    assert torch.equal(one.values, greedy.value)
    wide = build(attention=attention, beam_width=16)(encoded, states, start)
    likelihoods = [build(attention=attention, beam_width=w).search(encoded, states, start) for w in (1, 16)]
    assert torch.equal(likelihoods[1].values, wide.value)
    assert (likelihoods[1].log_probability >= likelihoods[0].log_probability - 1e-6).all()
    assert not torch.equal(wide.value, greedy.value)


@torch.no_grad()
def test_with_a_truth_or_in_training_decoding_is_greedy():
    encoded, states, start = given(n=40)
    greedy, decoder = build()(encoded, states, start), build(beam_width=16)
    found = decoder(encoded, states, start, torch.zeros(40, 3))
    assert torch.equal(found.value, greedy.value)
    assert found.cross_entropy.shape == (40, 3)
    assert torch.equal(decoder.train()(encoded, states, start).value, greedy.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "value", "beam_width": 4}, "beam_width: expected 1 with output value, .*nothing to rank.*, got 4"),
        ({"head": "direct"}, "output: expected value with head direct"),
        ({"output": "quantiles"}, "output: expected one of value, bins"),
        ({"num_bins": 1}, "num_bins: expected 2 or more"),
        ({"bin_range": 0.0}, "bin_range: expected more than 0"),
        ({"beam_width": 0}, "beam_width: expected 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SETTINGS, **settings)
