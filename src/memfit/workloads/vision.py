"""The image workload: a residual net that tells the class of an image."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.data.prepared_images import PreparedImages
from memfit.data.spec import build, require
from memfit.data.splits import SPLITS
from memfit.metrics.vision import METRICS, vision_scores
from memfit.models.resnet import BLOCKS, ResNet, build_resnet
from memfit.models.resnet_settings import min_micro_batch_size
from memfit.step import Batch
from memfit.workloads.augmentation import Augment, augmented
from memfit.workloads.base import Arrays, ExportSpec, variant_builders
from memfit.workloads.logistic_regression import fit_and_predict, num_fitted

TERMS = ("class",)
MONITORS = ("total", *TERMS, *METRICS)
"""What a stage may monitor."""


@dataclass(frozen=True, kw_only=True)
class VisionLoss:
    """Cross-entropy, and how training images are changed. Raises ConfigError for a value that cannot work."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes, while training (Szegedy et al., 2016)."""
    augment: Augment = field(default_factory=Augment)
    """Changes to training images."""

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1", self.label_smoothing)


class VisionWorkload:
    """Prepared images, the nets of `models.resnet` and cross-entropy.

    Batches hold raw pixels; the net normalizes them by the train images' mean and std. Under group normalization
    gradients do not depend on how a batch is cut; under batch normalization they do a little, as statistics are those
    of a micro-batch, which should then have `min_micro_batch_size` images or more.
    """

    blocks = BLOCKS

    def __init__(self, data_dir: Path, model: Mapping[str, Any], loss: Mapping[str, Any]) -> None:
        self.data = PreparedImages(data_dir)
        self.manifest = self.data.manifest
        self.model = dict(model)
        self.settings = build(VisionLoss, loss, "loss.")
        self.min_micro_batch_size = min_micro_batch_size(model)
        self.num_classes: int = self.manifest["num_classes"]
        mean = torch.tensor(self.manifest["normalization"]["mean"])
        self._mean_color = mean.round().clamp(0, 255).to(torch.uint8)

    def variants(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return model builders by name, the wanted one first."""
        return variant_builders(self.model, self._build)

    def _build(self, options: Mapping[str, Any]) -> ResNet:
        height, width = self.manifest["image_size"]
        return build_resnet(
            **{"name": "resnet18", **options},
            num_classes=self.num_classes,
            in_channels=self.manifest["channels"],
            image_size=(height, width),
            **self.manifest["normalization"],
        )

    def num_samples(self, split: str) -> int:
        """Count the images of a split."""
        return self.data.num_images(split)

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        """Copy images uint8 [n, H, W, C] and labels int64 [n]; those of train are augmented as the settings say.

        With mixup, images are float32, and label_other and label_share say what the rest of each image is. Augmented
        batches draw from torch's global generator, whose state is part of checkpoints.
        """
        batch = {name: torch.from_numpy(array) for name, array in self.data.batch(split, indices).items()}
        return augmented(batch, self.settings.augment, self._mean_color) if split == "train" else batch

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return the sum of the cross-entropies, in nats; labels are smoothed only while training."""
        smoothing = self.settings.label_smoothing if model.training else 0.0
        logits = model(batch["image"])
        entropy = functools.partial(F.cross_entropy, logits, label_smoothing=smoothing)
        if "label_other" not in batch:
            return {"class": entropy(batch["label"], reduction="sum")}
        share = batch["label_share"]
        own, other = (entropy(batch[name], reduction="none") for name in ("label", "label_other"))
        return {"class": (share * own + (1 - share) * other).sum()}

    def count(self, batch: Batch) -> Mapping[str, float]:
        """Count images."""
        return {"class": float(len(batch["label"]))}

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return class probabilities [n, C]."""
        return {"class_probabilities": model(batch["image"]).float().softmax(dim=-1)}

    def truth(self, split: str, indices: np.ndarray) -> Arrays:
        """Return true classes int64 [n], digests of the pixels uint64 [n], and places in the source int64 [n]."""
        rows = self.data.rows(split, indices)
        names = {"class_truth": self.data.labels, "digest": self.data.digests, "origin": self.data.origins}
        return {name: np.asarray(array[rows]) for name, array in names.items()}

    def score(self, truth: Arrays, predictions: Arrays) -> dict[str, float | None]:
        """Score the class probabilities; see metrics.vision."""
        return vision_scores(truth["class_truth"], predictions["class_probabilities"])

    def baselines(self, split: str) -> dict[str, Arrays]:
        """Predict by the classes' shares in train (majority), and by logistic regression on the pixels."""
        size = self.num_samples(split)
        counts = np.array(self.manifest["class_counts"]["train"], np.float64)
        shares = (counts / counts.sum()).astype(np.float32)
        fitted = self._fitted()
        labels = np.asarray(self.data.labels[self.data.rows("train", fitted)])
        probabilities = fit_and_predict(
            lambda chosen: self.data.batch("train", fitted[chosen])["image"],
            labels,
            self.num_classes,
            lambda chosen: self.data.batch(split, chosen)["image"],
            size,
        )
        return {
            "majority": {"class_probabilities": np.tile(shares, (size, 1))},
            "logistic_regression": {"class_probabilities": probabilities},
        }

    def _fitted(self) -> np.ndarray:
        """Return the train images that logistic regression is fitted on: all, or evenly spaced ones."""
        count = self.num_samples("train")
        height, width = self.manifest["image_size"]
        most = num_fitted(count, height, width, self.manifest["channels"])
        return np.linspace(0, count - 1, most).round().astype(np.int64)

    def inference_module(self, model: nn.Module) -> nn.Module:
        """Wrap a net for consumers: raw pixels in, class probabilities out."""
        return VisionInference(model)

    def export(self, samples: int) -> ExportSpec:
        """Describe the ONNX graph's input and output, with evenly spaced test images as the sample."""
        size = self.num_samples("test")
        chosen = np.linspace(0, size - 1, min(samples, size)).round().astype(np.int64)
        image = self.data.batch("test", chosen)["image"].astype(np.float32)
        low, high = self.manifest["value_range"]
        shape = [*self.manifest["image_size"], self.manifest["channels"]]
        colors = {1: "gray", 3: "red, green, blue"}.get(shape[-1], f"{shape[-1]} channels")
        classes = "Probability of each of the card's class_names, in their order."
        return ExportSpec(
            inputs=[_entry("image", ["batch", *shape], f"{low} to {high}", f"Raw pixels, rows first; {colors}.")],
            outputs=[_entry("class_probabilities", ["batch", self.num_classes], "", classes)],
            sample_inputs={"image": image},
            card={"vision": self._card()},
            support_files={},
        )

    def _card(self) -> dict[str, Any]:
        keys = ("class_names", "image_size", "channels", "value_range", "normalization", "class_counts", "duplicates")
        return {key: self.manifest[key] for key in keys}

    def describe(self) -> dict[str, Any]:
        """Return classes, the images' size and number, dropped copies, and what the baselines were fitted on."""
        keys = ("class_names", "image_size", "channels", "duplicates", "splits_of_the_source")
        fitted, count = len(self._fitted()), self.num_samples("train")
        return {
            "headline": "top1_accuracy",
            **{key: self.manifest[key] for key in keys},
            "num_images": {split: self.num_samples(split) for split in SPLITS},
            "baselines_fitted_on": {
                "majority": f"the classes' shares in all {count} train images",
                "logistic_regression": f"{fitted} of {count} train images",
            },
        }


class VisionInference(nn.Module):
    """The net as a consumer calls it: raw pixels in, probabilities out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Map raw pixels float32 [n, H, W, C] to class probabilities [n, classes]."""
        return (self.model(image).softmax(dim=-1),)


def _entry(name: str, shape: list[int | str], unit: str, description: str) -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": "float32", "unit": unit, "description": description}
