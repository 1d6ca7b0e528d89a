"""What a model takes and gives: names, shapes, dtypes and units, the same in torch, ONNX and the card."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from memfit.errors import ExportError
from memfit.export.infer import InputError, bind_inputs

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Signature:
    """One input or output of a model."""

    name: str
    """Its name in the ONNX graph, the card and `Model.predict`."""
    shape: tuple[int | str, ...]
    """Sizes; a name ("batch", "time") is a dimension of any size >= 1. Lists are accepted."""
    dtype: str = "float32"
    """A numpy dtype's name."""
    unit: str = ""
    """The unit of its values, as the user writes it."""
    description: str = ""
    """One sentence for the person who calls the model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    def document(self) -> dict[str, Any]:
        """Return the card's entry."""
        return asdict(self) | {"shape": list(self.shape)}

    def resize(self, array: Array, sizes: Mapping[str, int]) -> Array:
        """Keep the first `sizes[name]` entries along every named dimension."""
        return array[tuple(slice(sizes[d] if isinstance(d, str) else d) for d in self.shape)]


def documents(signature: Sequence[Signature]) -> list[dict[str, Any]]:
    """Return the card's entries."""
    return [spec.document() for spec in signature]


def bind_samples(inputs: Sequence[Signature], samples: Mapping[str, Array]) -> dict[str, Array]:
    """Check sample inputs as the shipped infer.py would, in signature order. Raises ExportError."""
    try:
        return bind_inputs(documents(inputs), samples)
    except InputError as error:
        raise ExportError(f"sample inputs: {error}") from error


def named_sizes(inputs: Sequence[Signature], arrays: Mapping[str, Array]) -> dict[str, int]:
    """Return the size of every named dimension, in order of first appearance."""
    return {
        dim: size
        for spec in inputs
        for dim, size in zip(spec.shape, arrays[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }
