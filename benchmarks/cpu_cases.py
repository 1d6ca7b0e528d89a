"""Eleven modules as training programs, sized so that a step takes 0.5 to 2.5 GiB on a CPU and a few seconds there."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfit.models.multiscale import BLOCKS, build_multiscale
from memfit.step import TrainingProgram

VOCABULARY = 8192
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
}


@dataclass(frozen=True)
class Case:
    """One training step: a module in a size, and how it is trained."""

    module: str
    sizes: dict[str, int] = field(hash=False)
    micro_batch_size: int
    precision: str = "fp32"
    optimizer: str = "adamw"
    checkpointing: str = "none"
    accumulation_steps: int = 1

    @property
    def name(self) -> str:
        sizes = "-".join(str(size) for size in self.sizes.values())
        cut = f"x{self.accumulation_steps}" if self.accumulation_steps > 1 else ""
        parts = (self.module, sizes, f"b{self.micro_batch_size}{cut}", self.precision, self.optimizer)
        return "/".join((*parts, self.checkpointing))

    def program(self) -> TrainingProgram:
        """Build the program; nothing is allocated yet."""
        build, make_batch, loss, blocks = MODULES[self.module](**self.sizes)
        return TrainingProgram(
            variants={"only": build},
            make_batch=make_batch,
            loss=loss,
            optimizer=lambda model: OPTIMIZERS[self.optimizer]([p for p in model.parameters() if p.requires_grad]),
            blocks=blocks,
        )


Parts = tuple[
    Callable[[], nn.Module], Callable[[int, int | None], Any], Callable[[nn.Module, Any], Any], tuple[type, ...]
]


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def mlp(width: int, depth: int) -> Parts:
    return (
        lambda: nn.Sequential(
            *[Residual(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)],
            nn.Linear(width, 1),
        ),
        lambda n, _: {"x": torch.randn(n, width), "y": torch.randn(n, 1)},
        lambda net, batch: ((net(batch["x"]) - batch["y"]) ** 2).mean(),
        (Residual,),
    )


class Recurrent(nn.Module):
    """Tokens to the next token, over nn.LSTM or nn.GRU."""

    def __init__(self, kind: type[nn.RNNBase], width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.cells = kind(width, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.cells(self.embed(ids))[0])


def _language(build: Callable[[], nn.Module], length: int, blocks: tuple[type, ...] = ()) -> Parts:
    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = net(batch["ids"])
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

    def make_batch(n: int, _seq_len: int | None) -> dict[str, Tensor]:
        ids = torch.randint(VOCABULARY, (n, length + 1))
        return {"ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}

    return build, make_batch, loss, blocks


def lstm(width: int, layers: int, length: int) -> Parts:
    return _language(lambda: Recurrent(nn.LSTM, width, layers), length)


def gru(width: int, layers: int, length: int) -> Parts:
    return _language(lambda: Recurrent(nn.GRU, width, layers), length)


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNet(nn.Module):
    """Ronneberger et al. 2015, padded, with batch norm, four levels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width << level for level in range(4)]
        self.down = nn.ModuleList(DoubleConv(i, o) for i, o in zip([3, *widths], widths, strict=False))
        rising = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in rising)
        self.join = nn.ModuleList(DoubleConv(2 * o, o) for _, o in rising)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for up, join, skip in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat((skip, up(x)), dim=1))
        return self.head(x)


def unet(width: int, size: int) -> Parts:
    return (
        lambda: UNet(width),
        lambda n, _: {"x": torch.randn(n, 3, size, size), "y": torch.randint(2, (n, size, size))},
        lambda net, batch: F.cross_entropy(net(batch["x"]), batch["y"]),
        (DoubleConv,),
    )


