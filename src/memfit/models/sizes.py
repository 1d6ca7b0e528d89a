"""The sizes of the multi-scale net: the reference's two, and what makes a size impossible."""

import dataclasses
from dataclasses import dataclass

from memfit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Say how wide and deep each branch is. Raises ConfigError where a size is impossible."""

    d_model: int
    """Width of the Transformer's tokens; a multiple of num_heads, and even."""
    num_layers: int
    """Encoder layers."""
    num_heads: int
    """Attention heads."""
    ff: int
    """Hidden width of the encoder layers' feed-forward nets."""
    nbeats_hidden: int
    """Width of the N-BEATS blocks' four fully connected layers."""
    nbeats_blocks: int
    """N-BEATS blocks in each of a window's three stacks."""
    tcn_channels: int
    """Channels of the TCN."""
    feature_hidden: int
    """Width of the layer that reads the engineered features."""
    fusion_hidden: int
    """Width of the two fusion layers."""
    tcn_levels: int | None = None
    """Levels of the TCN; None takes the fewest whose receptive field covers its window."""
    tcn_kernel_size: int = 3
    """Taps of the TCN's convolutions."""
    nbeats_horizon: int = 16
    """Steps that an N-BEATS block forecasts; the fusion reads all of them."""
    nbeats_degree: int = 3
    """Degree of the trend's polynomial."""
    nbeats_harmonics: int = 32
    """Most harmonics of the seasonality basis; a window takes at most half its length."""
    nbeats_theta: int = 32
    """Coefficients of the generic basis."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size is None and field.name == "tcn_levels":
                continue
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"{field.name} must be a whole number of at least 1; got {size!r}.")
        if self.d_model % self.num_heads or self.d_model % 2:
            raise ConfigError(
                f"d_model must be even and a multiple of num_heads; got d_model {self.d_model} and num_heads "
                f"{self.num_heads}. Change one of them (256 and 8, or 128 and 4, say)."
            )


SIZES: dict[str, Sizes] = {
    "full": Sizes(
        d_model=256,
        num_layers=4,
        num_heads=8,
        ff=1024,
        nbeats_hidden=192,
        nbeats_blocks=2,
        tcn_channels=128,
        feature_hidden=384,
        fusion_hidden=512,
    ),
    "light": Sizes(
        d_model=128,
        num_layers=2,
        num_heads=4,
        ff=512,
        nbeats_hidden=128,
        nbeats_blocks=1,
        tcn_channels=64,
        feature_hidden=128,
        fusion_hidden=256,
    ),
}
"""The reference's sizes: `full` (about 9.8 M parameters with all windows) and the lighter variant `light`."""
