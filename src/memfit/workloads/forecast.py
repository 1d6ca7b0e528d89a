"""The forecast workload: the next rows of a series from the rows before them, by recurrent nets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.data import features as feature_code
from memfit.data.horizons import ForecastSeries
from memfit.data.spec import build, require
from memfit.data.splits import SPLITS
from memfit.metrics.forecast import forecast_scores, scored_steps, step_scores
from memfit.models.forecaster_settings import ForecasterSettings
from memfit.models.normalization import Normalization
from memfit.models.recurrent_forecaster import BLOCKS, RecurrentForecaster
from memfit.step import Batch
from memfit.workloads.base import Arrays, ExportSpec, variant_builders

TASK = ("window", "horizon", "season")
MAX_KEPT_WEIGHTS = 1 << 24
"""Alignments are among the predictions where those of a split have at most so many weights: 64 MiB of the budget."""
MAX_CHANGES = 1 << 20
"""The deviation of changes is taken over at most about so many of them, 4 MiB, evenly spread."""


@dataclass(frozen=True, kw_only=True)
class ForecastLoss:
    """The loss over all steps of the horizon. Raises ConfigError for a value that cannot work."""

    loss: str = "huber"
    """huber, mse or mae, on normalized values."""
    huber_delta: float = 1.0
    """Where the Huber loss, and the score of that name, turn linear, in standard deviations of the train rows."""

    def __post_init__(self) -> None:
        require(self.loss in ("huber", "mse", "mae"), "loss.loss", "huber, mse or mae", self.loss)
        require(self.huber_delta > 0, "loss.huber_delta", "more than 0", self.huber_delta)

    def of(self, value: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each entry."""
        if self.loss == "huber":
            return F.huber_loss(value, target, reduction="none", delta=self.huber_delta)
        return (F.mse_loss if self.loss == "mse" else F.l1_loss)(value, target, reduction="none")


