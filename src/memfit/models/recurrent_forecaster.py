"""Recurrent nets that forecast several rows: a direct head, or a decoder with attention.

Cells: Elman, 1990; LSTM (Hochreiter and Schmidhuber, 1997); GRU (Cho et al., 2014). Teacher forcing that falls while
training: scheduled sampling (Bengio et al., 2015), linear.
"""

from typing import Any

import torch
from torch import Tensor, nn

from memfit.models.beam_search import States
from memfit.models.forecast_decoder import Decoded, Decoder
from memfit.models.forecaster_settings import ForecasterSettings
from memfit.models.normalization import Normalization

_LAYERS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
_GATES = {"RNN_TANH": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}
"""Which of torch's gates stands where in ONNX: GRU r z n -> z r h, LSTM i f c o -> i o f c."""


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


class RecurrentForecaster(nn.Module):
    """Encode a history and forecast the rows after it; normalizes inside, by buffers fitted on train rows."""

    samples_trained: Tensor
    """Samples that went through the net in training, int64: what teacher forcing falls with."""

    def __init__(self, settings: ForecasterSettings, normalization: Normalization, change_std: float = 1.0) -> None:
        """Build the net; change_std, for bins: of changes from the last known value to those to predict, normalized."""
        super().__init__()
        self.settings, self.normalization = settings, normalization
        width = settings.hidden * (2 if settings.bidirectional else 1)
        channels = 1 + len(normalization.feature_mean)
        self.layers = nn.ModuleList(
            RecurrentLayer(width if layer else channels, settings) for layer in range(settings.num_layers)
        )
        direct = settings.head == "direct"
        self.head = nn.Linear(width, settings.horizon) if direct else Decoder(width, settings, change_std)
        if not direct:
            self.register_buffer("samples_trained", torch.zeros((), dtype=torch.int64))

    def forward(self, history: Tensor, target: Tensor | None = None, draws: Tensor | None = None) -> Decoded:
        """Map a history [n, T, channels] in the user's units, of any length T, to normalized values [n, horizon].

        With them come the attention's alignment [n, horizon, T], each row of sum 1, or None; and, where outputs are
        bins and target [n, horizon], in the user's units, is given, its cross-entropy [n, horizon]. In training, a
        decoder is also given draws [n, horizon], uniform in [0, 1): a step whose draw lies below the share of forcing
        sees the true value before it. The share is that of the sample's own place in the order of training, so that
        it does not depend on how a batch is cut.
        """
        normalized = self.normalization.values(history[:, :, 0])
        x = torch.cat([normalized.unsqueeze(-1), self.normalization.features(history[:, :, 1:])], dim=-1)
        encoded, states = x, []
        for layer in self.layers:
            encoded, last = layer(encoded)
            states.append(last)
        newest = normalized[:, -1]
        base = (newest if self.settings.predict_change else torch.zeros_like(newest)).unsqueeze(-1)
        if isinstance(self.head, nn.Linear):
            return Decoded(self.head(states[-1][0]).float() + base, None, None)
        truth = None if target is None else self.normalization.values(target) - base
        forced = None
        if self.training and truth is not None and draws is not None:
            forced = draws < self._forcing(len(draws)).unsqueeze(-1)
        found: Decoded = self.head(encoded, states, newest - base.squeeze(-1), truth, forced)
        return found._replace(value=found.value + base)

    def _forcing(self, samples: int) -> Tensor:
        """Return the share of forcing for each of the next samples, [n], and count them."""
        place = self.samples_trained + torch.arange(samples, device=self.samples_trained.device)
        self.samples_trained += samples
        settings = self.settings
        done = (place.double() / settings.forcing_samples).clamp(max=1.0)
        return (settings.forcing_start + (settings.forcing_end - settings.forcing_start) * done).float()


BLOCKS: tuple[type[nn.Module], ...] = (RecurrentLayer,)
"""What activation checkpointing wraps."""
