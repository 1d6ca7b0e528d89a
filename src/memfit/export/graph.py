"""From an nn.Module to one ONNX file: dynamic batch, checked, without a trace of the machine it was made on."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from memfit.errors import ExportError
from memfit.export.infer import MAX_MODEL_BYTES
from memfit.export.signature import Array, Signature, named_sizes

PROTOBUF_LIMIT_BYTES = MAX_MODEL_BYTES
EXAMPLE_BATCH = 2  # a batch of 1 would be taken for a constant


@dataclass(frozen=True)
class Graph:
    """What the written file is."""

    opset: int
    ir_version: int
    num_bytes: int


def export_graph(
    module: nn.Module,
    path: Path,
    *,
    inputs: Sequence[Signature],
    outputs: Sequence[Signature],
    sample_inputs: Mapping[str, Array],
    opset: int = 20,
) -> Graph:
    """Write `module` as one ONNX file at `path`; `check_parity` checks it before it is run. Raises ExportError.

    Call it in a child process, once: the exporter keeps state, and a later export of a recurrent net can silently
    come out with a fixed length. sample_inputs: at least two rows, bound to `inputs` (see `bind_samples`).
    """
    refuse_oversize(module)
    example = example_arrays(inputs, sample_inputs)
    model = trace(module, inputs, outputs, example, opset)
    strip(model)
    check_signature(model, inputs, outputs)
    check_self_contained(model, opset)
    return Graph(opset=opset, ir_version=model.ir_version, num_bytes=path.write_bytes(model.SerializeToString()))


def refuse_oversize(module: nn.Module) -> None:
    """Raise ExportError where the weights alone pass what one protobuf file can hold."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if num_bytes > PROTOBUF_LIMIT_BYTES:
        raise ExportError(
            f"the weights are {num_bytes / 2**30:.2f} GiB; one ONNX file holds at most "
            f"{PROTOBUF_LIMIT_BYTES / 2**30:.2f} GiB. Export a smaller variant or half precision"
        )


def example_arrays(inputs: Sequence[Signature], samples: Mapping[str, Array]) -> dict[str, Array]:
    """Cut the samples to the batch that is traced; the other named dimensions keep their size."""
    sizes = named_sizes(inputs, samples)
    small = [dim for dim, size in sizes.items() if size < 2]
    if "batch" not in sizes or small:
        raise ExportError(f"sample inputs: every named dimension must be there and >= 2 (batch too), got {sizes}")
    sizes["batch"] = EXAMPLE_BATCH
    return {spec.name: spec.resize(samples[spec.name], sizes) for spec in inputs}


def trace(
    module: nn.Module,
    inputs: Sequence[Signature],
    outputs: Sequence[Signature],
    example: Mapping[str, Array],
    opset: int,
) -> Any:
    """Run torch's exporter and return the ModelProto."""
    dims = {name: torch.export.Dim(name, min=1) for name in named_sizes(inputs, example)}
    shapes = tuple({i: dims[dim] for i, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in inputs)
    try:
        with quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(torch.from_numpy(example[spec.name].copy()) for spec in inputs),
                dynamo=True,
                opset_version=opset,
                external_data=False,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip()
        raise ExportError(f"torch.onnx.export failed on {type(module).__name__}: {cause}") from error
    assert program is not None
    return program.model_proto


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says on every run and nobody can act on."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # "torchvision is not installed": memfit does not need it
    try:
        with warnings.catch_warnings():
            # torch copies its own pytree specs through a deprecated name.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            # Several inputs share "batch" by intention; check_signature sees to the names.
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used", UserWarning)
            yield
    finally:
        registration.setLevel(level)


def strip(model: Any) -> None:
    """Remove stack traces, paths, source lines and inferred shapes: they name the machine, or are derived."""
    strip_message(model)
    # Readers infer these again; left in, they break the quantizer ("inferred shape and existing shape differ").
    del model.graph.value_info[:]


def strip_message(message: Any) -> None:
    """Clear `metadata_props` and `doc_string` here and in every message below."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif hasattr(value, "ListFields"):
            strip_message(value)
        elif field.message_type is not None:
            for item in value:
                strip_message(item)


def check_signature(model: Any, inputs: Sequence[Signature], outputs: Sequence[Signature]) -> None:
    """Raise ExportError unless names, order, dtypes, sizes and symbolic dimensions are the signature's."""
    for kind, specs, values in (("inputs", inputs, model.graph.input), ("outputs", outputs, model.graph.output)):
        wanted = [(spec.name, spec.dtype, list(spec.shape)) for spec in specs]
        got = [(value.name, *tensor_type(value)) for value in values]
        if wanted != got:
            raise ExportError(
                f"{kind} of the exported graph: expected {wanted}, got {got}; a number in place of a name is a "
                "dimension that the trace froze, and a wrong name or dtype is a signature that does not fit the module"
            )


def tensor_type(value: Any) -> tuple[str, list[int | str | None]]:
    """Return the dtype's name and the shape of a graph's input or output."""
    kind = value.type.tensor_type
    dims = [
        d.dim_param if d.HasField("dim_param") else d.dim_value if d.HasField("dim_value") else None
        for d in kind.shape.dim
    ]
    return str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), dims


def check_self_contained(model: Any, opset: int) -> None:
    """Raise ExportError unless the graph uses standard operators of `opset` only and holds all its weights."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": opset}:
        raise ExportError(f"operator sets: expected {{'': {opset}}} alone, got {opsets}; rewrite the unusual operator")
    external = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if external:
        raise ExportError(f"weights outside the file: {external[:3]} (of {len(external)}); expected one file")
    if model.ByteSize() > PROTOBUF_LIMIT_BYTES:
        raise ExportError(f"the graph takes {model.ByteSize()} bytes; one file holds {PROTOBUF_LIMIT_BYTES}")
