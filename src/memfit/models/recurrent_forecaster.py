"""Recurrent nets that forecast several rows: a direct head, or a decoder with attention.

Cells: Elman, 1990; LSTM (Hochreiter and Schmidhuber, 1997); GRU (Cho et al., 2014). Decoder: Sutskever et al., 2014.
Attention: additive (Bahdanau et al., 2015), multiplicative (Luong et al., 2015, "general"). Teacher forcing that falls
while training: scheduled sampling (Bengio et al., 2015), linear.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memfit.models.forecaster_settings import ForecasterSettings
from memfit.models.normalization import Normalization

_LAYERS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
_CELLS: dict[str, type[nn.RNNCellBase]] = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}
_GATES = {"RNN_TANH": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}
"""Which of torch's gates stands where in ONNX: GRU r z n -> z r h, LSTM i f c o -> i o f c."""
States = tuple[Tensor, ...]


class RecurrentLayer(nn.Module):
    """One recurrent layer, the normalization of its outputs, and dropout."""

    def __init__(self, inputs: int, settings: ForecasterSettings) -> None:
        super().__init__()
        width = settings.hidden * (2 if settings.bidirectional else 1)
        kind = _LAYERS[settings.cell]
        self.layer = kind(inputs, settings.hidden, batch_first=True, bidirectional=settings.bidirectional)  # type: ignore[call-arg,arg-type]
        norms = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": _BatchNorm}
        self.norm = norms[settings.norm](width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, States]:
        """Map [n, T, inputs] to outputs [n, T, width] and states, each [n, width].

        The states are the outputs where each direction has read everything, and those of an LSTM's cells.
        """
        if torch.compiler.is_exporting():
            out, states = _as_onnx(self.layer, x)
        else:
            out, last = self.layer(x)
            states = last if isinstance(last, tuple) else (last,)
        out = self.dropout(self.norm(out))
        hidden = self.layer.hidden_size
        ends = torch.cat([out[:, -1, :hidden], out[:, 0, hidden:]], dim=-1)
        return out, (ends, *(state.transpose(0, 1).flatten(1) for state in states[1:]))


class _BatchNorm(nn.Module):
    """Normalize each channel of [n, T, C] over samples and steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return out


def _as_onnx(layer: nn.RNNBase, x: Tensor) -> tuple[Tensor, States]:
    """Stand for ONNX's own operator while exporting, which the parity check then runs.

    The exporter would unroll an RNN over a fixed number of steps, and fix the length of an LSTM's or a GRU's outputs.
    Returns outputs [n, T, width] and states [directions, n, hidden].
    """
    n, steps, hidden = x.shape[0], x.shape[1], layer.hidden_size
    ends = ("", "_reverse") if layer.bidirectional else ("",)
    order = _GATES[layer.mode]

    def stacked(name: str) -> Tensor:
        """Return one kind of weights of all directions, gates in ONNX's order."""
        found = [getattr(layer, f"{name}_l0{end}").unflatten(0, (len(order), hidden)) for end in ends]
        return torch.stack([torch.cat([gates[gate] for gate in order]) for gates in found])

    state = (len(ends), n, hidden)
    attrs: dict[str, Any] = {"hidden_size": hidden}
    attrs |= {"direction": "bidirectional" if layer.bidirectional else "forward"}
    attrs |= {"linear_before_reset": 1} if layer.mode == "GRU" else {}
    out, *states = torch.onnx.ops.symbolic_multi_out(
        layer.mode.partition("_")[0],
        (
            x.transpose(0, 1),
            stacked("weight_ih"),
            stacked("weight_hh"),
            torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1),
        ),
        attrs=attrs,
        dtypes=[x.dtype] * (3 if layer.mode == "LSTM" else 2),
        shapes=[(steps, len(ends), n, hidden), *[state] * (2 if layer.mode == "LSTM" else 1)],
    )
    return out.permute(2, 0, 1, 3).flatten(2), tuple(states)


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


