"""Beam search: the likeliest sequence of choices that a search of a given width finds (Lowerre, 1976)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, cat

States = tuple[Tensor, ...]


class Expansion(NamedTuple):
    """What may follow each of m sequences."""

    log_probabilities: Tensor
    """[m, K]: of each choice, given its sequence."""
    values: Tensor
    """[m, K]: what each choice stands for, and what the next step is given."""
    states: Sequence[States]
    """Each [m, ...]: after the step."""
    weights: Tensor | None = None
    """[m, T]: attention of the step."""


class Found(NamedTuple):
    """The best sequence of each sample."""

    values: Tensor
    """[n, steps]."""
    weights: Tensor | None
    """[n, steps, T]."""
    log_probability: Tensor
    """[n]: of the whole sequence."""


Expand = Callable[[Tensor, Sequence[States]], Expansion]
"""Takes the values before a step, [m], and the states, each [m, ...]; m is samples times width, a sample's together."""


def beam_search(expand: Expand, start: Tensor, states: Sequence[States], *, width: int, steps: int) -> Found:
    """Keep the `width` sequences of highest total log-probability at each step; return the best one at the end.

    start: [n]; states: each [n, ...]. All sequences are equally long, so that totals need no normalization. A width of
    1 is greedy; one of K ** (steps - 1) or more misses nothing. Shapes do not depend on data, so that it can be traced.
    """
    samples = start.shape[0]
    # All beams begin alike, so that only the first one counts until choices have told them apart.
    scores = cat([start.new_zeros(1), start.new_full((width - 1,), -math.inf)]).expand(samples, width)
    before, states = spread(start, width), [tuple(spread(state, width) for state in own) for own in states]
    trail: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for _ in range(steps):
        found = expand(before, states)
        choices = found.log_probabilities.shape[-1]
        totals = scores.unsqueeze(-1) + found.log_probabilities.view(samples, width, choices)
        scores, picked = totals.flatten(1).topk(width, dim=1)
        values = found.values.reshape(samples, width * choices).gather(1, picked)
        parents = picked // choices
        states = [tuple(_rows(state, parents) for state in own) for own in found.states]
        trail.append((values, parents, found.weights))
        before = values.flatten()
    return _follow(trail, scores)


def spread(x: Tensor, width: int) -> Tensor:
    """Repeat each sample `width` times: [n, ...] to [n * width, ...]."""
    return x.unsqueeze(1).expand(-1, width, *[-1] * (x.dim() - 1)).flatten(0, 1)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Pick beams of each sample: [n * width, C] by places [n, k] to [n * k, C]."""
    beams = x.view(places.shape[0], -1, x.shape[-1])
    return beams.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1])).flatten(0, 1)


def _follow(trail: Sequence[tuple[Tensor, Tensor, Tensor | None]], scores: Tensor) -> Found:
    """Walk back from the best last beam; a step's weights are those of the beam that it came from."""
    best, place = scores.max(dim=1, keepdim=True)
    values: list[Tensor] = []
    weights: list[Tensor] = []
    for value, parents, weight in reversed(trail):
        values.append(value.gather(1, place))
        place = parents.gather(1, place)
        weights += [] if weight is None else [_rows(weight, place)]
    return Found(
        cat(values[::-1], 1),
        cat([weight.unsqueeze(1) for weight in weights[::-1]], 1) if weights else None,
        best.squeeze(1),
    )
