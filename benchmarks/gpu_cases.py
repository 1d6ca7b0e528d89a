"""Two dozen modules as training programs, sized for a GPU: most steps take 1 to 10 GiB in fp32."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import cpu_cases
from benchmarks.cpu_cases import OPTIMIZERS, Case, Layer, Parts, Residual
from memfit.chunked_loss import linear_cross_entropy
from memfit.models.nbeats import NBeats, NBeatsBlock
from memfit.models.tcn import TemporalBlock, TemporalConvNet
from memfit.step import TrainingProgram

LARGE_VOCABULARY = 50_257


def _images(build: Callable[[], nn.Module], shape: tuple[int, ...], blocks: tuple[type, ...]) -> Parts:
    """Classify random images (or clips) of a shape into 100 classes."""
    return (
        build,
        lambda n, _: {"x": torch.randn(n, *shape), "y": torch.randint(100, (n,))},
        lambda net, batch: F.cross_entropy(net(batch["x"]), batch["y"]),
        blocks,
    )


def _regression(
    build: Callable[[], nn.Module], inputs: tuple[int, ...], outputs: tuple[int, ...], blocks: tuple[type, ...]
) -> Parts:
    return (
        build,
        lambda n, _: {"x": torch.randn(n, *inputs), "y": torch.randn(n, *outputs)},
        lambda net, batch: F.mse_loss(net(batch["x"]), batch["y"]),
        blocks,
    )


class Basic(nn.Module):
    """He et al. 2015, figure 5 left."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


def basic_resnet(width: int, size: int) -> Parts:
    """ResNet-18."""

    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(True),
                                   nn.MaxPool2d(3, 2, 1)]  # fmt: skip
        for stage, block in product(range(4), range(2)):
            inputs = width << max(0, stage - (block == 0))
            layers.append(Basic(inputs, width << stage, 2 if stage and not block else 1))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 100))

    return _images(build, (3, size, size), (Basic,))


class Stage(nn.Sequential):
    """Convolutions of one resolution, and a pooling."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        layers: list[nn.Module] = []
        for index in range(depth):
            layers += [nn.Conv2d(outputs if index else inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.MaxPool2d(2))


def vgg(width: int, size: int) -> Parts:
    """Simonyan and Zisserman 2014, configuration D: no batch norm, a large classifier."""

    def build() -> nn.Module:
        widths = (width, 2 * width, 4 * width, 8 * width, 8 * width)
        stages = [Stage(i, o, d) for i, o, d in zip((3, *widths), widths, (2, 2, 3, 3, 3), strict=False)]
        classifier = [
            nn.Linear(widths[-1] * (size // 32) ** 2, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4096, 100),
        ]  # fmt: skip
        return nn.Sequential(*stages, nn.Flatten(), *classifier)

    return _images(build, (3, size, size), (Stage,))


class Inverted(nn.Module):
    """Sandler et al. 2018: expand, convolve each channel by itself, project."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 6 * inputs
        self.same = inputs == outputs and stride == 1
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.same else self.layers(x)


def depthwise(width: int, size: int) -> Parts:
    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(True)]
        for stage, block in product(range(4), range(3)):
            inputs = width << max(0, stage - (block == 0))
            layers.append(Inverted(inputs, width << stage, 2 if stage and not block else 1))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 100))

    return _images(build, (3, size, size), (Inverted,))