class Decoder(nn.Module):
    """One step after the other: as many cells as the encoder has layers, each begun by a layer's last states.

    Additive attention is asked by the top state before a step and feeds it; multiplicative attention is asked by the
    state after it and feeds the output, as in the papers.
    """

    def __init__(self, width: int, settings: ForecasterSettings) -> None:
        super().__init__()
        hidden, kind = settings.hidden, settings.attention
        self.kind, self.horizon = kind, settings.horizon
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
        self.out = nn.Linear(hidden, 1)

    def forward(
        self, encoded: Tensor, states: Sequence[States], start: Tensor, truth: Tensor | None, forced: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Decode greedily, or with the true value before a step where `forced`.

        encoded [n, T, width], states per layer [n, width], start [n]: the value before the first step. truth and
        forced (bool): [n, horizon]. Returns values [n, horizon] and weights [n, horizon, T], None without attention.
        """
        hidden = self._begin(states)
        keys = None if self.attention is None else self.attention.keys(encoded)
        values: list[Tensor] = []
        weights: list[Tensor] = []
        before = start
        for step in range(self.horizon):
            value, hidden, weight = self._step(before, hidden, keys, encoded)
            values.append(value)
            weights += [] if weight is None else [weight]
            before = value
            if truth is not None and forced is not None and step + 1 < self.horizon:
                before = torch.where(forced[:, step + 1], truth[:, step], value)
        return torch.stack(values, 1), torch.stack(weights, 1) if weights else None

    def _begin(self, states: Sequence[States]) -> list[States]:
        """Map the encoder's last states to the cells' first ones."""
        found: list[States] = []
        for bridges, own in zip(self.bridges, states, strict=True):
            assert isinstance(bridges, nn.ModuleList)
            found.append(tuple(torch.tanh(bridge(state)) for bridge, state in zip(bridges, own, strict=True)))
        return found

    def _step(
        self, before: Tensor, hidden: list[States], keys: Tensor | None, encoded: Tensor
    ) -> tuple[Tensor, list[States], Tensor | None]:
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
        return self.out(self.dropout(x)).squeeze(-1).float(), after, weight


class RecurrentForecaster(nn.Module):
    """Encode a history and forecast the rows after it; normalizes inside, by buffers fitted on train rows."""

    samples_trained: Tensor
    """Samples that went through the net in training, int64: what teacher forcing falls with."""

    def __init__(self, settings: ForecasterSettings, normalization: Normalization) -> None:
        super().__init__()
        self.settings, self.normalization = settings, normalization
        width = settings.hidden * (2 if settings.bidirectional else 1)
        channels = 1 + len(normalization.feature_mean)
        self.layers = nn.ModuleList(
            RecurrentLayer(width if layer else channels, settings) for layer in range(settings.num_layers)
        )
        self.head = nn.Linear(width, settings.horizon) if settings.head == "direct" else Decoder(width, settings)
        if settings.head == "seq2seq":
            self.register_buffer("samples_trained", torch.zeros((), dtype=torch.int64))

    def forward(
        self, history: Tensor, target: Tensor | None = None, draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map a history [n, T, channels] in the user's units, of any length T, to normalized values [n, horizon].

        The second output is the attention's alignment [n, horizon, T], each row of sum 1, or None. In training, a
        decoder is given target [n, horizon] in the user's units and draws [n, horizon], uniform in [0, 1): a step
        whose draw lies below the share of forcing sees the true value before it. The share is that of the sample's
        own place in the order of training, so that it does not depend on how a batch is cut.
        """
        normalized = self.normalization.values(history[:, :, 0])
        x = torch.cat([normalized.unsqueeze(-1), self.normalization.features(history[:, :, 1:])], dim=-1)
        encoded, states = x, []
        for layer in self.layers:
            encoded, last = layer(encoded)
            states.append(last)
        newest = normalized[:, -1]
        base = newest if self.settings.predict_change else torch.zeros_like(newest)
        if isinstance(self.head, nn.Linear):
            return self.head(states[-1][0]).float() + base.unsqueeze(-1), None
        truth = forced = None
        if self.training and target is not None and draws is not None:
            truth = self.normalization.values(target) - base.unsqueeze(-1)
            forced = draws < self._forcing(len(draws)).unsqueeze(-1)
        value, alignment = self.head(encoded, states, newest - base, truth, forced)
        return value + base.unsqueeze(-1), alignment

    def _forcing(self, samples: int) -> Tensor:
        """Return the share of forcing for each of the next samples, [n], and count them."""
        place = self.samples_trained + torch.arange(samples, device=self.samples_trained.device)
        self.samples_trained += samples
        settings = self.settings
        done = (place.double() / settings.forcing_samples).clamp(max=1.0)
        return (settings.forcing_start + (settings.forcing_end - settings.forcing_start) * done).float()


BLOCKS: tuple[type[nn.Module], ...] = (RecurrentLayer,)
"""What activation checkpointing wraps."""
