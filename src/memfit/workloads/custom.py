"""A user's own model and data: what a module must return, and the workload that memfit makes of it."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memfit.errors import ConfigError
from memfit.files import read_json
from memfit.process import Emit
from memfit.step import Batch
from memfit.workloads.base import Arrays, ExportSpec, variant_builders

SPLITS = ("train", "validation", "test")
MAX_INPUTS = 4


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a user's `build` returns: a model, its data and what they are measured by.

    memfit plans, trains, evaluates and exports it as it does its own workloads.
    """

    model: Callable[..., nn.Module]
    """Builds the model from the settings in the config's table `model`, given by name."""
    splits: Mapping[str, Mapping[str, Any]]
    """train, validation and test: arrays by name, the first dimension of each being the sample. Memory-mapped ones are
    read as batches need them."""
    inputs: tuple[str, ...]
    """Names of the arrays that the model is called with, in order; the others are targets."""
    loss: Callable[[nn.Module, Batch], Mapping[str, Tensor] | Tensor]
    """(model, batch of tensors by name) -> the mean over the samples, or a sum per term."""
    count: Callable[[Batch], Mapping[str, float]] | None = None
    """For a loss of sums: how much each term of a batch counts; default: its samples."""
    predict: Callable[..., Mapping[str, Tensor]]
    """(model, *inputs) -> what consumers get, by name, one row per sample."""
    score: Callable[[Arrays, Arrays], Mapping[str, float | None]]
    """(targets, predictions) of a split, as arrays by name -> metrics."""
    baselines: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Arrays]] = lambda _train, _split: {}
    """(arrays of train, arrays of a split) -> what trivial models predict for the split, by the model's name."""
    blocks: tuple[type[nn.Module], ...] = ()
    """Module types whose activations may be recomputed where memory is short."""
    augment: Callable[[Batch], Batch] = lambda batch: batch
    """Changes a training batch; draw from torch's generator, so that a resumed run draws the same."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the report: "unit", and "headline", the metric that decides."""

    def __post_init__(self) -> None:
        if set(self.splits) != set(SPLITS):
            raise ConfigError(f"Task.splits: expected {', '.join(SPLITS)}, got {', '.join(self.splits)}.")
        for split, arrays in self.splits.items():
            lengths = {name: len(array) for name, array in arrays.items()}
            if len(set(lengths.values())) != 1 or 0 in lengths.values():
                raise ConfigError(f"Task.splits: {split}: expected arrays of one length above 0, got {lengths}.")
        if missing := [name for name in self.inputs if name not in self.splits["train"]]:
            raise ConfigError(f"Task.inputs: {missing} are not among the arrays {list(self.splits['train'])}.")
        if not 1 <= len(self.inputs) <= MAX_INPUTS:
            raise ConfigError(f"Task.inputs: expected 1 to {MAX_INPUTS}, got {len(self.inputs)}. Stack some of them.")


def prepare(job: dict[str, Any], _emit: Emit) -> None:
    """Be the child that prepares: call the module's `prepare(data, directory)`, if it has one.

    job: place, data, directory. Raises: ConfigError where the module or its function is not there.
    """
    module, _build = _import(job["place"])
    if hasattr(module, "prepare"):
        module.prepare(job["data"], Path(job["directory"]))


def load(place: str, data_dir: Path, model: Mapping[str, Any], loss: Mapping[str, Any]) -> "CustomWorkload":
    """Build a user's workload from its prepared directory and the job's settings. Raises: ConfigError."""
    _module, build = _import(place)
    settings = read_json(data_dir / "manifest.json")["data"]
    wanted = inspect.signature(build).parameters
    given = {"data": settings, "loss": dict(loss), "directory": data_dir}
    task = build(**{name: value for name, value in given.items() if name in wanted})
    if not isinstance(task, Task):
        raise ConfigError(f"workload: {place}: expected it to return a memfit.Task, got {type(task).__name__}.")
    return CustomWorkload(task, model)


