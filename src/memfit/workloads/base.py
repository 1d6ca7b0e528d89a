"""What the pipeline asks of a workload; everything that is special to one lives behind this."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from memfit.step import Batch

Arrays = dict[str, np.ndarray]
Role = Literal["weight", "moment", "square"]
"""What a tensor of a parameter's shape is: its values, or an optimizer's mean of its gradients or of their squares."""


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """What the export needs to know of a workload."""

    inputs: list[dict[str, Any]]
    """name, shape (a name is a dimension of any size), dtype, unit, description."""
    outputs: list[dict[str, Any]]
    sample_inputs: Arrays
    """Real test rows."""
    card: dict[str, Any]
    """Further sections of the model card."""
    support_files: dict[str, Path]
    """Name in the bundle -> file to copy."""
    requirements: tuple[str, ...] = ()
    """Libraries that the support files need."""


def variant_builders(
    model: Mapping[str, Any], build: Callable[[Mapping[str, Any]], nn.Module]
) -> dict[str, Callable[[], nn.Module]]:
    """Return a builder per variant of a job's {"variant": name, "variants": {name: settings}}, the wanted one first."""
    names = [model["variant"], *(name for name in model["variants"] if name != model["variant"])]
    return {name: functools.partial(build, model["variants"][name]) for name in names}


class Workload(Protocol):
    """Prepared data, models, losses and metrics of one kind of problem."""

    blocks: tuple[type[nn.Module], ...]
    """Module types that activation checkpointing wraps."""

    def variants(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return model builders by name, the wanted one first."""

    def num_samples(self, split: str) -> int:
        """Count the samples of train, validation or test."""

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        """Cut a batch of samples on the host; `indices` count within the split."""

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return a weighted sum per term."""

    def count(self, batch: Batch) -> Mapping[str, float]:
        """Return how much each term of a batch counts; a term that is not named counts samples."""

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return predictions in the user's units, one row per sample."""

    def truth(self, split: str, indices: np.ndarray) -> Arrays:
        """Return what the predictions are compared with."""

    def score(self, truth: Arrays, predictions: Arrays) -> dict[str, float | None]:
        """Return the workload's metrics; one that is undefined is None."""

    def baselines(self, split: str) -> dict[str, Arrays]:
        """Return the predictions of trivial models, by name."""

    def inference_module(self, model: nn.Module) -> nn.Module:
        """Wrap a model for consumers: user's units in, user's units and probabilities out, as a tuple."""

    def export(self, samples: int) -> ExportSpec:
        """Describe inputs and outputs, with real test rows as the sample."""

    def describe(self) -> dict[str, Any]:
        """Return the facts for reports: unit, threshold, what the metrics mean."""


@runtime_checkable
class Illustrating(Protocol):
    """A workload that has more to show of a finished model than scores."""

    def illustrate(self, model: nn.Module) -> dict[str, Any]:
        """Return what people look at beside the scores, such as generated texts, JSON-able."""


@runtime_checkable
class Growing(Protocol):
    """A workload whose model may change between stages."""

    def carry(
        self, tensors: Mapping[str, Tensor], before: Mapping[str, Any], model: nn.Module, role: Role
    ) -> dict[str, Tensor]:
        """Carry tensors of a model's parameters, by name, over to those of another one.

        before: the settings of the model that they are of. Of `weight` there is one for each entry of the new model's
        state; of the others those that there is something to carry over for. Raises: ConfigError.
        """
