"""What a stage takes over from the one before, or from where training starts: weights, and the optimizer's moments."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from memfit.errors import CheckpointError, ConfigError
from memfit.files import sha256_file
from memfit.starting_point import StartingPoint, starting_point
from memfit.workloads.base import Growing, Role, Workload

ROLES: dict[str, Role] = {
    "exp_avg": "moment",
    "momentum_buffer": "moment",
    "exp_avg_sq": "square",
    "max_exp_avg_sq": "square",
    "square_avg": "square",
}
"""What torch's optimizers keep for each entry of a parameter."""


class Inheritance:
    """The weights and moments of a starting point, carried over to a model that may be larger."""

    def __init__(self, path: str, workload: Workload, model: nn.Module, settings: Mapping[str, Any]) -> None:
        self._start, self._workload, self._model = starting_point(path), workload, model
        self._settings = dict(settings)

    @property
    def changed(self) -> bool:
        """Whether the model's settings differ from those of the starting point."""
        before = self._start.model
        return bool(before) and before != self._settings

    def weights(self) -> None:
        """Load the weights into the model.

        Raises: CheckpointError for a torn file; ConfigError for weights of another model.
        """
        self._load(self._carried(_read(self._start), "weight"))

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        try:
            self._model.load_state_dict(dict(weights))
        except RuntimeError as error:
            raise ConfigError(
                f"start: the weights in {self._start.weights} are of another model: {str(error)[:600]}. Set the model "
                "as it was when they were trained."
            ) from error

    def _carried(self, tensors: Mapping[str, Tensor], role: Role) -> Mapping[str, Tensor]:
        if not (self.changed and isinstance(self._workload, Growing)):
            return tensors
        return self._workload.carry(tensors, self._start.model, self._model, role)

    def moments(self, optimizer: torch.optim.Optimizer) -> int:
        """Give the optimizer the moments of the parameters that it goes on with; return of how many.

        An optimizer that keeps other figures begins anew.
        """
        if self._start.state is None:
            return 0
        state = torch.load(self._start.state, map_location="cpu", weights_only=True)
        before = _states_by_name(state) if state.get("optimizer_kind") == type(optimizer).__name__ else {}
        entries = {entry for values in before.values() for entry in values} - {"step"}
        if not entries <= ROLES.keys():
            return 0
        names = {parameter: name for name, parameter in self._model.named_parameters()}
        carried = {
            entry: self._carried(
                {name: values[entry] for name, values in before.items() if entry in values}, ROLES[entry]
            )
            for entry in entries
        }
        count = 0
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            name = names[parameter]
            if name in before and all(name in tensors for tensors in carried.values()):
                moments = {entry: tensors[name].to(parameter) for entry, tensors in carried.items()}
                step = {"step": before[name]["step"].clone()} if "step" in before[name] else {}
                optimizer.state[parameter] = {**step, **moments}
                count += 1
        return count


def _read(start: StartingPoint) -> dict[str, Tensor]:
    if (got := sha256_file(start.weights)) != start.sha256:
        raise CheckpointError(f"{start.weights}: expected sha256 {start.sha256[:12]}…, got {got[:12]}…: it is corrupt.")
    return dict(load_file(start.weights))


def _states_by_name(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name a captured optimizer's states, which count parameters in the order of its groups."""
    numbers = [number for group in state["optimizer"]["param_groups"] for number in group["params"]]
    names = dict(zip(numbers, state.get("parameters", ()), strict=False))
    return {names[number]: values for number, values in state["optimizer"]["state"].items() if number in names}
