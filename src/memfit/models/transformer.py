"""A pre-norm Transformer encoder over one window of a series, on fused attention."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfit.errors import ConfigError


class SelfAttention(nn.Module):
    """Attend from every step to every step with ``scaled_dot_product_attention``.

    Fused kernels keep the output and the log-sum-exp only. A dropout above 0 in training makes the CPU keep the
    whole attention matrix instead: set it to 0 where that memory counts.
    """

    def __init__(self, *, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if d_model < 1 or num_heads < 1 or d_model % num_heads:
            raise ConfigError(
                f"d_model must be a positive multiple of num_heads; got d_model {d_model} and num_heads "
                f"{num_heads}. Change one of them (256 and 8, or 128 and 4, say)."
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.project_in = nn.Linear(d_model, 3 * d_model)
        self.project_out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, L, d_model] to the same shape."""
        n, length, d_model = x.shape
        heads = self.project_in(x).view(n, length, 3, self.num_heads, d_model // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        out: Tensor = self.project_out(mixed.transpose(1, 2).reshape(n, length, d_model))
        return out


class EncoderLayer(nn.Module):
    """Apply self-attention and a feed-forward net, each normalized first and added to its input."""

    def __init__(self, *, d_model: int, num_heads: int, ff: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = SelfAttention(d_model=d_model, num_heads=num_heads, dropout=attention_dropout)
        self.ff_norm = nn.LayerNorm(d_model)
        self.ff = nn.Sequential(nn.Linear(d_model, ff), nn.GELU(), nn.Dropout(dropout), nn.Linear(ff, d_model))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, L, d_model] to the same shape."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        out: Tensor = x + self.dropout(self.ff(self.ff_norm(x)))
        return out


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """Return the fixed encoding [length, d_model] of Vaswani et al. 2017, section 3.5; d_model must be even."""
    if d_model % 2:
        raise ConfigError(f"d_model must be even: half sines, half cosines; got {d_model}. Use {d_model + 1}, say.")
    rates = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10_000.0) / d_model))
    angles = torch.arange(length).unsqueeze(1) * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(length, d_model)


class TransformerEncoder(nn.Module):
    """Encode a window, one token a step, into the last token and the mean token.

    Pre-norm layers (Xiong et al. 2020) train without a warm-up; the sum they build is normalized once at the end.
    """

    positions: Tensor

    def __init__(
        self,
        *,
        window: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        ff: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.out_features = 2 * d_model
        self.embed = nn.Linear(1, d_model)
        self.register_buffer("positions", sinusoidal_positions(window, d_model), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            EncoderLayer(
                d_model=d_model,
                num_heads=num_heads,
                ff=ff,
                dropout=dropout,
                attention_dropout=attention_dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)

    def forward(self, window: Tensor) -> Tensor:
        """Map a window [n, W] to [n, 2 * d_model]."""
        x = self.dropout(self.embed(window.unsqueeze(-1)) + self.positions)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return torch.cat((x[:, -1], x.mean(dim=1)), dim=-1)
