"""A model's layers as their health is told: what belongs to each, how its weights spread, its recurrent matrices."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

MAX_SINGULAR_WORK = 2**30
"""Largest sum of width ** 3 over the matrices whose singular values are taken: one 1024 wide, or eight of 512."""
GATES = {1: ("hidden",), 3: ("reset", "update", "new"), 4: ("input", "forget", "cell", "output")}
"""Of an RNN, a GRU and an LSTM, in the order in which torch stacks them."""
_EVEN = 1e-6
"""A variance below this share of the squared mean counts as none: it is rounding of the norm that it is taken from."""
_LAYER_OF_RNN = re.compile(r"_l(\d+)(_reverse)?$")
_SCALE = ".original0"
"""How torch's weight norm names the lengths of a kernel's rows, which lie beside the rows themselves."""
_NO_UNITS = (nn.Embedding, nn.EmbeddingBag, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Modules whose rows are not outputs: tokens, or inputs."""


@dataclass(frozen=True)
class Weight:
    """A parameter that is trained."""

    parameter: nn.Parameter
    num_units: int
    """Rows of a matrix or a kernel, each of which makes one output; 0 for what has no such rows."""
    is_bias: bool = False

    def rows(self) -> Tensor:
        """Return the norms of the gradient's rows, [num_units]; where it has none, what has the norm of the gradient.

        A row whose entries are all below 1e-23 has the norm 0 in single precision.
        """
        gradient, num_rows = self.parameter.grad, max(self.num_units, 1)
        if gradient is None:
            return torch.zeros(num_rows, device=self.parameter.device)
        if gradient.is_sparse:  # of an embedding: the rows that it lacks are tokens that did not occur
            norm: Tensor = torch.linalg.vector_norm(gradient.coalesce().values()).float()
            return (norm / math.sqrt(num_rows)).repeat(num_rows)
        if not self.num_units:
            return gradient
        norms: Tensor = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.dim())))
        return norms.float()


@dataclass
class Layer:
    """The trained parameters of one module, or of one layer of a recurrent module of several."""

    name: str
    weights: list[Weight] = field(default_factory=list)

    @property
    def num_units(self) -> int:
        """Count the rows of all its matrices."""
        return sum(weight.num_units for weight in self.weights)


def layers_of(model: nn.Module) -> list[Layer]:
    """Group the parameters that are trained by the module that owns them, in the model's order."""
    layers: dict[str, Layer] = {}
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad and parameter.is_floating_point() and parameter.numel()):
            continue
        owner = _owner(name)
        module, leaf = model.get_submodule(owner), name[len(owner) :]
        rows = "weight" in leaf and parameter.dim() > 1 and not leaf.endswith(_SCALE)
        label = owner or "(model)"
        if isinstance(module, nn.RNNBase) and module.num_layers > 1 and (found := _LAYER_OF_RNN.search(leaf)):
            label = f"{owner}.l{found[1]}"
        num_units = len(parameter) if rows and not isinstance(module, _NO_UNITS) else 0
        layers.setdefault(label, Layer(label)).weights.append(Weight(parameter, num_units, "bias" in leaf))
    return list(layers.values())


def _owner(name: str) -> str:
    """Return the path of the module that a parameter belongs to, not that of a parametrization inside it."""
    path, parametrized, _ = f".{name}".partition(".parametrizations.")
    return (path if parametrized else path.rpartition(".")[0])[1:]


@torch.no_grad()
def weight_figures(layers: Sequence[Layer]) -> list[dict[str, float]]:
    """Return weight_norm, mean, std, min and max per layer and, last, of them all; NaN and infinity stay.

    All but the norm are of the weights alone, where there are others than biases. Takes one parameter at a time and
    copies none: the spread comes from the norm.
    """
    weights = [weight for layer in layers for weight in layer.weights]
    parameters: list[Tensor] = [weight.parameter for weight in weights]
    if not weights:
        return [_joined([])]
    extremes = [extreme for parameter in parameters for extreme in torch.aminmax(parameter)]
    found = [*torch._foreach_norm(parameters), *(parameter.mean() for parameter in parameters), *extremes]
    figures = torch.stack([figure.float() for figure in found]).tolist()
    count = len(weights)
    rows = list(zip(weights, figures, figures[count:], figures[2 * count :: 2], figures[2 * count + 1 :: 2]))
    rest = iter(rows)
    return [*(_joined(list(islice(rest, len(layer.weights)))) for layer in layers), _joined(rows)]


def _joined(rows: Sequence[tuple[Weight, float, float, float, float]]) -> dict[str, float]:
    """Join the figures of parameters: norm, mean, min and max of each."""
    norm = math.sqrt(sum(row[1] ** 2 for row in rows))
    if not rows or not math.isfinite(norm):
        return {"weight_norm": norm if rows else math.nan, **dict.fromkeys(("mean", "std", "min", "max"), math.nan)}
    chosen = [row for row in rows if not row[0].is_bias] or rows
    count = sum(weight.parameter.numel() for weight, *_ in chosen)
    mean = sum(weight.parameter.numel() * own for weight, _, own, *_ in chosen) / count
    variance = sum(own**2 for _, own, *_ in chosen) / count - mean**2
    variance = 0.0 if variance < _EVEN * mean**2 else variance
    low, high = min(row[3] for row in chosen), max(row[4] for row in chosen)
    return {"weight_norm": norm, "mean": mean, "std": math.sqrt(variance), "min": low, "max": high}


@torch.no_grad()
def recurrent_singular_values(model: nn.Module) -> dict[str, dict[str, list[float]]]:
    """Return [largest, median, smallest] singular value per recurrent matrix and gate, on the host.

    Matrices beyond `MAX_SINGULAR_WORK` are left out. One that is not finite has NaNs.
    """
    found: dict[str, dict[str, list[float]]] = {}
    work = 0
    for name, gates, matrix in _recurrent_matrices(model):
        work += len(gates) * max(len(matrix) // len(gates), matrix.shape[1]) ** 3
        if work <= MAX_SINGULAR_WORK:
            parts = zip(gates, matrix.chunk(len(gates)), strict=True)
            found[name] = {gate: _singular_values(part) for gate, part in parts}
    return found


def _recurrent_matrices(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], nn.Parameter]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            for leaf, parameter in module.named_parameters(recurse=False):
                gates = GATES.get(len(parameter) // module.hidden_size)
                if leaf.startswith("weight_hh") and parameter.requires_grad and gates:
                    yield f"{path}.{leaf}".lstrip("."), gates, parameter


def _singular_values(matrix: Tensor) -> list[float]:
    values = matrix.detach().float().cpu()
    if not torch.isfinite(values).all():
        return [math.nan] * 3
    try:
        singular = torch.linalg.svdvals(values)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # did not converge
        return [math.nan] * 3
    return [float(singular[0]), float(singular.median()), float(singular[-1])]
