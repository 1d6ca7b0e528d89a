"""What all language models are made of: normalization, feed-forward layers, the embedding that is the head as well.

RMS normalization (Zhang and Sennrich, 2019), SwiGLU (Shazeer, 2020), tied embeddings (Press and Wolf, 2017).
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from memfit.models.language_settings import LanguageSettings

INIT_STD = 0.02
EPS_SUM = 1e-4
"""Added to the sum of squares of a row before it is normalized. To the sum, not the mean: channels of zeros may then
be added to the stream without changing what is normalized."""


def norm(width: int) -> nn.RMSNorm:
    """Build the normalization of a row of so many channels."""
    return nn.RMSNorm(width, eps=EPS_SUM / width)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., width]."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class LanguageModel(nn.Module, ABC):
    """Predicts each token from those before it.

    The stream begins as the embedding [V, D] of the tokens and ends, normalized, in the product with the same matrix;
    a model without an embedding of its own says what takes the place of both in `hidden` and `head`.
    """

    writers: ClassVar[tuple[str, ...]] = ()
    """Patterns of the names of parameters whose rows write into the residual stream: where a model grows, their new
    entries are zeros, and what it computes stays the same."""

    def __init__(self, settings: LanguageSettings, *, owns_embedding: bool = True) -> None:
        super().__init__()
        self.settings = settings
        if owns_embedding:
            self.embedding = nn.Embedding(settings.vocab_size, settings.d_model)
        self.dropout = nn.Dropout(settings.dropout)
        self.norm = norm(settings.d_model)

    @property
    def head(self) -> Tensor:
        """The matrix [V, D] whose product with a hidden row is the logits of the next token."""
        return self.embedding.weight

    @property
    def width(self) -> int:
        """Channels of a hidden row."""
        return self.head.shape[1]

    @abstractmethod
    def hidden(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [n, T] to normalized hidden rows [n, T, D]; row t has seen tokens 0 .. t."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden rows [..., D] to logits [..., V] in fp32, by a product in the head's own precision."""
        return F.linear(hidden.to(self.head.dtype), self.head).float()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [n, T] to logits [n, T, V] of the tokens that follow each."""
        return F.linear(self.hidden(tokens), self.head)


def initialize(model: nn.Module, num_layers: int, outs: tuple[str, ...] = ("out", "down")) -> None:
    """Draw all matrices from a normal distribution; those that write into the stream less widely, the deeper the net.

    outs: last part of the names of the layers that write (Radford et al., 2019).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            writes = name.rpartition(".")[2] in outs
            nn.init.normal_(module.weight, std=INIT_STD / math.sqrt(2 * num_layers) if writes else INIT_STD)