class Mix(nn.Module):
    """Tolstikhin et al. 2021: one perceptron over the patches, one over the channels."""

    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.over_patches = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.over_channels = Residual(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.over_channels(x + self.over_patches(self.norm(x).transpose(1, 2)).transpose(1, 2))


class Mixer(nn.Module):
    def __init__(self, width: int, layers: int, size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.layers = nn.Sequential(*[Mix(width, (size // 16) ** 2) for _ in range(layers)])
        self.head = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(dim=1))


def mixer(width: int, layers: int, size: int) -> Parts:
    return _images(lambda: Mixer(width, layers, size), (3, size, size), (Mix,))


class Bert(nn.Module):
    """torch's own encoder with a padding mask and dropout, and a head over the whole vocabulary."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(cpu_cases.VOCABULARY, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.1, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, cpu_cases.VOCABULARY)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids) + self.positions, src_key_padding_mask=padding))


def bert(width: int, layers: int, length: int) -> Parts:
    """Guess the masked tokens; all others are ignored by the loss."""

    def make_batch(n: int, _seq_len: int | None) -> dict[str, Tensor]:
        ids = torch.randint(cpu_cases.VOCABULARY, (n, length))
        padding = torch.arange(length) >= torch.randint(length // 2, length + 1, (n, 1))
        return {"ids": ids, "padding": padding, "targets": torch.where(torch.rand(n, length) < 0.15, ids, -100)}

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch["ids"], batch["padding"]).flatten(0, 1), batch["targets"].flatten())

    return lambda: Bert(width, layers, length), make_batch, loss, (nn.TransformerEncoderLayer,)


class Decoder(nn.Module):
    """A decoder that leaves its head, tied to the embedding, to the loss."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(LARGE_VOCABULARY, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.layers = nn.Sequential(*[Layer(width, causal=True) for _ in range(layers)], nn.LayerNorm(width))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.embed(ids) + self.positions)


def vocabulary(width: int, layers: int, length: int) -> Parts:
    """Most of the memory is logits, unless the loss is taken in chunks."""

    def make_batch(n: int, _seq_len: int | None) -> dict[str, Tensor]:
        ids = torch.randint(LARGE_VOCABULARY, (n, length + 1))
        return {"ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return linear_cross_entropy(net(batch["ids"]), net.embed.weight, batch["targets"], reduction="mean")

    return lambda: Decoder(width, layers, length), make_batch, loss, (Layer,)


def tcn(window: int, channels: int) -> Parts:
    def build() -> nn.Module:
        return nn.Sequential(TemporalConvNet(window=window, channels=channels, dropout=0.1), nn.Linear(channels, 1))

    return _regression(build, (window,), (1,), (TemporalBlock,))


def nbeats(window: int, hidden: int, num_blocks: int) -> Parts:
    def build() -> nn.Module:
        net = NBeats(window=window, hidden=hidden, num_blocks=num_blocks)
        return nn.Sequential(net, nn.Linear(net.out_features, 1))

    return _regression(build, (window,), (1,), (NBeatsBlock,))


class Up(nn.Sequential):
    """Twice the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        up = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)
        super().__init__(up, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Down(nn.Sequential):
    """Half the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 4, 2, 1), nn.GroupNorm(8, outputs), nn.SiLU())


def autoencoder(width: int, size: int) -> Parts:
    widths = (width, 2 * width, 4 * width, 8 * width)

    def build() -> nn.Module:
        down = [Down(i, o) for i, o in zip((3, *widths), widths, strict=False)]
        up = [Up(i, o) for i, o in zip(widths[::-1], (*widths[-2::-1], width), strict=True)]
        return nn.Sequential(*down, *up, nn.Conv2d(width, 3, 3, padding=1))

    return _regression(build, (3, size, size), (3, size, size), (Down, Up))


def generator(width: int, latent: int) -> Parts:
    """Radford et al. 2015, without its adversary: codes to images of 128 x 128."""

    def build() -> nn.Module:
        widths = [16 * width, 8 * width, 4 * width, 2 * width, width]
        ups = [Up(i, o) for i, o in zip(widths, [*widths[1:], width], strict=True)]
        first = (nn.Linear(latent, widths[0] * 16), nn.Unflatten(1, (widths[0], 4, 4)))
        return nn.Sequential(*first, *ups, nn.Conv2d(width, 3, 3, padding=1))

    return _regression(build, (latent,), (3, 128, 128), (Up,))


class Cube(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv3d(inputs, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True))


def video(width: int, frames: int, size: int) -> Parts:
    """Clips, convolved in space and time."""

    def build() -> nn.Module:
        cubes = [Cube(3, width), nn.MaxPool3d((1, 2, 2)), Cube(width, 2 * width), nn.MaxPool3d(2),
                 Cube(2 * width, 4 * width), Cube(4 * width, 4 * width)]  # fmt: skip
        return nn.Sequential(*cubes, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4 * width, 100))

    return _images(build, (3, frames, size, size), (Cube,))


MODULES: dict[str, Callable[..., Parts]] = cpu_cases.MODULES | {
    part.__name__.replace("_", "-"): part
    for part in (
        basic_resnet, vgg, depthwise, mixer, bert, vocabulary, tcn, nbeats, autoencoder, generator, video,
    )
}  # fmt: skip


@dataclass(frozen=True)
class GpuCase(Case):
    """One training step: a module in a size, and how it is trained."""

    chunked_loss: bool = False

    @property
    def name(self) -> str:
        return super().name + ("/chunked" if self.chunked_loss else "")

    def program(self) -> TrainingProgram:
        build, make_batch, loss, blocks = MODULES[self.module](**self.sizes)
        return TrainingProgram(
            variants={"only": build},
            make_batch=make_batch,
            loss=loss,
            optimizer=lambda model: OPTIMIZERS[self.optimizer]([p for p in model.parameters() if p.requires_grad]),
            blocks=blocks,
        )


SIZES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("mlp", 8192, {"width": 2048, "depth": 12}),
    ("resnet", 64, {"width": 64, "size": 192}),
    ("gpt", 16, {"width": 768, "layers": 12, "length": 512}),
    ("lstm", 128, {"width": 1024, "layers": 2, "length": 256}),
    ("unet", 16, {"width": 32, "size": 256}),
    ("vit", 64, {"width": 768, "layers": 12, "size": 224}),
    ("series", 64, {"length": 1000}),
    ("embedding", 65536, {"rows": 2_000_000, "width": 128, "bag": 32}),
    ("vocabulary", 16, {"width": 512, "layers": 4, "length": 512}),
    ("depthwise", 24, {"width": 32, "size": 192}),
    ("bert", 32, {"width": 768, "layers": 6, "length": 256}),
    ("encoder-decoder", 32, {"width": 512, "layers": 4, "length": 256}),
    ("frozen", 256, {"width": 64, "size": 192}),
    ("vgg", 64, {"width": 64, "size": 128}),
    ("gru", 128, {"width": 1024, "layers": 2, "length": 256}),
    ("tcn", 64, {"window": 2048, "channels": 128}),
    ("nbeats", 16384, {"window": 512, "hidden": 1024, "num_blocks": 4}),
    ("mixer", 64, {"width": 512, "layers": 12, "size": 224}),
    ("autoencoder", 64, {"width": 64, "size": 256}),
    ("generator", 256, {"width": 64, "latent": 128}),
    ("video", 16, {"width": 32, "frames": 16, "size": 112}),
    ("basic-resnet", 128, {"width": 64, "size": 192}),
    ("gpt-dropout", 8, {"width": 768, "layers": 6, "length": 512}),
)
"""(module, micro-batch, sizes)"""


def _cases() -> tuple[GpuCase, ...]:
    """Every module in every way; all modules come before the next way, so that the first few say much."""
    found = []
    ways = product(("none", "blocks"), ("fp32", "fp16", "bf16"), ("adamw", "sgd"))
    for (checkpointing, precision, optimizer), (module, size, sizes) in product(ways, SIZES):
        if checkpointing == "none" or MODULES[module](**sizes)[3]:
            found.append(GpuCase(module, sizes, size, precision, optimizer, checkpointing))
            if module == "vocabulary":
                found.append(GpuCase(module, sizes, size, precision, optimizer, checkpointing, chunked_loss=True))
    return tuple(found)


CASES = _cases()
