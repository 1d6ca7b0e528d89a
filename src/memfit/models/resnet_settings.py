"""Residual nets by name: what can be set, what makes a choice impossible, how few samples one can train on."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from memfit.errors import ConfigError

NORMS = ("batch", "group")
STEMS = ("auto", "small", "large")
LARGE_IMAGE = 64
"""Images with a longer side than this get the large stem where it is chosen by itself."""
MIN_BATCH_NORM_SAMPLES = 16
"""The fewest samples whose batch statistics are trusted.

With ResNet-50 on ImageNet, 32 samples per worker err on 23.6 %, 16 on 23.7 %, 8 on 24.8 %, 4 on 27.3 % and 2 on 34.7 %
(Wu and He, Group Normalization, 2018, figure 1 and table 2).
"""


@dataclass(frozen=True)
class Architecture:
    """Blocks per stage, the channels of the first stage (each later one has twice as many) and of the stem."""

    block: str
    """"basic", "bottleneck" (He et al., 2016a) or "preact" (He et al., 2016b, as in wide nets)."""
    stages: tuple[int, ...]
    width: int
    stem: int


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture("basic", (2, 2, 2, 2), 64, 64),
    "resnet34": Architecture("basic", (3, 4, 6, 3), 64, 64),
    "resnet50": Architecture("bottleneck", (3, 4, 6, 3), 64, 64),
    "wide_resnet": Architecture("preact", (4, 4, 4), 16, 16),
    "resnet_light": Architecture("basic", (1, 1, 1), 32, 32),
}
"""Parameters with the small stem, 3 channels and 10 classes: ResNet-18 11,173,962, ResNet-34 21,282,122, ResNet-50
23,520,842, WRN-28-10 36,479,194 (Zagoruyko and Komodakis, 2016, table 4: 36.5 M), light 308,650."""


@dataclass(frozen=True, kw_only=True)
class ResNetSettings:
    """One residual net. Raises ConfigError, naming the setting, where a value cannot work."""

    name: str = "resnet18"
    """One of ARCHITECTURES."""
    width_multiplier: float | None = None
    """What every stage's channels are multiplied with; None: 10 for wide_resnet, 1 for the others."""
    depth: int | None = None
    """wide_resnet only: its layers, 6 n + 4; None: 28."""
    norm: str = "batch"
    """"batch" or "group". Batch statistics are those of a micro-batch, so accumulation changes them a little; group
    normalization makes accumulation exact."""
    groups: int = 32
    """Most groups of group normalization; a group has 4 channels at least."""
    dropout: float = 0.0
    """Dropout between the two convolutions of wide_resnet's blocks, and before the classifier of the others."""
    stem: str = "auto"
    """"small": one 3 x 3 convolution. "large": 7 x 7 with stride 2, then pooling. "auto": by the image's size."""
    channels_last: bool = True
    """Keep activations and kernels in the channels-last format, which tensor cores want: the same function."""

    def __post_init__(self) -> None:
        _expect(self.name in ARCHITECTURES, "name", f"one of {', '.join(ARCHITECTURES)}", self.name)
        _expect(self.norm in NORMS, "norm", f"one of {', '.join(NORMS)}", self.norm)
        _expect(self.stem in STEMS, "stem", f"one of {', '.join(STEMS)}", self.stem)
        factor = self.multiplier
        _expect(0 < factor <= 64, "width_multiplier", "a number above 0, at most 64", factor)
        _expect(_is_whole(self.groups) and self.groups >= 1, "groups", "a whole number of at least 1", self.groups)
        _expect(0 <= self.dropout < 1, "dropout", "at least 0 and below 1", self.dropout)
        _expect(isinstance(self.channels_last, bool), "channels_last", "true or false", self.channels_last)
        if self.depth is not None:
            wide = self.name == "wide_resnet"
            _expect(wide, "depth", "none: only wide_resnet has one, the others have it in their names", self.depth)
            fits = _is_whole(self.depth) and 10 <= self.depth <= 1000 and (self.depth - 4) % 6 == 0
            _expect(fits, "depth", "6 n + 4 layers, such as 16, 22, 28 or 40", self.depth)

    @property
    def multiplier(self) -> float:
        """Return the width multiplier, the architecture's own where none is set."""
        own = 10.0 if self.name == "wide_resnet" else 1.0
        return own if self.width_multiplier is None else self.width_multiplier

    @property
    def architecture(self) -> Architecture:
        """Return the architecture at its width and depth; channels are multiples of 8."""
        plain = ARCHITECTURES[self.name]
        stages = plain.stages if self.depth is None else ((self.depth - 4) // 6,) * 3
        stem = plain.stem if plain.block == "preact" else _channels(plain.stem * self.multiplier)
        return Architecture(plain.block, stages, _channels(plain.width * self.multiplier), stem)

    @property
    def min_micro_batch_size(self) -> int:
        """Return the fewest samples that a micro-batch should have: 1 with group normalization."""
        return MIN_BATCH_NORM_SAMPLES if self.norm == "batch" else 1

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Build settings from a JSON-able document. Raises: ConfigError for an unknown setting."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in document:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"expected {', '.join(known)}."
            if key not in known:
                raise ConfigError(f"The residual net has no setting {key!r}; {hint}")
        return cls(**document)


def min_micro_batch_size(model: Mapping[str, Any]) -> int:
    """Return the fewest samples a micro-batch should have for any variant of a job's model settings.

    model: {"variant": name, "variants": {name: settings}}.
    """
    return max(ResNetSettings.from_dict(settings).min_micro_batch_size for settings in model["variants"].values())


def _channels(wanted: float) -> int:
    return max(8, round(wanted / 8) * 8)


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _expect(holds: bool, setting: str, expected: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{setting}: expected {expected}; got {got!r}.")
