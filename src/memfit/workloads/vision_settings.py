"""What a config may say of images, their net and its loss; and how such data are prepared. Torch is not needed."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, Unpack

from pydantic import Field, model_validator

from memfit.data.image_spec import MAX_IMAGE_SIZE, ImageSpec
from memfit.data.images import images_fingerprint, outline_images, prepare_images
from memfit.metrics.vision import METRICS
from memfit.models.resnet_settings import ResNetSettings, min_micro_batch_size
from memfit.parts import ModelPart, Part, Probability, Share, merge_variants
from memfit.workloads.kind import How, Kind

Pixels = Annotated[int, Field(ge=0, le=1024, strict=True)]


class Source(Part):
    """Where labeled images come from."""

    kind: Literal["cifar10", "cifar100", "folder", "npz", "sample"]
    """`cifar10`, `cifar100`: an archive or its extracted directory, python or binary version. `folder`: a directory of
    classes, or of splits of classes. `npz`: arrays x and y, or x_train, y_train and so on. `sample`: a packaged one."""
    path: Annotated[str, Field(max_length=4096)] | None = None
    """The file or directory; none with `sample`."""
    name: Literal["digits"] = "digits"
    """For `sample`: which one. digits: 1,797 handwritten digits of 8 x 8 pixels."""
    image_size: Annotated[int, Field(ge=0, le=MAX_IMAGE_SIZE, strict=True)] = 0
    """For `folder`, needed there: height and width in pixels; images are cut to a square and resized."""
    channels: Literal[1, 3] = 3
    """For `folder`: 3 for colors, 1 for gray."""
    labels: Literal["fine", "coarse"] = "fine"
    """For `cifar100`: 100 classes, or 20."""


class ImageData(Part):
    """Labeled images and their splits."""

    source: Source
    """Where they come from."""
    validation_share: Share = 0.1
    """Share of each class, outside the test, that is validated on; unused where the source has such a split."""
    test_share: Share = 0.2
    """Share of each class that is tested on; unused where the source has a test split of its own."""
    seed: int = 0
    """Which images the splits take."""

    @model_validator(mode="after")
    def _can_be_prepared(self) -> Self:
        self.spec()
        return self

    def spec(self) -> ImageSpec:
        """Return what the preparation takes. Raises: ConfigError for settings that contradict each other."""
        return ImageSpec.from_dict(self.model_dump(mode="json", exclude_none=True))


class ModelSettings(Part):
    """One residual net."""

    name: Literal["resnet18", "resnet34", "resnet50", "wide_resnet", "resnet_light"] = "resnet18"
    """Which one: 11.2, 21.3, 23.5, 36.5 (28 layers, 10 times as wide) and 0.3 million parameters."""
    width_multiplier: Annotated[float, Field(gt=0, le=64)] | None = None
    """What every stage's channels are multiplied with; none: 10 for wide_resnet, 1 for the others."""
    depth: Annotated[int, Field(strict=True)] | None = None
    """For wide_resnet: its layers, 6 n + 4; none: 28."""
    norm: Literal["batch", "group"] = "batch"
    """Batch statistics are those of a micro-batch; group normalization makes accumulation exact."""
    groups: Annotated[int, Field(ge=1, le=4096, strict=True)] = 32
    """Most groups of group normalization; a group has 4 channels at least."""
    dropout: Probability = 0.0
    """Dropout inside wide_resnet's blocks, and before the classifier of the others."""
    stem: Literal["auto", "small", "large"] = "auto"
    """`small`: one 3 x 3 convolution; `large`: 7 x 7 with stride 2, then pooling; `auto`: by the image's size."""
    channels_last: bool = True
    """Keep activations and kernels in the channels-last format: the same function, faster on most GPUs."""

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        ResNetSettings.from_dict(self.model_dump(exclude={"variants", "start"}, exclude_none=True))
        return self


class Model(ModelSettings, ModelPart):
    """The net, and the lighter variants that a plan may be allowed to fall back to."""

    def all_variants(self) -> dict[str, dict[str, Any]]:
        """Return every variant's resolved settings, the model's own first, by the net's name."""
        own = self.own
        return merge_variants(self.name, own, self.variants, ModelSettings)


class Augment(Part):
    """Changes to training images; 0 leaves one out."""

    crop_padding: Pixels = 0
    """Pixels of zeros around an image before its own size is cut out at a random place: 4 for CIFAR."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the images that are mirrored left to right."""
    cutout: Pixels = 0
    """Side of a square at a random place that is filled with the mean color: 16 for CIFAR-10."""
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0
    """alpha of the Beta distribution of an image's own share, the rest being another image: 0.1 to 1."""


class Loss(Part):
    """Cross-entropy, and what training images go through."""

    label_smoothing: Probability = 0.0
    """Share of the target spread evenly over all classes, while training."""
    augment: Augment = Augment()
    """Changes to training images."""


class VisionKind(Kind):
    """The image workload, as the pipeline's parent process knows it."""

    data, model, loss = ImageData, Model, Loss
    monitors = ("total", "class", *METRICS)

    def fingerprint(self, data: ImageData, model: Model, code_version: str) -> str:  # noqa: ARG002
        """Name the prepared data."""
        return images_fingerprint(data.spec(), code_version)

    def prepare(self, data: ImageData, model: Model, store: Path, **how: Unpack[How]) -> Path:  # noqa: ARG002
        """Prepare the images, or find them prepared."""
        return prepare_images(data.spec(), store, **how)

    def outline(self, data: ImageData, model: Model, directory: Path) -> bool:  # noqa: ARG002
        """Write made-up data of the same shapes."""
        outline_images(data.spec(), directory)
        return True

    def min_micro_batch_size(self, model: Model) -> int:
        """Return what batch statistics need, over all variants."""
        return min_micro_batch_size({"variants": model.all_variants()})