class Bottleneck(nn.Module):
    """He et al. 2015, figure 5 right."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = inputs == outputs and stride == 1
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


def _resnet(depths: tuple[int, ...], width: int) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    inputs = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            layers.append(Bottleneck(inputs, width << stage, 2 if stage and not block else 1))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 100))


def _images(build: Callable[[], nn.Module], size: int, blocks: tuple[type, ...]) -> Parts:
    return (
        build,
        lambda n, _: {"x": torch.randn(n, 3, size, size), "y": torch.randint(100, (n,))},
        lambda net, batch: F.cross_entropy(net(batch["x"]), batch["y"]),
        blocks,
    )


def resnet(width: int, size: int) -> Parts:
    return _images(lambda: _resnet((3, 4, 6, 3), width), size, (Bottleneck,))


def frozen(width: int, size: int) -> Parts:
    """A frozen ResNet, and a head of three layers on its features."""

    def build() -> nn.Module:
        backbone = _resnet((3, 4, 6, 3), width)[:-1].requires_grad_(False)
        features = 32 * width
        head = nn.Sequential(nn.Linear(features, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(),
                             nn.Linear(4096, 100))  # fmt: skip
        return nn.Sequential(backbone, head)

    return _images(build, size, (Bottleneck,))


class Attention(nn.Module):
    def __init__(self, width: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = width // 64, causal, dropout
        self.inwards, self.outwards = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        heads = self.inwards(x).view(n, length, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*heads.unbind(0), is_causal=self.causal, dropout_p=dropout)
        return self.outwards(mixed.transpose(1, 2).reshape(n, length, width))


class Layer(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, width: int, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.attend = Residual(nn.LayerNorm(width), Attention(width, causal, dropout), nn.Dropout(dropout))
        self.feed = Residual(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(self.attend(x))


class GPT(nn.Module):
    """A decoder whose head is tied to its embedding."""

    def __init__(self, width: int, layers: int, length: int, dropout: float) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.zeros(length, width))
        self.layers = nn.Sequential(*[Layer(width, causal=True, dropout=dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.norm(self.layers(self.embed(ids) + self.positions)), self.embed.weight)


def gpt(width: int, layers: int, length: int) -> Parts:
    return _language(lambda: GPT(width, layers, length, 0.0), length, (Layer,))


def gpt_dropout(width: int, layers: int, length: int) -> Parts:
    """With dropout, which sends attention to the math kernel."""
    return _language(lambda: GPT(width, layers, length, 0.1), length, (Layer,))


class ViT(nn.Module):
    def __init__(self, width: int, layers: int, size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.positions = nn.Parameter(torch.zeros((size // 16) ** 2, width))
        self.layers = nn.Sequential(*[Layer(width, causal=False) for _ in range(layers)])
        self.head = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.layers(tokens).mean(dim=1))


def vit(width: int, layers: int, size: int) -> Parts:
    return _images(lambda: ViT(width, layers, size), size, (Layer,))


class EncoderDecoder(nn.Module):
    """nn.Transformer as it is: post-norm, dropout 0.1, so attention takes the math kernel."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.transformer = nn.Transformer(width, width // 64, layers, layers, 4 * width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.embed(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.head(self.transformer(tokens, tokens, tgt_mask=mask, tgt_is_causal=True))


def encoder_decoder(width: int, layers: int, length: int) -> Parts:
    blocks = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return _language(lambda: EncoderDecoder(width, layers), length, blocks)


