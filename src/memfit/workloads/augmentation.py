"""Changes to training images that leave the class as it is, drawn from torch's global generator on the host."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memfit.data.spec import require
from memfit.step import Batch


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Which changes are made; 0 leaves one out. Raises ConfigError for a value that cannot work."""

    crop_padding: int = 0
    """Pixels of zeros put around an image before its own size is cut out again at a random place (4 for CIFAR)."""
    flip: float = 0.0
    """Share of the images that are mirrored left to right (0.5 for CIFAR; 0 for digits and text)."""
    cutout: int = 0
    """Side of a square, in pixels, put at a random place and cut off at the border, that is filled with the mean color
    (DeVries and Taylor, 2017: 16 for CIFAR-10, 8 for CIFAR-100)."""
    mixup: float = 0.0
    """alpha of Beta(alpha, alpha), from which each image's own share is drawn, the rest being another image of the
    batch and its class (Zhang et al., 2018: 0.1 to 1)."""

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            pixels = getattr(self, name)
            require(0 <= pixels <= 1024, f"augment.{name}", "0 to 1024 pixels", pixels)
        require(0 <= self.flip <= 1, "augment.flip", "a share of 0 to 1", self.flip)
        require(0 <= self.mixup <= 100, "augment.mixup", "0 to 100", self.mixup)


def augmented(batch: Batch, augment: Augment, fill: Tensor) -> Batch:
    """Return a batch of image uint8 [n, H, W, C] and label [n], changed; the batch itself stays as it is.

    fill: color of cut out squares, uint8 [C]. With mixup the image is float32 and there are label_other int64 [n] and
    label_share float32 [n], the weight of `label`. The same generator state gives the same batch.
    """
    image: Tensor = batch["image"]
    if augment.crop_padding:
        image = _crop(image, augment.crop_padding)
    if augment.flip:
        image = torch.where(torch.rand(len(image), 1, 1, 1) < augment.flip, image.flip(2), image)
    if augment.cutout:
        image = torch.where(_squares(image, augment.cutout), fill, image)
    if not augment.mixup:
        return {**batch, "image": image}
    return _mixed({**batch, "image": image}, augment.mixup)


def _crop(image: Tensor, padding: int) -> Tensor:
    n, height, width, channels = image.shape
    padded = image.new_zeros(n, height + 2 * padding, width + 2 * padding, channels)
    padded[:, padding : padding + height, padding : padding + width] = image
    top, left = torch.randint(0, 2 * padding + 1, (2, n))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # [n, top, left, C, H, W], a view
    return windows[torch.arange(n), top, left].permute(0, 2, 3, 1).contiguous()


def _squares(image: Tensor, side: int) -> Tensor:
    """Return masks [n, H, W, 1] of squares whose centers are anywhere in the image."""
    n, height, width, _ = image.shape
    middle_row, middle_column = torch.randint(0, height, (n, 1)), torch.randint(0, width, (n, 1))
    rows = _near(torch.arange(height), middle_row, side)
    columns = _near(torch.arange(width), middle_column, side)
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(-1)


def _near(places: Tensor, middle: Tensor, side: int) -> Tensor:
    start = middle - side // 2
    return (places >= start) & (places < start + side)


def _mixed(batch: Batch, alpha: float) -> Batch:
    image, label = batch["image"].float(), batch["label"]
    others = torch.randperm(len(label))
    share = torch.distributions.Beta(alpha, alpha).sample((len(label),))
    weight = share[:, None, None, None]
    mixed = weight * image + (1 - weight) * image[others]
    return {**batch, "image": mixed, "label_other": label[others], "label_share": share}