def _import(place: str) -> tuple[Any, Callable[..., Any]]:
    name, function = place.split(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"workload: {place}: {error}. Start memfit in the folder that holds {name}.") from error
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"workload: {place}: {name} has no function {function!r}.")
    return module, getattr(module, function)


class CustomWorkload:
    """A Task behind the interface of workloads."""

    def __init__(self, task: Task, model: Mapping[str, Any]) -> None:
        self.task, self.model = task, model
        self.blocks = task.blocks
        self.targets = [name for name in task.splits["train"] if name not in task.inputs]

    def variants(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return model builders by name, the wanted one first."""
        return variant_builders(self.model, lambda settings: self.task.model(**settings))

    def num_samples(self, split: str) -> int:
        """Count the samples of a split."""
        return len(self.task.splits[split][self.task.inputs[0]])

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        """Cut a batch of samples, as tensors of their own."""
        batch = {name: torch.from_numpy(np.array(array[indices])) for name, array in self.task.splits[split].items()}
        return self.task.augment(batch) if split == "train" else batch

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return a sum per term; a mean becomes the sum of the term "loss"."""
        found = self.task.loss(model, batch)
        return found if isinstance(found, Mapping) else {"loss": found * self._size(batch)}

    def count(self, batch: Batch) -> Mapping[str, float]:
        """Return how much each term counts; nothing where the task does not say: samples."""
        return self.task.count(batch) if self.task.count is not None else {}

    def _size(self, batch: Batch) -> int:
        return len(batch[self.task.inputs[0]])

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return predictions, one row per sample."""
        return dict(self.task.predict(model, *(batch[name] for name in self.task.inputs)))

    def truth(self, split: str, indices: np.ndarray) -> Arrays:
        """Return the targets."""
        return {name: np.asarray(self.task.splits[split][name][indices]) for name in self.targets}

    def score(self, truth: Arrays, predictions: Arrays) -> dict[str, float | None]:
        """Return the task's metrics."""
        scores = self.task.score(truth, predictions)
        return {name: None if value is None else float(value) for name, value in scores.items()}

    def baselines(self, split: str) -> dict[str, Arrays]:
        """Return the predictions of the task's trivial models."""
        return dict(self.task.baselines(self.task.splits["train"], self.task.splits[split]))

    def inference_module(self, model: nn.Module) -> nn.Module:
        """Wrap a model for consumers: inputs in order in, predictions in order out."""
        return CustomInference(model, self.task.predict)

    def export(self, samples: int) -> ExportSpec:
        """Describe inputs by the arrays' shapes, outputs by what the model predicts for some test rows."""
        arrays = {name: np.array(self.task.splits["test"][name][-samples:]) for name in self.task.inputs}
        model = next(iter(self.variants().values()))().eval()
        with torch.no_grad():
            outputs = self.task.predict(model, *(torch.from_numpy(array) for array in arrays.values()))
        return ExportSpec(
            inputs=[_entry(name, array) for name, array in arrays.items()],
            outputs=[_entry(name, tensor.numpy()) for name, tensor in outputs.items()],
            sample_inputs=arrays,
            card={},
            support_files={},
        )

    def describe(self) -> dict[str, Any]:
        """Return the task's facts."""
        return {"unit": "", **self.task.facts}


class CustomInference(nn.Module):
    """A user's model as a consumer calls it."""

    def __init__(self, model: nn.Module, predict: Callable[..., Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.predict = model, predict

    def forward(
        self, first: Tensor, second: Tensor | None = None, third: Tensor | None = None, fourth: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Map the inputs to the predictions, both in the task's order."""
        given = [tensor for tensor in (first, second, third, fourth) if tensor is not None]
        return tuple(self.predict(self.model, *given).values())


def _entry(name: str, array: np.ndarray) -> dict[str, Any]:
    shape = ["batch", *array.shape[1:]]
    return {"name": name, "shape": shape, "dtype": str(array.dtype), "unit": "", "description": ""}
