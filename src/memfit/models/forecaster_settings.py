"""Recurrent forecasters: what can be set, and what makes a choice impossible."""

from dataclasses import dataclass

from memfit.errors import ConfigError

CELLS = ("rnn", "lstm", "gru")
NORMS = ("none", "batch", "layer")
HEADS = ("direct", "seq2seq")
ATTENTIONS = ("none", "luong", "bahdanau")
MAX_LAYERS = 5
MIN_BATCH_NORM_SAMPLES = 2
"""The fewest samples per micro-batch; each has as many steps as its window, so that statistics rest on both."""


@dataclass(frozen=True, kw_only=True)
class ForecasterSettings:
    """One net. Raises ConfigError, naming the setting, where a value cannot work."""

    horizon: int
    """Rows that are predicted."""
    cell: str = "gru"
    """One of CELLS; rnn is Elman's with tanh."""
    hidden: int = 64
    """Width of each direction of each layer."""
    num_layers: int = 1
    """1 to MAX_LAYERS."""
    bidirectional: bool = False
    """Read the history in both directions; all of it lies in the past."""
    norm: str = "none"
    """One of NORMS, of each layer's outputs. Batch statistics are those of a micro-batch."""
    dropout: float = 0.0
    """Dropout of each layer's outputs."""
    head: str = "direct"
    """"direct": all steps from the last layer's ends at once. "seq2seq": one after the other, from a decoder."""
    attention: str = "none"
    """One of ATTENTIONS; for seq2seq."""
    predict_change: bool = True
    """Predict the change from the last known value, so that an output of 0 is persistence."""
    forcing_start: float = 1.0
    """seq2seq: share of steps that see the true value before them, not the predicted one, when training begins."""
    forcing_end: float = 0.0
    """That share after `forcing_samples`."""
    forcing_samples: int = 20_000
    """Training samples over which the share changes, linearly."""

    def __post_init__(self) -> None:
        for name, choices in (("cell", CELLS), ("norm", NORMS), ("head", HEADS), ("attention", ATTENTIONS)):
            given = getattr(self, name)
            _expect(given in choices, name, f"one of {', '.join(choices)}", given)
        _expect(1 <= self.num_layers <= MAX_LAYERS, "num_layers", f"1 to {MAX_LAYERS}", self.num_layers)
        for name in ("horizon", "hidden", "forcing_samples"):
            _expect(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        _expect(0 <= self.dropout < 1, "dropout", "at least 0 and below 1", self.dropout)
        for name in ("forcing_start", "forcing_end"):
            _expect(0 <= getattr(self, name) <= 1, name, "0 to 1", getattr(self, name))
        plain = self.attention == "none" or self.head == "seq2seq"
        _expect(plain, "attention", "none with head direct, which has no decoder", self.attention)

    @property
    def min_micro_batch_size(self) -> int:
        """The fewest samples that batch statistics can be taken over."""
        return MIN_BATCH_NORM_SAMPLES if self.norm == "batch" else 1


def _expect(holds: bool, setting: str, expected: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{setting}: expected {expected}, got {got!r}")