class ForecastWorkload:
    """A prepared series and the nets of `models.recurrent_forecaster`.

    A sample is a target row r: rows r .. r + horizon - 1 are predicted from the `window` rows before r. Gradients do
    not depend on how a batch is cut, teacher forcing included; under batch normalization they do a little.
    """

    blocks = BLOCKS

    def __init__(self, data_dir: Path, model: Mapping[str, Any], loss: Mapping[str, Any]) -> None:
        self.model = dict(model)
        own = self.model["variants"][self.model["variant"]]
        self.data = ForecastSeries(data_dir, **{name: own[name] for name in TASK})
        self.manifest = self.data.manifest
        self.settings = build(ForecastLoss, loss, "loss.")
        self.scale = self.manifest["normalization"]["value"]
        self.with_features = own["inputs"] == "features"
        self._forces = any(options["head"] == "seq2seq" for options in self.model["variants"].values())
        self._names = self.manifest["features"]["names"] if self.with_features else []

    def variants(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return model builders by name, the wanted one first."""
        return variant_builders(self.model, self._build)

    def _build(self, options: Mapping[str, Any]) -> RecurrentForecaster:
        own = {key: value for key, value in options.items() if key not in ("window", "season", "inputs")}
        features = self.manifest["normalization"]["features"] if self.with_features else {"mean": [], "std": []}
        normalization = Normalization(
            value_mean=self.scale["mean"],
            value_std=self.scale["std"],
            feature_mean=features["mean"],
            feature_std=features["std"],
        )
        settings = ForecasterSettings(**own)
        change_std = self._change_std if settings.output == "bins" else 1.0
        return RecurrentForecaster(settings, normalization, change_std)

    @cached_property
    def _change_std(self) -> float:
        """Deviation, normalized, of the change from the last known value to those to predict; 1 where it is 0."""
        size = self.num_samples("train")
        spread = np.linspace(0, size - 1, min(size, max(1, MAX_CHANGES // self.data.horizon))).astype(np.int64)
        rows = self.data.first_rows("train", spread)
        changes = self.data.horizons(rows) - self.data.values[rows - 1][:, None]
        return float(changes.std(dtype=np.float64) / (self.scale["std"] or 1.0)) or 1.0

    def num_samples(self, split: str) -> int:
        """Count the samples of a split: those whose whole horizon lies in it."""
        return self.data.num_samples(split)

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        """Cut histories [n, window, channels] and targets [n, horizon] on the host, in the user's units.

        A decoder's training batches draw uniform numbers [n, horizon] for teacher forcing from torch's global
        generator, whose state is part of checkpoints.
        """
        rows = self.data.first_rows(split, indices)
        arrays = self.data.sequences(rows, with_features=self.with_features)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return batch | ({"draws": torch.rand(batch["target"].shape)} if self._forces and split == "train" else {})

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return the sum over samples of the mean loss over the horizon: in normalized units, or in nats of bins."""
        found = model(batch["history"], batch["target"], batch.get("draws"))
        loss = found.cross_entropy
        if loss is None:
            loss = self.settings.of(found.value, (batch["target"] - self.scale["mean"]) / self.scale["std"])
        return {"value": loss.mean(dim=1).sum()}

    def count(self, batch: Batch) -> Mapping[str, float]:
        """Count samples."""
        return {"value": float(len(batch["target"]))}

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return value_horizon [n, horizon] in the user's unit, its first step as value [n], and the alignment.

        alignment: [n, horizon, window], of nets with attention, where all of a split's take little enough memory.
        """
        assert isinstance(model, RecurrentForecaster)
        value, alignment, _ = model(batch["history"])
        found = model.normalization.denormalize(value)
        kept = {"value": found[:, 0], "value_horizon": found}
        if alignment is not None and self._keeps_alignment:
            kept["alignment"] = alignment
        return kept

    @property
    def _keeps_alignment(self) -> bool:
        most = max(self.num_samples(split) for split in SPLITS[1:])
        return most * self.data.horizon * self.data.window <= MAX_KEPT_WEIGHTS

    def truth(self, split: str, indices: np.ndarray) -> Arrays:
        """Return truth_horizon [n, horizon]; of the first step times (UTC, ns), truth and persistence, each [n]."""
        rows = self.data.first_rows(split, indices)
        values = self.data.horizons(rows)
        return {
            "times": np.asarray(self.data.times[rows]),
            "truth": values[:, 0],
            "truth_horizon": values,
            "persistence": np.asarray(self.data.values[rows - 1]),
        }

    def score(self, truth: Arrays, predictions: Arrays) -> dict[str, float | None]:
        """Score all steps together and some alone; see metrics.forecast."""
        return forecast_scores(truth["truth_horizon"], predictions["value_horizon"], self._huber_delta)

    def score_steps(self, truth: Arrays, predictions: Arrays) -> dict[str, list[float | None]]:
        """Score every step of the horizon: a list per metric."""
        return step_scores(truth["truth_horizon"], predictions["value_horizon"], self._huber_delta)

    @property
    def _huber_delta(self) -> float:
        return float(self.settings.huber_delta * self.scale["std"])

    def baselines(self, split: str) -> dict[str, Arrays]:
        """Predict by the last known value (persistence), and by the newest one a whole number of seasons before."""
        rows = self.data.first_rows(split, np.arange(self.num_samples(split)))
        last = np.asarray(self.data.values[rows - 1])
        forecasts = {
            "persistence": np.repeat(last[:, None], self.data.horizon, axis=1),
            "seasonal_naive": self.data.seasonal(rows),
        }
        return {name: {"value": values[:, 0], "value_horizon": values} for name, values in forecasts.items()}

    def inference_module(self, model: nn.Module) -> nn.Module:
        """Wrap a net for consumers: raw history in, values in the user's unit (and the alignment) out."""
        assert isinstance(model, RecurrentForecaster)
        return ForecastInference(model)

    def export(self, samples: int) -> ExportSpec:
        """Describe the ONNX graph's input and outputs, with the newest test rows as the sample."""
        size, horizon = self.num_samples("test"), self.data.horizon
        batch = self.batch("test", np.arange(max(0, size - samples), size))
        unit, channels = self.manifest["unit"], 1 + len(self._names)
        what = "Past rows, oldest first: the value" + (", then the card's features" if self._names else "") + "."
        outputs = [_entry("value", ["batch", horizon], unit, "The next rows' values, the next one first.")]
        if self.model["variants"][self.model["variant"]]["attention"] != "none":
            weights = "Weight of each past row in each step; sums to 1."
            outputs.append(_entry("alignment", ["batch", horizon, "time"], "", weights))
        return ExportSpec(
            inputs=[_entry("history", ["batch", "time", channels], unit, what)],
            outputs=outputs,
            sample_inputs={"history": batch["history"].numpy()},
            card={"forecast": self._card()},
            support_files={"features.py": Path(feature_code.__file__)} if self._names else {},
        )

    def _card(self) -> dict[str, Any]:
        keys = ("time_column", "value_column", "extra_columns", "unit", "frequency", "lookback", "threshold")
        return {
            **{name: getattr(self.data, name) for name in TASK},
            **{key: self.manifest[key] for key in keys},
            "channels": [self.manifest["value_column"], *self._names],
            "feature_spec": self.manifest["features"]["spec"] if self._names else None,
            "normalization": {"value": self.scale},
        }

    def describe(self) -> dict[str, Any]:
        """Return the unit, horizon and window, the number of samples, and what the scores of single steps are."""
        return {
            "headline": "mae",
            "unit": self.manifest["unit"],
            **{name: getattr(self.data, name) for name in TASK},
            "scored_steps": scored_steps(self.data.horizon),
            "huber_delta": self._huber_delta,
            "num_forecasts": {split: self.num_samples(split) for split in SPLITS},
        }


class ForecastInference(nn.Module):
    """The net as a consumer calls it: raw history in, denormalized values out, and the alignment where there is one."""

    def __init__(self, model: RecurrentForecaster) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor) -> tuple[Tensor, ...]:
        """Map history [n, T, channels] to values [n, horizon] and, with attention, the alignment [n, horizon, T]."""
        value, alignment, _ = self.model(history)
        found = self.model.normalization.denormalize(value)
        return (found,) if alignment is None else (found, alignment)


def _entry(name: str, shape: list[int | str], unit: str, description: str) -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": "float32", "unit": unit, "description": description}
