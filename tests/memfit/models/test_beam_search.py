"""Beam search, against every sequence there is."""

import itertools

import pytest
import torch

from memfit.models.beam_search import Expansion, beam_search, spread

CHOICES, STEPS, SAMPLES = 3, 4, 6
SEQUENCES = list(itertools.product(range(CHOICES), repeat=STEPS))
VALUES = torch.tensor([-1.0, 0.5, 2.0])


@pytest.fixture(scope="module")
def expand():
    """A step whose outcome depends on all choices before it, by its state."""
    torch.manual_seed(3)
    cell = torch.nn.GRUCell(1, 5).requires_grad_(requires_grad=False)
    out = torch.nn.Linear(5, CHOICES).requires_grad_(requires_grad=False)
    out.weight.mul_(4)

    def step(before, states):
        after = cell(before.unsqueeze(1), states[0][0])
        weights = after.softmax(1)
        return Expansion(out(after).log_softmax(1), VALUES.expand(len(before), -1), [(after,)], weights)

    return step


def start():
    torch.manual_seed(4)
    return torch.randn(SAMPLES), torch.randn(SAMPLES, 5)


def follow(expand, sequences):
    """Take given choices [m, STEPS] of all samples; return log-probabilities [n, m] and weights [n, m, STEPS, 5]."""
    before, state = start()
    choices = torch.tensor(sequences).repeat(SAMPLES, 1)
    before, states = spread(before, len(sequences)), [(spread(state, len(sequences)),)]
    total, weights = torch.zeros(len(before)), []
    for step in range(STEPS):
        found = expand(before, states)
        total = total + found.log_probabilities.gather(1, choices[:, step : step + 1]).squeeze(1)
        before, states = VALUES[choices[:, step]], found.states
        weights.append(found.weights)
    return total.view(SAMPLES, -1), torch.stack(weights, 1).view(SAMPLES, -1, STEPS, 5)


def search(expand, width):
    before, state = start()
    return beam_search(expand, before, [(state,)], width=width, steps=STEPS)


@pytest.mark.parametrize("width", [CHOICES ** (STEPS - 1), CHOICES**STEPS, CHOICES**STEPS + 5])
def test_a_beam_as_wide_as_all_sequences_finds_the_likeliest(expand, width):
    totals, weights = follow(expand, SEQUENCES)
    best, place = totals.max(1)
    found = search(expand, width)
    torch.testing.assert_close(found.log_probability, best)
    assert torch.equal(found.values, VALUES[torch.tensor(SEQUENCES)[place]])
    torch.testing.assert_close(found.weights, weights[torch.arange(SAMPLES), place])


def test_a_width_of_one_is_greedy(expand):
    before, state = start()
    states, greedy = [(state,)], []
    for _ in range(STEPS):
        found = expand(before, states)
        before, states = VALUES[found.log_probabilities.argmax(1)], found.states
        greedy.append(before)
    assert torch.equal(search(expand, 1).values, torch.stack(greedy, 1))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_log_probability_is_that_of_the_sequence_returned(expand, width):
    found = search(expand, width)
    chosen = (found.values.unsqueeze(-1) == VALUES).int().argmax(-1)
    places = [SEQUENCES.index(tuple(own)) for own in chosen.tolist()]
    totals, weights = follow(expand, SEQUENCES)
    torch.testing.assert_close(found.log_probability, totals[torch.arange(SAMPLES), places])
    torch.testing.assert_close(found.weights, weights[torch.arange(SAMPLES), places])


def test_greedy_does_not_find_all_that_a_beam_finds(expand):
    greedy, some, all_of_them = (search(expand, width).log_probability for width in (1, 4, CHOICES**STEPS))
    assert (all_of_them >= greedy - 1e-6).all()
    assert (all_of_them >= some - 1e-6).all()
    assert (all_of_them > greedy + 1e-3).any()


def test_samples_do_not_mix(expand):
    before, state = start()
    whole = beam_search(expand, before, [(state,)], width=4, steps=STEPS)
    alone = beam_search(expand, before[2:3], [(state[2:3],)], width=4, steps=STEPS)
    torch.testing.assert_close(alone.values, whole.values[2:3])
    torch.testing.assert_close(alone.log_probability, whole.log_probability[2:3])
