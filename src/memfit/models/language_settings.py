"""Language models by name: what can be set, and what makes a choice impossible. Torch is not needed."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from memfit.errors import ConfigError

NAMES = ("recurrent", "decoder", "experts")
MULTIPLE = 32
"""The feed-forward width is rounded up to a multiple of this where it is chosen by itself."""


@dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """One language model. Raises ConfigError, naming the setting, where a value cannot work."""

    name: str
    """One of NAMES."""
    vocab_size: int
    """Tokens that the tokenizer knows."""
    d_model: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Blocks."""
    num_heads: int = 4
    """decoder, experts: attention heads; each has d_model / num_heads channels, an even number."""
    state_width: int | None = None
    """recurrent: channels of each block's state; None: 2 d_model."""
    ff_width: int | None = None
    """Inner width of the feed-forward layers; None: 8/3 d_model, rounded up."""
    dropout: float = 0.0
    """Dropout of what each block adds to the stream, and of the embedding."""
    num_experts: int = 1
    """experts: how many share the backbone."""
    experts_per_token: int | None = None
    """experts: how many the router mixes for a token; None: all."""
    expert_rank: int = 16
    """experts: width of each expert's adapter."""
    lora_rank: int = 0
    """Rank of the low-rank changes to the layers that `lora_targets` names; 0 for none."""
    lora_alpha: float = 16.0
    """What the changes are multiplied with, times 1 / lora_rank."""
    lora_targets: tuple[str, ...] = ("*",)
    """Shell-style patterns of the names of linear layers."""

    def __post_init__(self) -> None:
        _expect(self.name in NAMES, "name", f"one of {', '.join(NAMES)}", self.name)
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "num_experts", "expert_rank"):
            _expect(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("state_width", "ff_width"):
            _expect(getattr(self, name) is None or getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        if self.name != "recurrent":
            _expect(self.d_model % (2 * self.num_heads) == 0, "d_model", "a multiple of 2 num_heads", self.d_model)
        most, per_token = self.num_experts, self.experts_per_token
        _expect(per_token is None or 1 <= per_token <= most, "experts_per_token", f"1 to {most}", per_token)
        _expect(0 <= self.dropout < 1, "dropout", "at least 0 and below 1", self.dropout)
        _expect(self.lora_rank >= 0, "lora_rank", "0 or more", self.lora_rank)
        _expect(self.lora_alpha > 0, "lora_alpha", "more than 0", self.lora_alpha)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Build settings from those of a config's model; keys that say nothing of the net are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        chosen = {key: value for key, value in document.items() if key in known}
        if "lora_targets" in chosen:
            chosen["lora_targets"] = tuple(chosen["lora_targets"])
        return cls(**chosen)

    @property
    def inner_width(self) -> int:
        """Inner width of the feed-forward layers."""
        return self.ff_width or -(-8 * self.d_model // (3 * MULTIPLE)) * MULTIPLE

    @property
    def state_channels(self) -> int:
        """Channels of each recurrent block's state."""
        return self.state_width or 2 * self.d_model


def _expect(holds: bool, setting: str, expected: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{setting}: expected {expected}, got {got!r}")


def check_carried(before: LanguageSettings, after: LanguageSettings) -> None:
    """Refuse a change of the model that its weights cannot follow. Raises: ConfigError, naming the setting.

    A model may become wider and deeper, take up low-rank changes, or become the backbone of experts.
    """
    if before.name != "experts" and after.name == "experts":
        return
    _expect(after.name == before.name, "name", f"{before.name!r}, or 'experts' with it as their backbone", after.name)
    for name in ("d_model", "num_layers", "num_heads", "state_channels", "inner_width"):
        least, got = getattr(before, name), getattr(after, name)
        _expect(got >= least, name, f"{least} or more", got)
    if after.name == "experts":
        for name in ("num_experts", "expert_rank"):
            was, got = getattr(before, name), getattr(after, name)
            _expect(got == was, name, f"{was}, as in the stage before", got)
    if after.name != "recurrent":
        heads = before.d_model // before.num_heads
        _expect(after.d_model == heads * after.num_heads, "num_heads", f"heads of {heads} channels", after.num_heads)
    if before.lora_rank:
        for name in ("lora_rank", "d_model", "state_channels", "inner_width"):
            got = getattr(after, name)
            _expect(got == getattr(before, name), name, f"{getattr(before, name)}, as there are low-rank changes", got)
