"""Does onnxruntime give what torch gives: on real rows, at several batch sizes, within stated tolerances?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from memfit.errors import ExportError
from memfit.export.graph import EXAMPLE_BATCH
from memfit.export.infer import BATCH_ROWS, CPU, ORT_ERRORS, MismatchError, compare, join_batches, split_batch
from memfit.export.model_file import check_model_file
from memfit.export.signature import Array, Signature, documents, named_sizes

Tolerances = dict[str, dict[str, float]]

DEFAULT_RTOL = 1e-5
DEFAULT_ATOL_SHARE = 1e-5
MIN_ROWS = 4


def run_torch(
    module: nn.Module, inputs: Sequence[Signature], outputs: Sequence[Signature], arrays: Mapping[str, Array]
) -> dict[str, Array]:
    """Run the module on numpy inputs, a few rows at a time. Raises ExportError on NaN or a wrong count."""
    parts = [
        run_torch_batch(module, inputs, outputs, batch) for batch in split_batch(documents(inputs), arrays, BATCH_ROWS)
    ]
    named = join_batches(documents(outputs), parts)
    unfit = [name for name, array in named.items() if array.dtype.kind == "f" and np.isnan(array).any()]
    if unfit:
        raise ExportError(f"torch gives NaN in {unfit} on the sample rows; look at the weights and the inputs")
    return named


def run_torch_batch(
    module: nn.Module, inputs: Sequence[Signature], outputs: Sequence[Signature], arrays: Mapping[str, Array]
) -> dict[str, Array]:
    """Run the module once and name its outputs."""
    with torch.no_grad():
        results = module(*(torch.from_numpy(np.array(arrays[spec.name])) for spec in inputs))
    if not isinstance(results, tuple) or len(results) != len(outputs):
        got = f"{len(results)} values" if isinstance(results, tuple) else type(results).__name__
        raise ExportError(f"the module must return a tuple of {[spec.name for spec in outputs]}, got {got}")
    return {spec.name: result.numpy() for spec, result in zip(outputs, results, strict=True)}


def state_tolerances(expected: Mapping[str, Array], given: Mapping[str, float] | None) -> Tolerances:
    """Return {"atol", "rtol"} per output.

    given: {"atol", "rtol"} for all outputs, atol in their units. Without it rtol is 1e-5 and atol 1e-5 of the output's
    largest finite magnitude over the sample rows: rounding grows with the scale of the user's unit.
    """
    if given is not None:
        if set(given) != {"atol", "rtol"} or min(given.values()) < 0:
            raise ExportError(f"tolerances: expected 'atol' and 'rtol', both >= 0, got {dict(given)}")
        return {name: dict(given) for name in expected}
    return {
        name: {"atol": DEFAULT_ATOL_SHARE * (largest_magnitude(array) or 1.0), "rtol": DEFAULT_RTOL}
        for name, array in expected.items()
    }


def largest_magnitude(array: Array) -> float:
    """Return the largest finite absolute value, 0 where there is none."""
    return float(np.abs(array[np.isfinite(array)].astype(np.float64)).max(initial=0.0))


def parity_sizes(sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """List the shapes to try: batches of 1, 3 and up to 8; other named dimensions at 3/4, half and whole."""
    rows = sizes["batch"]
    if rows < MIN_ROWS:
        raise ExportError(f"sample inputs: expected at least {MIN_ROWS} rows, got {rows}; give more real rows")
    shares = {1: 0.75, 3: 0.5, min(rows, BATCH_ROWS): 1.0}
    assert EXAMPLE_BATCH not in shares
    return [
        {dim: batch if dim == "batch" else max(1, round(size * share)) for dim, size in sizes.items()}
        for batch, share in shares.items()
    ]


def check_parity(
    path: Path,
    module: nn.Module,
    *,
    inputs: Sequence[Signature],
    outputs: Sequence[Signature],
    sample_inputs: Mapping[str, Array],
    expected: Mapping[str, Array],
    tolerances: Tolerances,
) -> dict[str, Any]:
    """Compare the ONNX file with the module: on all sample rows, and on a few in smaller batches.

    expected: `run_torch` of sample_inputs. Returns {"provider", "num_rows", "batches": [{"sizes", "num_rows",
    "outputs": {name: figures}}]}; the figures are `infer.compare`'s. Raises ExportError where `check_model_file`
    refuses the file, and with the figures where an output is beyond its tolerance.
    """
    session = open_session(path)
    *smaller, largest = parity_sizes(named_sizes(inputs, sample_inputs))
    batches = []
    for sizes in smaller:
        arrays = {spec.name: spec.resize(sample_inputs[spec.name], sizes) for spec in inputs}
        wanted = run_torch(module, inputs, outputs, arrays)
        got = run_session(session, outputs, arrays, sizes)
        batches.append(measure_all(wanted, got, tolerances, sizes, sizes["batch"]))
    rows = split_batch(documents(inputs), sample_inputs, largest["batch"])
    got = join_batches(documents(outputs), [run_session(session, outputs, arrays, largest) for arrays in rows])
    num_rows = named_sizes(inputs, sample_inputs)["batch"]
    batches.append(measure_all(expected, got, tolerances, largest, num_rows))
    return {"provider": session.get_providers()[0], "num_rows": num_rows, "batches": batches}


def measure_all(
    expected: Mapping[str, Array],
    got: Mapping[str, Array],
    tolerances: Tolerances,
    sizes: Mapping[str, int],
    num_rows: int,
) -> dict[str, Any]:
    """Compare every output at one batch size and return the card's entry."""
    figures = {name: measure(name, expected[name], got[name], tolerances[name], sizes) for name in expected}
    return {"sizes": dict(sizes), "num_rows": num_rows, "outputs": figures}


def open_session(path: Path) -> Any:
    """Check an ONNX file, open it on the CPU, and make sure that it is the CPU."""
    check_model_file(path)
    try:
        session = onnxruntime.InferenceSession(path, providers=[CPU])
    except ORT_ERRORS as error:
        raise ExportError(f"onnxruntime does not load the exported graph: {error}") from error
    if session.get_providers()[0] != CPU:
        raise ExportError(f"parity: expected {CPU}, onnxruntime runs {session.get_providers()}")
    return session


def run_session(
    session: Any, outputs: Sequence[Signature], arrays: Mapping[str, Array], sizes: Mapping[str, int]
) -> dict[str, Array]:
    """Run onnxruntime; a shape that the graph froze shows here."""
    names = [spec.name for spec in outputs]
    try:
        results = session.run(names, {name: np.ascontiguousarray(array) for name, array in arrays.items()})
    except ORT_ERRORS as error:
        raise ExportError(f"onnxruntime fails at {dict(sizes)}; the trace froze a dimension: {error}") from error
    return dict(zip(names, results, strict=True))


def measure(
    name: str, expected: Array, got: Array, tolerance: Mapping[str, float], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Compare one output, or raise ExportError with the figures."""
    try:
        figures = compare(expected, got, **tolerance)
    except MismatchError as error:
        raise ExportError(f"parity: output '{name}' at {dict(sizes)}: {error}") from error
    if not figures["within"]:
        raise ExportError(
            f"parity: output '{name}' at {dict(sizes)} differs from torch by {figures['max_absolute']:.3g} "
            f"(relative {figures['max_relative']:.3g}), {figures['tolerance_used']:.3g} times what atol "
            f"{tolerance['atol']:.3g} + rtol {tolerance['rtol']:.3g} allows; the export is wrong, or state wider "
            "tolerances if the model's precision calls for it"
        )
    return figures
