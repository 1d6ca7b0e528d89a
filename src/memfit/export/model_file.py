"""An ONNX file, checked before onnxruntime opens it: what it is, what it uses, and where its weights lie."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from memfit.errors import ExportError
from memfit.export.infer import MAX_MODEL_BYTES

MIN_OPSET = 7
"""The oldest operator set that onnxruntime vouches for."""
DOMAINS = ("", "ai.onnx")


def check_model_file(path: Path) -> None:
    """Check an ONNX file, wherever it comes from. It is parsed and not run, and no weights outside it are read.

    Raises: ExportError for a file that is too large or no ONNX model, of an unknown version, with operators other than
    ONNX's own or functions of its own, with weights outside its folder, or that onnx.checker refuses.
    """
    num_bytes = path.stat().st_size
    if num_bytes > MAX_MODEL_BYTES:
        raise ExportError(f"{path}: expected at most {MAX_MODEL_BYTES} bytes, what one protobuf holds, got {num_bytes}")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ExportError(f"{path} does not load: it is no ONNX model ({error}). Export it again") from error
    _check_versions(path, model)
    _check_operators(path, model)
    del model  # the checker reads the file: a copy less of the weights
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path}: onnx.checker refuses the graph: {error}") from error


def _check_versions(path: Path, model: Any) -> None:
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    newest = onnx.defs.onnx_opset_version()
    foreign = sorted(set(opsets) - set(DOMAINS))
    if foreign:
        raise ExportError(f"{path}: expected ONNX's own operators alone, got operator sets of {foreign}")
    if not opsets or not all(MIN_OPSET <= version <= newest for version in opsets.values()):
        raise ExportError(f"{path}: expected an opset from {MIN_OPSET} to {newest}, got {opsets}. Convert it")
    if not 1 <= model.ir_version <= onnx.IR_VERSION:
        raise ExportError(f"{path}: expected an IR version up to {onnx.IR_VERSION}, got {model.ir_version}. Convert it")


def _check_operators(path: Path, model: Any) -> None:
    if len(model.functions):
        names = [function.name for function in model.functions][:3]
        raise ExportError(f"{path}: expected no functions of its own, got {names}. Inline them")
    for node in _nodes(model.graph):
        if node.domain not in DOMAINS:
            raise ExportError(f"{path}: expected ONNX's own operators alone, got {node.domain}:{node.op_type}")


def _nodes(graph: Any) -> Iterator[Any]:
    """Walk a graph's nodes, and those of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
