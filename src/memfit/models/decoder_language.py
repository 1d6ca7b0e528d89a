"""A decoder of pre-norm Transformer blocks: causal attention with rotary positions, SwiGLU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfit.models.language import FeedForward, LanguageModel, initialize, norm
from memfit.models.language_settings import LanguageSettings

ROTARY_BASE = 10_000.0
Angles = tuple[Tensor, Tensor]
"""Cosines and sines [T, head_dim / 2] of the angles by which positions are turned."""


def rotary_angles(length: int, head_dim: int, device: torch.device) -> Angles:
    """Return the angles of positions 0 .. length - 1 (Su et al., 2021, section 3.2.2).

    Made anew for every length, of nothing but that: there is no table that a longer input would run out of.
    """
    pairs = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = positions[:, None] * ROTARY_BASE ** (-2 * pairs / head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn the pairs (i, i + d / 2) of each row of [n, heads, T, d]; products of rows then depend on their distance."""
    cos, sin = angles  # in fp32, and so are the products: half precision would blur far positions
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Attend from every token to itself and those before it with ``scaled_dot_product_attention``."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """Map [n, T, width] to the same shape."""
        query, key, value = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        query, key = rotate(query, angles), rotate(key, angles)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """Map [n, T, width] to [n, heads, T, head_dim]."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)


class DecoderBlock(nn.Module):
    """Apply causal attention and a feed-forward layer, each normalized first and added to its input."""

    def __init__(self, settings: LanguageSettings) -> None:
        super().__init__()
        width = settings.d_model
        self.mixer_norm = norm(width)
        self.mixer = CausalSelfAttention(width, settings.num_heads)
        self.ff_norm = norm(width)
        self.ff = FeedForward(width, settings.inner_width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """Map [n, T, d_model] to the same shape."""
        x = x + self.dropout(self.mixer(self.mixer_norm(x), angles))
        out: Tensor = x + self.dropout(self.ff(self.ff_norm(x)))
        return out


BLOCKS: tuple[type[nn.Module], ...] = (DecoderBlock,)
"""What activation checkpointing wraps."""


class Decoder(nn.ModuleList):
    """Blocks one after the other, on rows of any length."""

    def __init__(self, settings: LanguageSettings) -> None:
        super().__init__(DecoderBlock(settings) for _ in range(settings.num_layers))
        self.head_dim = settings.d_model // settings.num_heads

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, T, d_model] to the same shape."""
        angles = rotary_angles(x.shape[1], self.head_dim, x.device)
        for block in self:
            x = block(x, angles)
        return x


class DecoderLanguageModel(LanguageModel):
    """Predicts each token by attention to those before it."""

    writers = ("embedding.weight", "*.out.weight", "*.down.weight")

    def __init__(self, settings: LanguageSettings) -> None:
        super().__init__(settings)
        self.blocks = Decoder(settings)
        initialize(self, settings.num_layers)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [n, T] to normalized hidden rows [n, T, D]."""
        rows: Tensor = self.norm(self.blocks(self.dropout(self.embedding(tokens))))
        return rows
