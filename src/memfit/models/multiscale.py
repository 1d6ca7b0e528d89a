"""The multi-scale series net: N-BEATS per window, a TCN, a Transformer, one fusion, three heads."""

import dataclasses
import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memfit.errors import ConfigError, DataError
from memfit.models.nbeats import NBeats, NBeatsBlock
from memfit.models.normalization import Normalization
from memfit.models.sizes import SIZES, Sizes
from memfit.models.tcn import TemporalBlock, TemporalConvNet
from memfit.models.transformer import EncoderLayer, TransformerEncoder

BLOCKS: tuple[type[nn.Module], ...] = (EncoderLayer, TemporalBlock, NBeatsBlock)
"""What activation checkpointing wraps: the repeated modules, each a function of one tensor."""


def build_multiscale(size: str, **overrides: Any) -> "MultiScaleNet":
    """Build the net in a size of SIZES; overrides are arguments of MultiScaleNet or fields of Sizes.

    Raises ConfigError for an unknown size, or an override that does not apply or is missing.
    """
    if size not in SIZES:
        raise ConfigError(f"The model's size must be one of {', '.join(SIZES)}; got {size!r}.")
    fields = {field.name for field in dataclasses.fields(Sizes)}
    arguments = {name: argument for name, argument in overrides.items() if name not in fields}
    changes = {name: argument for name, argument in overrides.items() if name in fields}
    parameters = inspect.signature(MultiScaleNet).parameters
    known = parameters.keys() - {"sizes"}
    for name in sorted(arguments.keys() - known):
        nearest = difflib.get_close_matches(name, sorted(known | fields), n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "see MultiScaleNet and Sizes."
        raise ConfigError(f"The multi-scale net has no setting {name!r}; {hint}")
    needed = {name for name in known if parameters[name].default is inspect.Parameter.empty}
    if missing := sorted(needed - arguments.keys()):
        raise ConfigError(f"The multi-scale net also needs {', '.join(missing)}; got none. Pass them by name.")
    return MultiScaleNet(sizes=dataclasses.replace(SIZES[size], **changes), **arguments)


class MultiScaleNet(nn.Module):
    """Predict the next value, its class and whether it exceeds the threshold, from windows and features.

    Each window gets an N-BEATS stack of its own; the TCN reads `tcn_window`, the Transformer `transformer_window`
    (None leaves the branch out). N-BEATS sees a window relative to its last value, the other branches its level.
    The value head predicts the change from the last value and starts at zero: an untrained net is the persistence
    baseline. Inputs are in the user's units.

    `attention_dropout` None means `dropout`. Raises ConfigError where the arguments cannot make a net.
    """

    def __init__(
        self,
        *,
        windows: Sequence[int],
        tcn_window: int | None,
        transformer_window: int | None,
        num_features: int,
        num_classes: int,
        value_mean: float,
        value_std: float,
        feature_mean: Sequence[float],
        feature_std: Sequence[float],
        sizes: Sizes,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
    ) -> None:
        super().__init__()
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        _check_windows(windows, tcn_window=tcn_window, transformer_window=transformer_window)
        _check_shares(dropout=dropout, attention_dropout=attention_dropout)
        _check_counts(num_features, num_classes, num_constants=len(feature_mean))
        self.windows = tuple(windows)
        self.tcn_window = tcn_window
        self.transformer_window = transformer_window
        self.num_features = num_features
        self.normalization = Normalization(
            value_mean=value_mean, value_std=value_std, feature_mean=feature_mean, feature_std=feature_std
        )
        branches = [_nbeats(window, sizes) for window in self.windows]
        self.nbeats = nn.ModuleDict({str(window): branch for window, branch in zip(self.windows, branches)})
        self.tcn = _tcn(tcn_window, sizes, dropout) if tcn_window else None
        self.transformer = (
            _transformer(transformer_window, sizes, dropout, attention_dropout) if transformer_window else None
        )
        self.feature_encoder = nn.Sequential(nn.Linear(num_features, sizes.feature_hidden), nn.GELU())
        width = 1 + sizes.feature_hidden + sum(branch.out_features for branch in branches)
        width += self.tcn.out_features if self.tcn else 0
        width += self.transformer.out_features if self.transformer else 0
        self.fusion = _fusion(width, sizes.fusion_hidden, dropout)
        self.value_head = nn.Linear(sizes.fusion_hidden, 1)
        self.class_head = nn.Linear(sizes.fusion_hidden, num_classes)
        self.exceeds_head = nn.Linear(sizes.fusion_hidden, 1)
        self._start_at_the_baseline()

    def _start_at_the_baseline(self) -> None:
        """Start at no change, near-equal classes and near-even odds; small weights still pass gradients on."""
        nn.init.zeros_(self.value_head.weight)
        for head in (self.class_head, self.exceeds_head):
            nn.init.normal_(head.weight, std=0.02)
        for head in (self.value_head, self.class_head, self.exceeds_head):
            nn.init.zeros_(head.bias)

    @property
    def context(self) -> int:
        """Return the longest window: how many steps of history a prediction needs."""
        return self.windows[-1]

    def forward(self, history: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Map history [n, L >= context] and features [n, F], raw, to value [n], class_logits and exceeds_logit.

        The value is in normalized units (`denormalize` takes it back), class_logits are [n, C], exceeds_logit is
        [n]; all are fp32. Raises DataError for inputs of another shape.
        """
        self._check_inputs(history, features)
        level = self.normalization.values(history)
        last = level[:, -1:]
        parts = [last, self.feature_encoder(self.normalization.features(features))]
        parts += [self.nbeats[str(window)](level[:, -window:] - last) for window in self.windows]
        if self.tcn is not None and self.tcn_window is not None:
            parts.append(self.tcn(level[:, -self.tcn_window :]))
        if self.transformer is not None and self.transformer_window is not None:
            parts.append(self.transformer(level[:, -self.transformer_window :]))
        fused = self.fusion(torch.cat([part.float() for part in parts], dim=-1))
        return {
            "value": (last + self.value_head(fused).float()).squeeze(-1),
            "class_logits": self.class_head(fused).float(),
            "exceeds_logit": self.exceeds_head(fused).float().squeeze(-1),
        }

    def denormalize(self, value: Tensor) -> Tensor:
        """Take normalized values of any shape back to the user's units."""
        return self.normalization.denormalize(value)

    def _check_inputs(self, history: Tensor, features: Tensor) -> None:
        if history.ndim != 2 or history.shape[1] < self.context:
            raise DataError(
                f"history must be [n, {self.context}] or longer; got {list(history.shape)}. "
                "Cut it from the rows just before each target row."
            )
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise DataError(f"features must be [n, {self.num_features}]; got {list(features.shape)}.")


def _nbeats(window: int, sizes: Sizes) -> NBeats:
    return NBeats(
        window=window,
        hidden=sizes.nbeats_hidden,
        num_blocks=sizes.nbeats_blocks,
        horizon=sizes.nbeats_horizon,
        degree=sizes.nbeats_degree,
        harmonics=sizes.nbeats_harmonics,
        theta=sizes.nbeats_theta,
    )


def _tcn(window: int, sizes: Sizes, dropout: float) -> TemporalConvNet:
    return TemporalConvNet(
        window=window,
        channels=sizes.tcn_channels,
        levels=sizes.tcn_levels,
        kernel_size=sizes.tcn_kernel_size,
        dropout=dropout,
    )


def _transformer(window: int, sizes: Sizes, dropout: float, attention_dropout: float) -> TransformerEncoder:
    return TransformerEncoder(
        window=window,
        d_model=sizes.d_model,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        ff=sizes.ff,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )


def _fusion(width: int, hidden: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (width, hidden):
        layers += [nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def _check_windows(windows: Sequence[int], *, tcn_window: int | None, transformer_window: int | None) -> None:
    rising = list(windows) == sorted(set(windows))
    if not windows or not rising or windows[0] < 2:
        raise ConfigError(
            f"windows must be one or more lengths of at least 2 steps, rising; got {list(windows)}. "
            "Use [50, 200, 500, 1000] or a subset, say."
        )
    for name, window in (("tcn_window", tcn_window), ("transformer_window", transformer_window)):
        if window is not None and window not in windows:
            raise ConfigError(
                f"{name} must be one of the windows {list(windows)} or None; got {window}. "
                f"Add {window} to windows or leave the branch out."
            )


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ConfigError(f"{name} must be at least 0 and below 1; got {share}. Use 0.2, say.")


def _check_counts(num_features: int, num_classes: int, *, num_constants: int) -> None:
    if num_features < 1 or num_constants != num_features:
        raise ConfigError(
            f"num_features must be at least 1 and as many as the normalization constants; got {num_features} "
            f"and {num_constants}. Take both from one manifest."
        )
    if num_classes < 2:
        raise ConfigError(f"num_classes must be at least 2; got {num_classes}. Give at least one class edge.")
