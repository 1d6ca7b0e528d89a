"""The bundle that a service consumes: model, card, golden inputs and outputs, and code that runs them."""

import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from memfit.export.graph import export_graph
from memfit.export.parity import check_parity, run_torch, state_tolerances
from memfit.export.signature import Array, Signature, bind_samples
from memfit.files import sha256_file, write_json, write_text

SCHEMA = 1
CARD_NAME = "model_card.json"
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
NEEDED_TO_RUN = ("numpy", "onnxruntime")
WRITTEN_KEYS = ("schema", "signature", "tolerances", "parity", "files", "opset", "ir_version", "versions")
BUNDLE_FILES = ("model.onnx", CARD_NAME, "infer.py", "requirements.txt", "sample_inputs.npz", "expected_outputs.npz")


def export_bundle(
    out_dir: Path,
    module: nn.Module,
    *,
    inputs: list[Signature],
    outputs: list[Signature],
    sample_inputs: dict[str, Array],
    card: dict[str, Any],
    support_files: dict[str, Path],
    tolerances: dict[str, float] | None = None,
    opset: int = 20,
    requirements: Sequence[str] = (),
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Export `module` into `out_dir` and return the model card; an earlier bundle there is replaced at the end.

    module: takes the inputs positionally in signature order, in the user's units, and returns a tuple in the outputs'
    order; it is put into eval mode, on the CPU. sample_inputs: at least 4 real rows. tolerances: {"atol", "rtol"} for
    every output, or None (see `state_tolerances`). card: what the caller knows (name, metrics, hashes, plan, created,
    sections such as "series"). support_files: name in the bundle -> file to copy. requirements: further lines.
    Call it in a fresh child process. Raises ExportError; `out_dir` is then as it was.
    """
    say = on_progress or (lambda _: None)
    check_request(card, support_files)
    module = module.eval().cpu()
    samples = bind_samples(inputs, sample_inputs)
    with replace_directory(out_dir, marker=CARD_NAME) as folder:
        path = folder / "model.onnx"
        say("graph")
        graph = export_graph(
            module, path, inputs=inputs, outputs=outputs, sample_inputs=samples, opset=opset
        )
        say("parity")
        expected = run_torch(module, inputs, outputs, samples)
        stated = state_tolerances(expected, tolerances)
        parity = check_parity(
            path, module, inputs=inputs, outputs=outputs, sample_inputs=samples, tolerances=stated
        )
        say("files")
