"""N-BEATS: doubly residual stacks of fully connected blocks with basis expansion (Oreshkin et al. 2020).

A block explains a part of its window (the backcast, which is taken away before the next block) and forecasts the
steps after it. Each stack's summed forecast stays apart, so that a reader of it can weigh trend, season and rest.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfit.errors import ConfigError

STACKS = ("trend", "seasonality", "generic")
"""The kinds of stack in the order in which they see the window: interpretable first, the rest last."""


def trend_basis(steps: Tensor, degree: int) -> Tensor:
    """Return the powers 0..degree of a time axis [T] as rows [degree + 1, T] (the paper's equation 2)."""
    return torch.stack([steps**power for power in range(degree + 1)])


def seasonality_basis(steps: Tensor, harmonics: int) -> Tensor:
    """Return cosines, then sines, of 1..harmonics turns a unit of time as rows [2 * harmonics, T] (equation 3)."""
    angles = 2 * math.pi * torch.arange(1, harmonics + 1).unsqueeze(1) * steps
    return torch.cat((angles.cos(), angles.sin()))


class FixedBasis(nn.Module):
    """Expand coefficients over a basis that is not trained: theta [n, K] to [n, T]."""

    basis: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        # Rows of norm 1 or less keep the sum of K terms at the scale of its coefficients.
        self.register_buffer("basis", basis / math.sqrt(basis.shape[0]), persistent=False)

    def forward(self, theta: Tensor) -> Tensor:
        """Map [n, K] to [n, T]."""
        return F.linear(theta, self.basis.T)


def _expansions(kind: str, window: int, horizon: int, size: int) -> tuple[int, nn.Module, nn.Module]:
    """Return the number of coefficients, and what expands them over the window and over the horizon."""
    if kind == "generic":
        return size, nn.Linear(size, window), nn.Linear(size, horizon)
    # One time axis: the window ends just before 0, the forecast starts there, a unit is the window's length.
    past, future = torch.arange(-window, 0) / window, torch.arange(horizon) / window
    if kind == "trend":
        past_basis, future_basis = trend_basis(past, size), trend_basis(future, size)
    elif kind == "seasonality":
        past_basis, future_basis = seasonality_basis(past, size), seasonality_basis(future, size)
    else:
        raise ConfigError(f"An N-BEATS stack must be one of {', '.join(STACKS)}; got {kind!r}.")
    return past_basis.shape[0], FixedBasis(past_basis), FixedBasis(future_basis)


class NBeatsBlock(nn.Module):
    """Split a window into what the block's basis explains and the rest, and forecast from it.

    The last block of a net passes its window on unchanged: a backcast that nobody reads would hold parameters
    without gradients.
    """

    def __init__(self, kind: str, *, window: int, horizon: int, hidden: int, size: int, is_last: bool = False) -> None:
        super().__init__()
        num_coefficients, backcast, forecast = _expansions(kind, window, horizon, size)
        widths = (window, hidden, hidden, hidden, hidden)
        self.trunk = nn.Sequential(
            *(part for wide, narrow in pairwise(widths) for part in (nn.Linear(wide, narrow), nn.ReLU()))
        )
        self.forecast = nn.Sequential(nn.Linear(hidden, num_coefficients, bias=False), forecast)
        self.backcast = None if is_last else nn.Sequential(nn.Linear(hidden, num_coefficients, bias=False), backcast)

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """Map a window [n, W] to the part of it left unexplained [n, W] and the forecast [n, H]."""
        hidden = self.trunk(window)
        rest = window if self.backcast is None else window - self.backcast(hidden)
        return rest, self.forecast(hidden)


class NBeats(nn.Module):
    """Forecast from one window with a trend, a seasonality and a generic stack of `num_blocks` blocks each.

    The sum of the stacks is the paper's forecast; they are returned side by side. Harmonics above half the window
    cannot be told apart from lower ones, so each window takes at most that many.
    """

    def __init__(
        self,
        *,
        window: int,
        hidden: int,
        num_blocks: int,
        horizon: int = 16,
        degree: int = 3,
        harmonics: int = 32,
        theta: int = 32,
    ) -> None:
        super().__init__()
        self.out_features = len(STACKS) * horizon
        sizes = {"trend": degree, "seasonality": max(1, min(harmonics, window // 2)), "generic": theta}
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                NBeatsBlock(
                    kind,
                    window=window,
                    horizon=horizon,
                    hidden=hidden,
                    size=sizes[kind],
                    is_last=kind == STACKS[-1] and block == num_blocks - 1,
                )
                for block in range(num_blocks)
            )
            for kind in STACKS
        )

    def forward(self, window: Tensor) -> Tensor:
        """Map a window [n, W] to the stacks' forecasts [n, 3 * H]."""
        forecasts = []
        for stack in self.stacks:
            parts = []
            for block in stack.children():
                window, forecast = block(window)
                parts.append(forecast)
            forecasts.append(torch.stack(parts).sum(dim=0))
        return torch.cat(forecasts, dim=-1)
