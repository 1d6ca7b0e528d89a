"""A temporal convolutional net: dilated causal convolutions with residuals (Bai et al. 2018)."""

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from memfit.errors import ConfigError


def receptive_field(levels: int, kernel_size: int) -> int:
    """Return how many steps the last output sees: two convolutions a level, dilation doubling from 1."""
    return 1 + 2 * (kernel_size - 1) * ((1 << levels) - 1)


def levels_to_cover(window: int, kernel_size: int) -> int:
    """Return the fewest levels whose receptive field covers a window of that many steps."""
    levels = 1
    while receptive_field(levels, kernel_size) < window:
        levels += 1
    return levels


class CausalConv(nn.Module):
    """Convolve with weight norm over the present and the past: step t of the output reads no step after t."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.past = (kernel_size - 1) * dilation
        self.conv = weight_norm(nn.Conv1d(in_channels, out_channels, kernel_size, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in, L] to [n, out, L]."""
        out: Tensor = self.conv(F.pad(x, (self.past, 0)))
        return out


class TemporalBlock(nn.Module):
    """Apply two causal convolutions of one dilation and add the input (the paper's figure 1b)."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.first = CausalConv(in_channels, out_channels, kernel_size=kernel_size, dilation=dilation)
        self.second = CausalConv(out_channels, out_channels, kernel_size=kernel_size, dilation=dilation)
        self.dropout = nn.Dropout(dropout)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in, L] to [n, out, L]."""
        y = self.dropout(F.relu(self.first(x)))
        y = self.dropout(F.relu(self.second(y)))
        return F.relu(y + self.skip(x))


class TemporalConvNet(nn.Module):
    """Encode a window into the channels of its last step, which sees all of it.

    `levels` None takes the fewest that cover the window. Raises ConfigError where the levels given do not.
    """

    def __init__(
        self, *, window: int, channels: int, levels: int | None = None, kernel_size: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if kernel_size < 2:
            raise ConfigError(f"tcn_kernel_size must be at least 2 to look back; got {kernel_size}. Use 3.")
        enough = levels_to_cover(window, kernel_size)
        levels = enough if levels is None else levels
        self.receptive_field = receptive_field(levels, kernel_size)
        if levels < enough:
            raise ConfigError(
                f"tcn_levels {levels} with tcn_kernel_size {kernel_size} sees {self.receptive_field} steps; "
                f"tcn_window is {window}. Use {enough} levels or more, or leave tcn_levels out."
            )
        self.out_features = channels
        self.blocks = nn.Sequential(
            *(
                TemporalBlock(
                    channels if level else 1,
                    channels,
                    kernel_size=kernel_size,
                    dilation=2**level,
                    dropout=dropout,
                )
                for level in range(levels)
            )
        )

    def forward(self, window: Tensor) -> Tensor:
        """Map a window [n, W] to [n, channels]."""
        out: Tensor = self.blocks(window.unsqueeze(1))[:, :, -1]
        return out
