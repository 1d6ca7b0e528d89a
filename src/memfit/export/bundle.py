"""The bundle that a service consumes: model, card, golden inputs and outputs, and code that runs them."""

import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import memfit
from memfit.errors import ExportError
from memfit.export import infer
from memfit.export.directory import replace_directory
from memfit.export.graph import Graph, export_graph
from memfit.export.parity import check_parity, run_torch, state_tolerances
from memfit.export.signature import Array, Signature, bind_samples, documents
from memfit.files import sha256_file, write_json, write_text

CARD_NAME = "model_card.json"
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
NEEDED_TO_RUN = ("numpy", "onnxruntime")
OWN_FILES = ("model.onnx", CARD_NAME, "infer.py", "requirements.txt", "sample_inputs.npz", "expected_outputs.npz")
OWN_KEYS = ("schema", "signature", "tolerances", "parity", "files", "opset", "ir_version", "versions")


def export_bundle(
    out_dir: Path,
    module: nn.Module,
    *,
    inputs: Sequence[Signature],
    outputs: Sequence[Signature],
    sample_inputs: Mapping[str, Array],
    card: Mapping[str, Any],
    support_files: Mapping[str, Path],
    tolerances: Mapping[str, float] | None = None,
    opset: int = 20,
    requirements: Sequence[str] = (),
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Export `module` into `out_dir` and return the model card; a bundle that is there is replaced at the end.

    module: takes the inputs positionally in signature order, in the user's units, and returns a tuple in the
    outputs' order; it is put into eval mode and on the CPU. sample_inputs: at least 4 real rows. tolerances:
    {"atol", "rtol"} or None, see `state_tolerances`. card: "name" and all else the caller knows
    (metrics, hashes, plan, "series"...). support_files: name in the bundle -> file to copy. requirements: further
    lines. on_progress: called with the phase. Call it in a fresh child process (see `export_graph`). Raises
    ExportError, and `out_dir` is then as it was.
    """
    say = on_progress or (lambda _: None)
    check_request(card, support_files)
    samples = bind_samples(inputs, sample_inputs)
    module = module.eval().cpu()
    with replace_directory(out_dir, marker=CARD_NAME) as folder:
        model = folder / "model.onnx"
        say("graph")
        graph = export_graph(module, model, inputs=inputs, outputs=outputs, sample_inputs=samples, opset=opset)
        say("parity")
        expected = run_torch(module, inputs, outputs, samples)
        stated = state_tolerances(expected, tolerances)
        parity = check_parity(
            model,
            module,
            inputs=inputs,
            outputs=outputs,
            sample_inputs=samples,
            expected=expected,
            tolerances=stated,
        )
        say("files")
        np.savez(folder / "sample_inputs.npz", allow_pickle=False, **samples)
        np.savez(folder / "expected_outputs.npz", allow_pickle=False, **expected)
        copy_code(folder, support_files, requirements)
        signature = {"inputs": documents(inputs), "outputs": documents(outputs)}
        checked = {"signature": signature, "tolerances": stated, "parity": parity}
        written = write_card(folder, card, checked, graph)
        say("check")
        check_as_shipped(folder)
    return written


def check_request(card: Mapping[str, Any], support_files: Mapping[str, Path]) -> None:
    """Raise ExportError for a card or support files that the bundle cannot take."""
    if not card.get("name"):
        raise ExportError("card: expected a 'name' for the model, got none")
    taken = sorted(set(card) & set(OWN_KEYS))
    if taken:
        raise ExportError(f"card: {taken} are written by the export; leave them out")
    for name, path in support_files.items():
        if name in OWN_FILES or not infer.is_plain(name):
            raise ExportError(f"support file '{name}': expected a plain name other than {list(OWN_FILES)}")
        if not path.is_file():
            raise ExportError(f"support file '{name}': {path} is not there")


def copy_code(folder: Path, support_files: Mapping[str, Path], requirements: Sequence[str]) -> None:
    """Put infer.py, the support files and requirements.txt, pinned to what was tested, into the bundle."""
    shutil.copyfile(infer.__file__, folder / "infer.py")
    for name, path in support_files.items():
        shutil.copyfile(path, folder / name)
    pinned = [f"{library}=={version(library)}" for library in NEEDED_TO_RUN]
    write_text(folder / "requirements.txt", "\n".join([*pinned, *requirements]) + "\n")


def write_card(folder: Path, card: Mapping[str, Any], checked: Mapping[str, Any], graph: Graph) -> dict[str, Any]:
    """Write model_card.json last: it holds the hash of every other file."""
    files = {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())
    }
    versions = {library: version(library) for library in LIBRARIES}
    document: dict[str, Any] = {
        "schema": 1,
        "name": card["name"],
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        **card,
        **checked,
        "opset": graph.opset,
        "ir_version": graph.ir_version,
        "versions": {"memfit": memfit.__version__, "python": platform.python_version(), **versions},
        "files": files,
    }
    try:
        write_json(folder / CARD_NAME, document)
    except (TypeError, ValueError) as error:
        raise ExportError(f"card: {error}; use plain JSON values, and null for a figure that is undefined") from error
    return document


def check_as_shipped(folder: Path) -> None:
    """Load the finished bundle with the shipped code and let it check itself."""
    try:
        infer.Model(folder).check()
    except (infer.BundleError, infer.InputError, infer.MismatchError) as error:
        raise ExportError(f"the finished bundle fails its own check: {error}") from error