class Recommender(nn.Module):
    """Bags of ids into one large table, and a small net."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.net = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(self.table(ids).mean(dim=1))


def embedding(rows: int, width: int, bag: int) -> Parts:
    return (
        lambda: Recommender(rows, width),
        lambda n, _: {"ids": torch.randint(rows, (n, bag)), "y": torch.randn(n, 1)},
        lambda net, batch: ((net(batch["ids"]) - batch["y"]) ** 2).mean(),
        (),
    )


def series(length: int) -> Parts:
    """The shipped multi-scale net, reference size, with its losses."""

    def build() -> nn.Module:
        windows = [50, length // 2, length]
        normalization = {"value_mean": 0.0, "value_std": 1.0, "feature_mean": [0.0] * 20, "feature_std": [1.0] * 20}
        return build_multiscale(
            "full", windows=windows, tcn_window=length // 2, transformer_window=length, num_features=20, num_classes=8,
            dropout=0.2, attention_dropout=0.0, **normalization,
        )  # fmt: skip

    def make_batch(n: int, _seq_len: int | None) -> dict[str, Tensor]:
        targets = {"value": torch.randn(n), "class": torch.randint(8, (n,)), "exceeds": torch.rand(n).round()}
        return {"history": torch.randn(n, length), "features": torch.randn(n, 20), **targets}

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = net(batch["history"], batch["features"])
        return {
            "value": F.huber_loss(outputs["value"], batch["value"], reduction="sum"),
            "class": F.cross_entropy(outputs["class_logits"], batch["class"], reduction="sum"),
            "exceeds": F.binary_cross_entropy_with_logits(outputs["exceeds_logit"], batch["exceeds"], reduction="sum"),
        }

    return build, make_batch, loss, BLOCKS


MODULES: dict[str, Callable[..., Parts]] = {
    part.__name__.replace("_", "-"): part
    for part in (
        mlp, lstm, gru, unet, vit, gpt, gpt_dropout, resnet, encoder_decoder, frozen, embedding, series,
    )
}  # fmt: skip


def _case(module: str, micro_batch_size: int, *how: str, cut: int = 1, **sizes: int) -> Case:
    return Case(module, sizes, micro_batch_size, *how, accumulation_steps=cut)


CASES = (
    _case("mlp", 512, width=2048, depth=12),
    _case("mlp", 4096, "bf16", "sgd", width=1024, depth=16),
    _case("mlp", 8192, "fp32", "sgd", "blocks", width=1024, depth=8),
    _case("mlp", 512, "bf16", "adamw", "blocks", cut=2, width=3072, depth=10),
    _case("lstm", 64, width=512, layers=2, length=64),
    _case("lstm", 32, "bf16", width=1024, layers=2, length=64),
    _case("lstm", 128, "fp32", "sgd", width=256, layers=3, length=128),
    _case("gru", 64, width=512, layers=2, length=64),
    _case("gru", 32, "bf16", "sgd", width=1024, layers=2, length=64),
    _case("gru", 128, "fp32", "plain", width=256, layers=2, length=96),
    _case("unet", 8, width=16, size=256),
    _case("unet", 16, "bf16", width=16, size=256),
    _case("unet", 16, "fp32", "sgd", "blocks", width=16, size=256),
    _case("unet", 8, "bf16", "adamw", "blocks", width=32, size=256),
    _case("vit", 16, width=384, layers=6, size=224),
    _case("vit", 32, "bf16", "sgd", width=512, layers=8, size=224),
    _case("vit", 24, "fp32", "adamw", "blocks", width=384, layers=6, size=224),
    _case("vit", 32, "bf16", "adamw", "blocks", width=512, layers=8, size=224),
    _case("gpt", 6, width=512, layers=6, length=256),
    _case("gpt", 16, "bf16", "sgd", width=512, layers=8, length=256),
    _case("gpt", 4, "fp32", "adamw", "blocks", width=512, layers=8, length=512),
    _case("gpt", 8, "bf16", "adamw", "blocks", width=512, layers=8, length=512),
    _case("gpt-dropout", 4, width=512, layers=4, length=256),
    _case("gpt-dropout", 8, "bf16", "adamw", cut=2, width=512, layers=6, length=256),
    _case("resnet", 16, width=64, size=160),
    _case("resnet", 32, "bf16", "sgd", width=64, size=160),
    _case("resnet", 32, "fp32", "plain", "blocks", width=64, size=160),
    _case("resnet", 32, "bf16", "adamw", "blocks", width=64, size=192),
    _case("encoder-decoder", 8, width=512, layers=4, length=128),
    _case("encoder-decoder", 16, "bf16", "sgd", width=512, layers=4, length=128),
    _case("encoder-decoder", 8, "fp32", "adamw", "blocks", width=512, layers=3, length=160),
    _case("frozen", 32, width=64, size=128),
    _case("frozen", 64, "bf16", width=64, size=192),
    _case("frozen", 64, "fp32", "sgd", width=64, size=160),
    _case("embedding", 4096, rows=400_000, width=96, bag=32),
    _case("embedding", 8192, "bf16", "sgd", rows=1_000_000, width=128, bag=32),
    _case("embedding", 16384, "fp32", "plain", rows=200_000, width=128, bag=64),
    _case("series", 8, length=400),
    _case("series", 16, "bf16", length=400),
    _case("series", 12, "fp32", "adamw", "blocks", length=400),
    _case("series", 8, "fp32", "adamw", cut=2, length=400),
)
