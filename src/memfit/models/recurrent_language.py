"""A language model whose blocks mix tokens by a gated linear recurrence: any length, a state of fixed size."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.models.language import FeedForward, LanguageModel, initialize, norm
from memfit.models.language_settings import LanguageSettings
from memfit.models.linear_recurrence import linear_recurrence

SLOWEST_TOKENS = 300.0
"""Longest time constant that a new net begins with."""


class GatedRecurrence(nn.Module):
    """Each channel is a moving average of values, whose decay and way out depend on the token.

    Gates that see the input alone, so that a scan can run them: Martin and Cundy, 2018; Orvieto et al., 2023; De et
    al., 2024.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, channels, bias=False)
        self.decay = nn.Linear(width, channels)
        self.gate = nn.Linear(width, channels, bias=False)
        self.out = nn.Linear(channels, width, bias=False)
        with torch.no_grad():
            self.decay.bias.copy_(_decay_logits(channels))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Map [n, T, width] and the state before it, [n, channels], to [n, T, width] and the state after it."""
        decay = torch.sigmoid(self.decay(x).float())  # in bf16, those of more than 512 tokens would be 1
        states = linear_recurrence(decay, (1 - decay) * self.value(x), state)
        gate = F.silu(self.gate(x))
        return self.out(states.to(gate.dtype) * gate), states[:, -1]


def _decay_logits(channels: int) -> Tensor:
    """Return logits of decays exp(-1 / tokens), tokens from 1 to SLOWEST_TOKENS, evenly spread on a log scale.

    Multiples of the golden ratio, less their whole parts: any range of channels is spread so, also those that a net
    gets when it grows.
    """
    share = (torch.arange(channels, dtype=torch.float64) + 0.5) * ((math.sqrt(5) - 1) / 2) % 1
    return -torch.expm1(SLOWEST_TOKENS**-share).log()


class RecurrentBlock(nn.Module):
    """Mix tokens, then channels."""

    def __init__(self, settings: LanguageSettings) -> None:
        super().__init__()
        self.mixer_norm = norm(settings.d_model)
        self.mixer = GatedRecurrence(settings.d_model, settings.state_channels)
        self.ff_norm = norm(settings.d_model)
        self.ff = FeedForward(settings.d_model, settings.inner_width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Map the stream [n, T, D] and the state before it, [n, channels], to the stream and the state after it."""
        mixed, state = self.mixer(self.mixer_norm(x), state)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.ff(self.ff_norm(x))), state


class RecurrentLanguageModel(LanguageModel):
    """Reads a text in pieces: what it knows of earlier tokens is a state [n, layers, channels] in fp32."""

    writers: ClassVar[tuple[str, ...]] = ("embedding.weight", "*.out.weight", "*.down.weight")

    def __init__(self, settings: LanguageSettings) -> None:
        super().__init__(settings)
        self.blocks = nn.ModuleList(RecurrentBlock(settings) for _ in range(settings.num_layers))
        initialize(self, settings.num_layers)

    def initial_state(self, n: int) -> Tensor:
        """Return the state [n, layers, channels] before any token."""
        shape = (n, self.settings.num_layers, self.settings.state_channels)
        return torch.zeros(shape, device=self.head.device)

    def stream(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens int64 [n, T] and the state before them to normalized rows [n, T, D] and the state after them."""
        x, states = self.dropout(self.embedding(tokens)), []
        for block, before in zip(self.blocks, state.unbind(1), strict=True):
            x, after = block(x, before)
            states.append(after)
        return self.norm(x), torch.stack(states, 1)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [n, T] to normalized hidden rows [n, T, D]; row t has seen tokens 0 .. t."""
        return self.stream(tokens, self.initial_state(tokens.shape[0]))[0]


BLOCKS: tuple[type[nn.Module], ...] = (RecurrentBlock,)
"""What activation checkpointing wraps."""
