"""The multi-scale series workload: next value, its class, and whether it exceeds the threshold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.data import features as feature_code
from memfit.data.prepared import PreparedSeries
from memfit.metrics.series import series_scores
from memfit.models.multiscale import BLOCKS, MultiScaleNet, build_multiscale
from memfit.step import Batch
from memfit.workloads.base import Arrays, ExportSpec, variant_builders

TERMS = ("value", "class", "exceeds")


@dataclass(frozen=True, kw_only=True)
class SeriesLoss:
    """How the three heads' losses are computed and weighted."""

    value_weight: float = 1.0
    class_weight: float = 0.5
    exceeds_weight: float = 0.5
    value_loss: str = "huber"
    """huber or mse, on normalized values."""
    huber_delta: float = 1.0
    class_balance: bool = False
    """Weight classes by the inverse of their share of the training targets."""
    exceeds_positive_weight: float | None = None
    """Weight of a target above the threshold; None balances both sides."""


class SeriesWorkload:
    """A prepared series, the nets of `models.multiscale` and their losses."""

    blocks = BLOCKS

    def __init__(self, data_dir: Path, model: Mapping[str, Any], loss: Mapping[str, Any]) -> None:
        self.data = PreparedSeries(data_dir)
        self.manifest = self.data.manifest
        self.model = dict(model)
        self.settings = SeriesLoss(**loss)
        self.scale = self.manifest["normalization"]["value"]
        self.num_classes: int = self.manifest["num_classes"]
        self.class_weights = self._class_weights()
        self.positive_weight = self._positive_weight()

    def _class_weights(self) -> Tensor:
        counts = torch.tensor(self.manifest["class_counts"]["train"], dtype=torch.float32)
        if not self.settings.class_balance:
            return torch.ones(self.num_classes)
        return counts.sum() / (self.num_classes * counts.clamp(min=1.0))

    def _positive_weight(self) -> float:
        if self.settings.exceeds_positive_weight is not None:
            return self.settings.exceeds_positive_weight
        share = float(self.manifest["exceed_share"]["train"])
        return (1 - share) / share if 0 < share < 1 else 1.0

    def variants(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return model builders by name, the wanted one first."""
        return variant_builders(self.model, self._build)

    def _build(self, options: Mapping[str, Any]) -> MultiScaleNet:
        normalization = self.manifest["normalization"]
        return build_multiscale(
            **options,
            num_features=len(self.manifest["features"]["names"]),
            num_classes=self.num_classes,
            value_mean=self.scale["mean"],
            value_std=self.scale["std"],
            feature_mean=normalization["features"]["mean"],
            feature_std=normalization["features"]["std"],
        )

    def num_samples(self, split: str) -> int:
        """Count the targets of a split."""
        return self.data.num_targets(split)

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        """Cut windows and features of some targets; `indices` count within the split."""
        arrays = self.data.batch(self.data.rows(split)[indices])
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return the heads' weighted sums: value in normalized units, class and exceedance as cross-entropies."""
        outputs, settings = model(batch["history"], batch["features"]), self.settings
        target = (batch["target"] - self.scale["mean"]) / self.scale["std"]
        if settings.value_loss == "huber":
            value = F.huber_loss(outputs["value"], target, reduction="sum", delta=settings.huber_delta)
        else:
            value = F.mse_loss(outputs["value"], target, reduction="sum")
        weights = self.class_weights.to(target.device)
        classes = F.cross_entropy(outputs["class_logits"], batch["target_class"], weight=weights, reduction="sum")
        exceeds = F.binary_cross_entropy_with_logits(
            outputs["exceeds_logit"],
            batch["exceeds"],
            pos_weight=torch.tensor(self.positive_weight, device=target.device),
            reduction="sum",
        )
        return {
            "value": settings.value_weight * value,
            "class": settings.class_weight * classes,
            "exceeds": settings.exceeds_weight * exceeds,
        }

    def count(self, batch: Batch) -> Mapping[str, float]:
        """Count samples; the class term counts its class weights, as torch's weighted mean does."""
        samples = float(len(batch["target"]))
        return {"value": samples, "class": float(self.class_weights[batch["target_class"]].sum()), "exceeds": samples}

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return value [n] in the user's unit, class probabilities [n, C] and exceedance probability [n]."""
        assert isinstance(model, MultiScaleNet)
        return _heads(model, batch["history"], batch["features"])

    def truth(self, split: str, indices: np.ndarray) -> Arrays:
        """Return times (UTC, ns), true values, classes and exceedances, and the value one step before."""
        rows = self.data.rows(split)[indices]
        values = np.asarray(self.data.values[rows])
        return {
            "times": np.asarray(self.data.times[rows]),
            "truth": values,
            "class_truth": self._class_of(values),
            "exceeds_truth": values > self.manifest["threshold"],
            "persistence": np.asarray(self.data.values[rows - 1]),
        }

    def _class_of(self, values: np.ndarray) -> np.ndarray:
        return self.data.classes(values)

    def score(self, truth: Arrays, predictions: Arrays) -> dict[str, float | None]:
        """Score the three heads; see metrics.series."""
        return series_scores(
            truth["truth"],
            predictions["value"],
            truth["class_truth"],
            predictions["class_probabilities"].argmax(axis=1),
            truth["exceeds_truth"],
            predictions["exceeds_probability"] > 0.5,
            self.num_classes,
        )

    def baselines(self, split: str) -> dict[str, Arrays]:
        """Predict by the value before (persistence), by the train mean, and by the train majority."""
        size = self.num_samples(split)
        before = self.truth(split, np.arange(size))["persistence"]
        majority = int(np.argmax(self.manifest["class_counts"]["train"]))
        mean = np.full(size, self.scale["mean"], dtype=np.float32)
        mostly_above = self.manifest["exceed_share"]["train"] > 0.5
        return {
            "persistence": self._constant_heads(before, self._class_of(before), before > self.manifest["threshold"]),
            "train_mean": self._constant_heads(mean, self._class_of(mean), mean > self.manifest["threshold"]),
            "majority": self._constant_heads(mean, np.full(size, majority), np.full(size, mostly_above)),
        }

    def _constant_heads(self, value: np.ndarray, classes: np.ndarray, exceeds: np.ndarray) -> Arrays:
        probabilities = np.eye(self.num_classes, dtype=np.float32)[classes]
        return {"value": value, "class_probabilities": probabilities, "exceeds_probability": exceeds.astype(np.float32)}

    def inference_module(self, model: nn.Module) -> nn.Module:
        """Wrap a net for consumers: raw history and features in, value and probabilities out."""
        assert isinstance(model, MultiScaleNet)
        return SeriesInference(model)

    def export(self, samples: int) -> ExportSpec:
        """Describe the ONNX graph's inputs and outputs, with the newest test rows as the sample."""
        size = self.num_samples("test")
        batch = self.batch("test", np.arange(max(0, size - samples), size))
        context, names = self.manifest["context"], self.manifest["features"]["names"]
        unit = self.manifest["unit"]
        return ExportSpec(
            inputs=[
                _entry("history", ["batch", context], unit, "The newest values, oldest first, in the user's unit."),
                _entry("features", ["batch", len(names)], "", "Engineered features of the newest row, as features.py."),
            ],
            outputs=[
                _entry("value", ["batch"], unit, "The next value."),
                _entry("class_probabilities", ["batch", self.num_classes], "", "Probability of each class of values."),
                _entry("exceeds_probability", ["batch"], "", "Probability that the next value is above the threshold."),
            ],
            sample_inputs={name: batch[name].numpy() for name in ("history", "features")},
            card={"series": self._series_card()},
            support_files={"features.py": Path(feature_code.__file__)},
        )

    def _series_card(self) -> dict[str, Any]:
        manifest = self.manifest
        keys = ["context", "lookback", "threshold", "time_column", "value_column", "extra_columns"]
        keys += ["class_edges", "unit", "frequency"]
        return {
            **{key: manifest[key] for key in keys},
            "feature_spec": manifest["features"]["spec"],
            "feature_names": manifest["features"]["names"],
        }

    def describe(self) -> dict[str, Any]:
        """Return the unit, the threshold and the class edges."""
        return {key: self.manifest[key] for key in ("unit", "threshold", "class_edges")}


class SeriesInference(nn.Module):
    """The net as a consumer calls it: raw inputs, denormalized value, probabilities."""

    def __init__(self, model: MultiScaleNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map history [n, L] and features [n, F] to value [n], class probabilities [n, C], exceedance [n]."""
        heads = _heads(self.model, history, features)
        return heads["value"], heads["class_probabilities"], heads["exceeds_probability"]


def _heads(model: MultiScaleNet, history: Tensor, features: Tensor) -> dict[str, Tensor]:
    outputs = model(history, features)
    return {
        "value": model.denormalize(outputs["value"]),
        "class_probabilities": outputs["class_logits"].softmax(dim=-1),
        "exceeds_probability": outputs["exceeds_logit"].sigmoid(),
    }


def _entry(name: str, shape: list[int | str], unit: str, description: str) -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": "float32", "unit": unit, "description": description}
