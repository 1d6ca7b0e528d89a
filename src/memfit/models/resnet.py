"""Residual nets for small and large images: He et al. 2016, wide nets of Zagoruyko and Komodakis 2016."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memfit.errors import ConfigError, DataError
from memfit.models.normalization import constant_buffer
from memfit.models.resnet_settings import LARGE_IMAGE, ResNetSettings

Norm = Callable[[int], nn.Module]


def build_resnet(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    **settings: Any,
) -> "ResNet":
    """Build a net of `models.resnet_settings.ARCHITECTURES`; settings are the other fields of ResNetSettings.

    image_size: height and width. mean, std: per channel, on the scale of the raw images. Raises ConfigError.
    """
    chosen = ResNetSettings.from_dict({"name": name, **settings})
    return ResNet(chosen, num_classes=num_classes, in_channels=in_channels, image_size=image_size, mean=mean, std=std)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization that takes a single value per channel too: running statistics normalize it, unchanged.

    One sample of one pixel has no variance, and torch's own refuses it.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        """Map [n, C, H, W] to the same shape."""
        if not self.training or input.numel() > input.shape[1]:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def _norm(settings: ResNetSettings) -> Norm:
    return BatchNorm if settings.norm == "batch" else partial(_group_norm, settings.groups)


def _group_norm(most: int, channels: int) -> nn.GroupNorm:
    groups = next(count for count in range(min(most, channels // 4), 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Add two 3 x 3 convolutions to the input; a projection makes shapes meet (option B of the paper)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, *, stride: int, norm: Norm, dropout: float) -> None:  # noqa: ARG002
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, width, 3, stride), norm(width), nn.ReLU(), _conv(width, width, 3), norm(width)
        )
        self.skip = _projection(inputs, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, H, W] to [n, width, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.skip(x))


class Bottleneck(nn.Module):
    """Add 1 x 1, 3 x 3 and 1 x 1 convolutions to the input; the 3 x 3 one has the stride."""

    expansion = 4

    def __init__(self, inputs: int, width: int, *, stride: int, norm: Norm, dropout: float) -> None:  # noqa: ARG002
        super().__init__()
        outputs = self.expansion * width
        self.body = nn.Sequential(
            *(_conv(inputs, width, 1), norm(width), nn.ReLU()),
            *(_conv(width, width, 3, stride), norm(width), nn.ReLU()),
            *(_conv(width, outputs, 1), norm(outputs)),
        )
        self.skip = _projection(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, H, W] to [n, 4 * width, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.skip(x))


class PreactBlock(nn.Module):
    """Normalize and rectify first, then convolve twice, with dropout between (wide nets, figure 1d)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, *, stride: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.before = nn.Sequential(norm(inputs), nn.ReLU())
        self.body = nn.Sequential(
            _conv(inputs, width, 3, stride), norm(width), nn.ReLU(), nn.Dropout(dropout), _conv(width, width, 3)
        )
        same = inputs == width and stride == 1
        self.skip = None if same else _conv(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, H, W] to [n, width, H / stride, W / stride]."""
        active = self.before(x)
        skipped = x if self.skip is None else self.skip(active)
        out: Tensor = self.body(active) + skipped
        return out


def _projection(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs))


BLOCKS: tuple[type[nn.Module], ...] = (BasicBlock, Bottleneck, PreactBlock)
"""What activation checkpointing wraps: the repeated modules, each a function of one tensor."""
_BLOCKS: dict[str, type[BasicBlock | Bottleneck | PreactBlock]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
    "preact": PreactBlock,
}


class ResNet(nn.Module):
    """Classify images given on their raw scale: mean and std are buffers, saved and exported with the weights.

    Raises ConfigError where the arguments cannot make a net.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        settings: ResNetSettings,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        _check(num_classes, in_channels, image_size, mean, std)
        self.image_shape = (*image_size, in_channels)
        self.channels_last = settings.channels_last
        self.register_buffer("mean", constant_buffer("mean", mean, is_std=False))
        self.register_buffer("std", constant_buffer("std", std, is_std=True))
        plan, norm = settings.architecture, _norm(settings)
        preact = plan.block == "preact"
        large = max(image_size) > LARGE_IMAGE if settings.stem == "auto" else settings.stem == "large"
        self.stem = _stem(in_channels, plan.stem, norm, large=large, bare=preact)
        stages, channels = [], plan.stem
        for index, count in enumerate(plan.stages):
            stage, channels = _stage(
                _BLOCKS[plan.block], channels, plan.width << index, count, 1 + (index > 0), norm, settings.dropout
            )
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        self.last = nn.Sequential(norm(channels), nn.ReLU()) if preact else nn.Identity()
        self.dropout = nn.Dropout(0.0 if preact else settings.dropout)
        self.head = nn.Linear(channels, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Tensor:
        """Map raw images [n, H, W, C] of any dtype to logits fp32 [n, classes]. Raises DataError for other shapes."""
        if tuple(image.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise DataError(f"image must be [n, {expected}]; got {list(image.shape)}. Channels come last.")
        x = ((image.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        x = x if self.channels_last else x.contiguous()
        x = self.last(self.stages(self.stem(x)))
        logits: Tensor = self.head(self.dropout(x.float().mean(dim=(2, 3))))
        return logits.float()


def _stem(inputs: int, width: int, norm: Norm, *, large: bool, bare: bool) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(inputs, width, 7, 2) if large else _conv(inputs, width, 3)]
    layers += [] if bare else [norm(width), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(3, stride=2, padding=1)] if large else []))


def _stage(
    block: type[BasicBlock | Bottleneck | PreactBlock],
    channels: int,
    width: int,
    count: int,
    stride: int,
    norm: Norm,
    dropout: float,
) -> tuple[nn.Sequential, int]:
    """Return the blocks of one stage, the first with the stride, and how many channels they end with."""
    outputs = width * block.expansion
    blocks = [
        block(outputs if place else channels, width, stride=1 if place else stride, norm=norm, dropout=dropout)
        for place in range(count)
    ]
    return nn.Sequential(*blocks), outputs


def _check(
    num_classes: int, in_channels: int, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> None:
    if num_classes < 2:
        raise ConfigError(f"num_classes must be at least 2; got {num_classes}. Give images of two classes or more.")
    if len(image_size) != 2 or min(image_size) < 1:
        raise ConfigError(f"image_size must be height and width of at least 1 pixel; got {list(image_size)}.")
    if in_channels < 1 or len(mean) != in_channels or len(std) != in_channels:
        raise ConfigError(
            f"mean and std must have one number for each of the {in_channels} channels; got {len(mean)} and "
            f"{len(std)}. Take both from one manifest."
        )
