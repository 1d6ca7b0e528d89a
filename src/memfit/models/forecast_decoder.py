"""Decoders of forecasts, one step after the other, with attention over the history.

Decoder: Sutskever et al., 2014. Attention: additive (Bahdanau et al., 2015), multiplicative (Luong et al., 2015,
"general").
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.models.beam_search import Expansion, Found, States, beam_search, spread
from memfit.models.forecaster_settings import ForecasterSettings

_CELLS: dict[str, type[nn.RNNCellBase]] = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}
NEGLIGIBLE = 1e-20
"""A probability so small that it does not move a bin's value."""


class Attention(nn.Module):
    """Weigh the encoder's steps for one query; the encoder's part is projected once for all queries."""

    def __init__(self, kind: str, hidden: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Linear(width, hidden, bias=False)
        self.query = nn.Linear(hidden, hidden) if kind == "bahdanau" else None
        self.energy = nn.Linear(hidden, 1, bias=False) if kind == "bahdanau" else None

    def forward(self, query: Tensor, keys: Tensor, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Map query [n, hidden], keys [n, T, hidden], encoded [n, T, width] to context [n, width], weights [n, T]."""
        if self.query is not None and self.energy is not None:
            scores = self.energy(torch.tanh(self.query(query).unsqueeze(1) + keys)).squeeze(-1)
        else:
            scores = torch.matmul(keys, query.unsqueeze(-1)).squeeze(-1)
        weights = scores.float().softmax(dim=-1)
        return torch.matmul(weights.to(encoded.dtype).unsqueeze(1), encoded).squeeze(1), weights


class Bins(nn.Module):
    """A step's outputs as a distribution over bins around evenly spaced points; what is predicted lies near one.

    The points of all steps count from the same origin. Were they changes since the step before, they could be finer;
    but the likeliest change is often none, and what each step misses would add up.
    """

    points: Tensor
    """[K], ascending, in the decoder's units."""

    def __init__(self, num_bins: int, reach: float) -> None:
        super().__init__()
        self.register_buffer("points", torch.linspace(-reach, reach, num_bins))

    def values(self, logits: Tensor) -> Tensor:
        """Return what each bin stands for, [n, K], for logits [n, K]: the mean of the probability near its point.

        Near are the point itself and its two neighbours, among which a truth is shared out while learning: so that
        values may lie between points. Where nothing is probable, it is the point.
        """
        probabilities = logits.softmax(-1)
        near = _with_neighbours(torch.stack([probabilities, probabilities * self.points], 1))
        return (near[:, 1] + NEGLIGIBLE * self.points) / (near[:, 0] + NEGLIGIBLE)

    def likeliest(self, logits: Tensor) -> Tensor:
        """Return the value of the likeliest bin, [n], for logits [n, K]."""
        return self.values(logits).gather(1, logits.argmax(1, keepdim=True)).squeeze(1)

    def cross_entropy(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the cross-entropy, [n], of true values [n], each shared out among the two points beside it.

        The shares are those whose mean is the value itself. One beyond the outermost point counts as that point.
        """
        spacing = self.points[1] - self.points[0]
        last = self.points.shape[0] - 1
        place = ((truth - self.points[0]) / spacing).clamp(0, last)
        lower = place.floor().clamp(max=last - 1)
        share = (place - lower).unsqueeze(-1)
        beside = torch.stack([lower, lower + 1], 1).long()
        log_probabilities = F.log_softmax(logits, dim=-1).gather(1, beside)
        return -(log_probabilities * torch.cat([1 - share, share], 1)).sum(1)


def _with_neighbours(x: Tensor) -> Tensor:
    """Add to each entry of the last dimension the ones beside it."""
    padded = F.pad(x, (1, 1))
    return padded[..., :-2] + x + padded[..., 2:]


class Decoded(NamedTuple):
    """What a decoder found, in the units that it was given."""

    value: Tensor
    """[n, horizon]."""
    alignment: Tensor | None
    """[n, horizon, T]: the attention's weights."""
    cross_entropy: Tensor | None
    """[n, horizon]: of the true values, where there are bins and a truth."""


class Decoder(nn.Module):
    """One step after the other: as many cells as the encoder has layers, each begun by a layer's last states.

    Additive attention is asked by the top state before a step and feeds it; multiplicative attention is asked by the
    state after it and feeds the output, as in the papers.
    """

    def __init__(self, width: int, settings: ForecasterSettings, change_std: float = 1.0) -> None:
        super().__init__()
        hidden, kind = settings.hidden, settings.attention
        self.kind, self.horizon, self.beam_width = kind, settings.horizon, settings.beam_width
        build, layers = _CELLS[settings.cell], settings.num_layers
        first = 1 + (width if kind == "bahdanau" else 0)
        self.cells = nn.ModuleList([build(hidden if layer else first, hidden) for layer in range(layers)])  # type: ignore[call-arg]
        count = 2 if settings.cell == "lstm" else 1
        self.bridges = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, hidden) for _ in range(count)) for _ in range(layers)
        )
        self.attention = None if kind == "none" else Attention(kind, hidden, width)
        self.merge = nn.Linear(width + hidden, hidden) if kind == "luong" else None
        self.dropout = nn.Dropout(settings.dropout)
        scale = change_std if settings.predict_change else 1.0
        self.bins = Bins(settings.num_bins, settings.bin_range * scale) if settings.output == "bins" else None
        self.out = nn.Linear(hidden, settings.num_bins if self.bins else 1)

    def forward(
        self,
        encoded: Tensor,
        states: Sequence[States],
        start: Tensor,
        truth: Tensor | None = None,
        forced: Tensor | None = None,
    ) -> Decoded:
        """Decode greedily, or with the true value before a step where `forced`; by a beam where nothing is to learn.

        encoded [n, T, width], states per layer [n, width], start [n]: the value before the first step. truth and
        forced (bool): [n, horizon]. A beam needs a width above 1, evaluation mode and no truth: with one, the
        cross-entropy is asked for, which is that along the greedy path.
        """
        if self.bins is not None and self.beam_width > 1 and truth is None and not self.training:
            found = self.search(encoded, states, start)
            return Decoded(found.values, found.weights, None)
        hidden, keys, before = self._begin(states), self._keys(encoded), start
        values: list[Tensor] = []
        weights: list[Tensor] = []
        losses: list[Tensor] = []
        for step in range(self.horizon):
            out, hidden, weight = self._step(before, hidden, keys, encoded)
            value = out.squeeze(-1) if self.bins is None else self.bins.likeliest(out)
            values.append(value)
            weights += [] if weight is None else [weight]
            if self.bins is not None and truth is not None:
                losses.append(self.bins.cross_entropy(out, truth[:, step]))
            before = value
            if truth is not None and forced is not None and step + 1 < self.horizon:
                before = torch.where(forced[:, step + 1], truth[:, step], value)
        return Decoded(*(torch.stack(found, 1) if found else None for found in (values, weights, losses)))  # type: ignore[arg-type]

    def search(self, encoded: Tensor, states: Sequence[States], start: Tensor) -> Found:
        """Return the best sequence of bins that a beam finds; it takes beam_width times a greedy step's memory."""
        width, keys = self.beam_width, self._keys(encoded)
        encoded = spread(encoded, width)
        keys = None if keys is None else spread(keys, width)

        def expand(before: Tensor, hidden: Sequence[States]) -> Expansion:
            assert self.bins is not None
            out, after, weight = self._step(before, hidden, keys, encoded)
            return Expansion(F.log_softmax(out, dim=-1), self.bins.values(out), after, weight)

        return beam_search(expand, start, self._begin(states), width=width, steps=self.horizon)

    def _keys(self, encoded: Tensor) -> Tensor | None:
        found: Tensor | None = None if self.attention is None else self.attention.keys(encoded)
        return found

    def _begin(self, states: Sequence[States]) -> Sequence[States]:
        """Map the encoder's last states to the cells' first ones."""
        found: list[States] = []
        for bridges, own in zip(self.bridges, states, strict=True):
            assert isinstance(bridges, nn.ModuleList)
            found.append(tuple(torch.tanh(bridge(state)) for bridge, state in zip(bridges, own, strict=True)))
        return found

    def _step(
        self, before: Tensor, hidden: Sequence[States], keys: Tensor | None, encoded: Tensor
    ) -> tuple[Tensor, Sequence[States], Tensor | None]:
        """Return outputs [n, 1] or logits [n, K], the states after the step, and the attention's weights [n, T]."""
        x, weight = before.unsqueeze(-1), None
        if self.attention is not None and self.kind == "bahdanau":
            assert keys is not None
            context, weight = self.attention(hidden[-1][0], keys, encoded)
            x = torch.cat([x.to(context.dtype), context], -1)
        after: list[States] = []
        for layer, (cell, states) in enumerate(zip(self.cells, hidden, strict=True)):
            found = cell(x, states if len(states) == 2 else states[0])
            after.append(found if isinstance(found, tuple) else (found,))
            x = self.dropout(after[-1][0]) if layer + 1 < len(hidden) else after[-1][0]
        if self.attention is not None and self.merge is not None:
            assert keys is not None
            context, weight = self.attention(x, keys, encoded)
            x = torch.tanh(self.merge(torch.cat([context, x.to(context.dtype)], -1)))
        return self.out(self.dropout(x)).float(), after, weight
