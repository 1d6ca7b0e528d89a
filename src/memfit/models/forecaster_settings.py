"""Recurrent forecasters: what can be set, and what makes a choice impossible."""

from dataclasses import dataclass

from memfit.errors import ConfigError

CELLS = ("rnn", "lstm", "gru")
NORMS = ("none", "batch", "layer")
HEADS = ("direct", "seq2seq")
ATTENTIONS = ("none", "luong", "bahdanau")
OUTPUTS = ("value", "bins")
CHOICES = {"cell": CELLS, "norm": NORMS, "head": HEADS, "attention": ATTENTIONS, "output": OUTPUTS}
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
    output: str = "value"
    """seq2seq: "value": one number per step. "bins": a distribution over bins, learned by its cross-entropy."""
    num_bins: int = 65
    """Bins per step; an odd number has one of no change."""
    bin_range: float = 4.0
    """Where the outermost bins lie, in standard deviations of what is predicted: of changes, or of values."""
    beam_width: int = 1
    """Sequences of bins that decoding keeps; 1 is greedy."""
    forcing_start: float = 1.0
    """seq2seq: share of steps that see the true value before them, not the predicted one, when training begins."""
    forcing_end: float = 0.0
    """That share after `forcing_samples`."""
    forcing_samples: int = 20_000
    """Training samples over which the share changes, linearly."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            given = getattr(self, name)
            _expect(given in choices, name, f"one of {', '.join(choices)}", given)
        _expect(1 <= self.num_layers <= MAX_LAYERS, "num_layers", f"1 to {MAX_LAYERS}", self.num_layers)
        for name in ("horizon", "hidden", "forcing_samples", "beam_width"):
            _expect(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        _expect(0 <= self.dropout < 1, "dropout", "at least 0 and below 1", self.dropout)
        for name in ("forcing_start", "forcing_end"):
            _expect(0 <= getattr(self, name) <= 1, name, "0 to 1", getattr(self, name))
        _expect(self.num_bins >= 2, "num_bins", "2 or more", self.num_bins)
        _expect(self.bin_range > 0, "bin_range", "more than 0", self.bin_range)
        plain = self.attention == "none" or self.head == "seq2seq"
        _expect(plain, "attention", "none with head direct, which has no decoder", self.attention)
        plain = self.output == "value" or self.head == "seq2seq"
        _expect(plain, "output", "value with head direct, which has no decoder", self.output)
        ranked = self.beam_width == 1 or self.output == "bins"
        reason = '1 with output value, whose steps are one number each with nothing to rank (output = "bins" has)'
        _expect(ranked, "beam_width", reason, self.beam_width)

    @property
    def min_micro_batch_size(self) -> int:
        """The fewest samples that batch statistics can be taken over."""
        return MIN_BATCH_NORM_SAMPLES if self.norm == "batch" else 1


def _expect(holds: bool, setting: str, expected: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{setting}: expected {expected}, got {got!r}")
