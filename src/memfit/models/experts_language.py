"""Experts that all read one frozen backbone: their mixture enters a decoder, whose output corrects the backbone's."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfit.errors import ConfigError
from memfit.models.decoder_language import Decoder
from memfit.models.language import INIT_STD, LanguageModel, initialize, norm
from memfit.models.language_settings import LanguageSettings


class Backbone(Protocol):
    """What a module must have to be read by experts; every LanguageModel with an embedding does."""

    @property
    def width(self) -> int:
        """Channels H of a hidden row."""

    @property
    def head(self) -> Tensor:
        """The matrix [V, H] whose product with a hidden row is the logits of the next token."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [n, T] to normalized hidden rows [n, T, H]; row t has seen tokens 0 .. t."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As in nn.Module, of which it must be one."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in nn.Module."""

    def eval(self) -> Self:
        """As in nn.Module."""


class ExpertMixture(nn.Module):
    """A router, and an adapter per expert: up_e(gelu(down_e(row))), each weighed by the router's gate for the row."""

    def __init__(self, settings: LanguageSettings, width: int) -> None:
        super().__init__()
        self.num_experts, self.per_token = settings.num_experts, settings.experts_per_token
        adapters = settings.num_experts * settings.expert_rank
        self.norm = norm(width)
        self.router = nn.Linear(width, settings.num_experts, bias=False)
        self.down = nn.Linear(width, adapters, bias=False)
        self.up = nn.Linear(adapters, settings.d_model, bias=False)
        initialize(self, settings.num_layers, outs=())
        with torch.no_grad():  # as small as elsewhere they would make a stream of thousandths, and learn slowly
            self.down.weight.mul_(width**-0.5 / INIT_STD)
            self.up.weight.mul_(settings.expert_rank**-0.5 / INIT_STD)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Map a backbone's rows [n, T, H] to their mixture [n, T, d_model] and the router's shares [n, T, E]."""
        read = self.norm(rows)
        shares = self.router(read).float().softmax(dim=-1)
        # sum_e gate_e up_e(gelu(down_e(row))) as two products for all experts: a gate may as well be multiplied before
        # `up`, which is linear, as after it. What is computed for a gate of zero is a few narrow columns, less than to
        # gather the rows of each expert would take; and no shape depends on where the router sends a token.
        inner = F.gelu(self.down(read)).unflatten(-1, (self.num_experts, -1))
        gates = self.gates(shares).to(inner.dtype)
        mixed = self.up((gates.unsqueeze(-1) * inner).flatten(-2))
        return mixed.to(rows.dtype), shares  # the decoder's stream is as precise as its weights, under autocast too

    def gates(self, shares: Tensor) -> Tensor:
        """Keep the largest shares of each token, scaled so that they add up to 1: [..., E]."""
        if self.per_token is None or self.per_token == self.num_experts:
            return shares
        largest, experts = shares.topk(self.per_token, dim=-1)
        return torch.zeros_like(shares).scatter(-1, experts, largest / largest.sum(dim=-1, keepdim=True))

    def balance(self, shares: Tensor, mask: Tensor) -> Tensor:
        """Return E sum_e f_e P_e of each sample [n], over its tokens that count; 1 where all experts are used alike.

        f_e: the part of the tokens' choices that fell on expert e; P_e: its mean share. Taken per sample, not over a
        batch, so that it does not depend on the cut (DeepSeek-V3 technical report, 2024, section 2.1.2). Where all
        experts are mixed, a token chooses the one with the largest share (Fedus et al., 2022): f would be constant.
        shares [n, T, E], mask [n, T].
        """
        chosen = 1 if self.per_token in (None, self.num_experts) else self.per_token
        picks = torch.zeros_like(shares).scatter(-1, shares.topk(chosen, dim=-1).indices, 1 / chosen)
        counts = mask.to(shares.dtype)
        total = counts.sum(dim=1, keepdim=True).clamp(min=1)  # a sample may have nothing that counts
        weights = (counts / total).unsqueeze(-1)
        return self.num_experts * ((weights * picks).sum(dim=1) * (weights * shares).sum(dim=1)).sum(dim=-1)


class ExpertsLanguageModel(LanguageModel):
    """Experts on a backbone of which there is one, however many they are, frozen and in its own precision.

    The logits are the product of the backbone's own head with its hidden rows plus a correction, zero at the start: the
    model begins as the backbone. Low-rank changes that are made to the backbone afterwards are trained, and it then
    runs with gradients; it stays in evaluation mode all the same.
    Raises: ConfigError where the backbone knows fewer tokens than the settings say.
    """

    writers = ("mixture.up.weight", "blocks.*.out.weight", "blocks.*.down.weight")
    backbone: Backbone

    def __init__(self, settings: LanguageSettings, backbone: Backbone) -> None:
        super().__init__(settings, owns_embedding=False)
        if len(backbone.head) < settings.vocab_size:
            raise ConfigError(
                f"vocab_size: expected at most the {len(backbone.head)} tokens that the backbone knows, got "
                f"{settings.vocab_size}. Prepare the data with the backbone's own tokenizer."
            )
        self.backbone = backbone.requires_grad_(False).eval()
        self.mixture = ExpertMixture(settings, backbone.width)
        self.blocks = Decoder(settings)
        initialize(self.blocks, settings.num_layers)
        self.out = nn.Linear(settings.d_model, backbone.width, bias=False)
        nn.init.zeros_(self.out.weight)

    @property
    def head(self) -> Tensor:
        """The backbone's matrix [V, H], in its own precision, without the rows that round its vocabulary up."""
        return self.backbone.head[: self.settings.vocab_size]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of everything but the backbone."""
        super().train(mode)
        self.backbone.eval()
        return self

    def hidden(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [n, T] to corrected hidden rows [n, T, H], in the precision of the decoder's weights."""
        rows = self._read(tokens)
        return self._correct(rows, self.mixture(rows)[0])

    def hidden_and_balance(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return `hidden`, and per sample how unevenly the experts are used [n] over tokens where the mask is True.

        tokens int64 [n, T], mask bool [n, T]. See ExpertMixture.balance: 1 where all are used alike, E at most.
        """
        rows = self._read(tokens)
        mixed, shares = self.mixture(rows)
        return self._correct(rows, mixed), self.mixture.balance(shares, mask)

    def routing(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [n, T] to the gates of the experts [n, T, E]; each token's add up to 1."""
        return self.mixture.gates(self.mixture(self._read(tokens))[1])

    def expert_loads(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the mean gate of each expert [E] over tokens where the mask [n, T] is True; zeros if nowhere."""
        counts = mask.to(torch.float32)
        return torch.einsum("nt,nte->e", counts, self.routing(tokens)) / counts.sum().clamp(min=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 [n, T] to logits [n, T, V], in the backbone's precision."""
        return F.linear(self.hidden(tokens).to(self.head.dtype), self.head)

    def _read(self, tokens: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.backbone.parameters())
        with _no_autocast(tokens.device.type), torch.set_grad_enabled(learns):
            rows = self.backbone.hidden(tokens)
        return rows.to(self.norm.weight.dtype)

    def _correct(self, rows: Tensor, mixed: Tensor) -> Tensor:
        correction: Tensor = self.out(self.norm(self.blocks(self.dropout(mixed))))
        return rows + correction.to(rows.dtype)


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Leave autocast: it would make a second copy of weights that are in another half precision, every time."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
