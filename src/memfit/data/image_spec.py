"""What an image data set is made of: its source and its splits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from memfit.data.spec import build, require, to_document

KINDS = ("cifar10", "cifar100", "folder", "npz", "sample")
SAMPLES = ("digits",)
MAX_IMAGE_SIZE = 2048
"""Longest side, in pixels, of a prepared image."""
MAX_CLASSES = 10_000
"""Most classes of a data set."""


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Where labeled images come from. Raises ConfigError, naming the setting, where a value cannot work."""

    kind: str
    """cifar10, cifar100: the archive (.tar.gz, .tar) or its extracted directory, python or binary version.
    folder: a directory of classes, `<class>/*.png`, or of splits, `train/<class>/*.png`, `test/...`, `validation/...`.
    npz: arrays x and y, or x_train, y_train, x_test, y_test and so on. sample: packaged real images."""
    path: str | None = None
    """The file or directory; none with `sample`."""
    name: str = "digits"
    """For `sample`: which one. digits: 1,797 handwritten digits of 8 x 8 pixels, 0 to 16, from scikit-learn."""
    image_size: int = 0
    """For `folder`, needed there: height and width in pixels; images are cut to a square and resized."""
    channels: int = 3
    """For `folder`: 3 for colors, 1 for gray."""
    labels: str = "fine"
    """For `cifar100`: "fine" (100 classes) or "coarse" (20)."""

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "source.kind", f"one of {', '.join(KINDS)}", self.kind)
        needs_path = self.kind != "sample"
        require(bool(self.path) == needs_path, "source.path", "a path" if needs_path else "none", self.path)
        require(self.name in SAMPLES, "source.name", f"one of {', '.join(SAMPLES)}", self.name)
        require(self.channels in (1, 3), "source.channels", "1 or 3", self.channels)
        require(self.labels in ("fine", "coarse"), "source.labels", '"fine" or "coarse"', self.labels)
        if self.kind == "folder":
            fits = 1 <= self.image_size <= MAX_IMAGE_SIZE
            require(fits, "source.image_size", f"1 to {MAX_IMAGE_SIZE} pixels", self.image_size)


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """One image data set to prepare. Raises ConfigError, naming the setting, where a value cannot work."""

    source: ImageSource
    validation_share: float = 0.1
    """Share of each class, outside the test, that is validated on; unused where the source has a validation split."""
    test_share: float = 0.2
    """Share of each class that is tested on; unused where the source has a test split of its own."""
    seed: int = 0
    """Which images the splits take: another seed, other images."""

    def __post_init__(self) -> None:
        for name in ("validation_share", "test_share"):
            share = getattr(self, name)
            require(0 < share < 1, name, "a share between 0 and 1", share)
        require(abs(self.seed) < 1 << 63, "seed", "a whole number of 64 bits", self.seed)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Build a spec from a JSON-able document; an unknown key is an error that names the nearest one."""
        require(isinstance(document, Mapping), "data", "a table of settings", document)
        return build(cls, document, "")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able document that `from_dict` takes."""
        return to_document(self)
