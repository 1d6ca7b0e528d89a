import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from memfit.errors import ExportError
from memfit.export.bundle import check_request


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bundle_holds_exactly_the_promised_files(series_export):
    folder, said = series_export
    names = {"model.onnx", "model_card.json", "infer.py", "features.py", "requirements.txt"}
    assert {path.name for path in folder.iterdir()} == names | {"sample_inputs.npz", "expected_outputs.npz"}
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    assert said["phases"] == ["graph", "parity", "files", "check"]


def test_card_is_what_was_returned_and_hashes_every_other_file(series_export):
    folder, said = series_export
    card = json.loads((folder / "model_card.json").read_text())
    assert card == said["card"]
    assert set(card["files"]) == {path.name for path in folder.iterdir()} - {"model_card.json"}
    for name, known in card["files"].items():
        content = (folder / name).read_bytes()
        assert known == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert card["opset"] == 20
    assert card["metrics"] == {"mae": 1.25}
    assert card["signature"]["inputs"][0] == {
        "name": "history",
        "shape": ["batch", 12],
        "dtype": "float32",
        "unit": "hPa",
        "description": "The newest values, oldest first.",
    }


def test_requirements_pin_what_was_tested(series_export):
    lines = (series_export[0] / "requirements.txt").read_text().splitlines()
    assert lines == [f"numpy=={np.__version__}", f"onnxruntime=={onnxruntime.__version__}"]


def test_parity_covers_a_single_row_and_sizes_other_than_the_example(series_export):
    parity = series_export[1]["card"]["parity"]
    assert parity["provider"] == "CPUExecutionProvider"
    assert [batch["sizes"] for batch in parity["batches"]] == [{"batch": 1}, {"batch": 3}, {"batch": 8}]
    assert [batch["num_rows"] for batch in parity["batches"]] == [1, 3, 9]
    figures = [figure for batch in parity["batches"] for figure in batch["outputs"].values()]
    assert len(figures) == 9
    assert all(figure["within"] and figure["tolerance_used"] < 0.1 for figure in figures)


def test_tolerance_follows_the_unit_of_each_output(series_export):
    folder, said = series_export
    tolerances = said["card"]["tolerances"]
    with np.load(folder / "expected_outputs.npz") as expected:
        for name in expected.files:
            assert tolerances[name]["atol"] == pytest.approx(1e-5 * np.abs(expected[name]).max(), rel=1e-6)
    assert tolerances["value"]["atol"] > 100 * tolerances["exceeds_probability"]["atol"]


@pytest.mark.parametrize("case", ["series", "attention", "tokens"])
def test_graph_is_one_dynamic_file_without_traces_of_its_origin(case, exports):
    folder, card = exports[case]
    content = (folder / "model.onnx").read_bytes()
    here = str(Path(__file__).parents[3]).encode()
    for trace in (here, b"/work", b"site-packages", b".py", b"stack_trace", b"pkg.torch", b"exporting_child", b"Net"):
        assert trace not in content
    model = onnx.load_from_string(content)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    names = [spec["name"] for spec in card["signature"]["outputs"]]
    assert [value.name for value in model.graph.output] == names


def test_named_dimensions_besides_the_batch_vary_in_parity(exports):
    sizes = [batch["sizes"] for batch in exports["tokens"][1]["parity"]["batches"]]
    assert sizes == [{"batch": 1, "time": 15}, {"batch": 3, "time": 10}, {"batch": 5, "time": 20}]


def test_failing_export_says_why_and_leaves_the_old_bundle_intact(bundle, export_in_child):
    before = snapshot(bundle)
    said = export_in_child("failing", bundle)
    assert "'value' at {'batch': 1} differs from torch by 0.5" in said["differs"]
    assert said["differs_within_stated"] == "exported"
    assert "got [('history', 'float32', [2, 12])]" in said["frozen_batch"]
    assert (
        "expected [('y', 'float32', ['batch', 3])], got [('y', 'float32', ['batch', 12])]" in said["wrong_output_shape"]
    )
    assert "must return a tuple" in said["not_a_tuple"]
    assert "null for a figure that is undefined" in said["nan_in_card"]
    assert snapshot(bundle) == before
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".")] == []
    wide = json.loads((bundle.with_name("wide") / "model_card.json").read_text())
    assert wide["tolerances"]["value"] == {"atol": 0.6, "rtol": 0.0}


@pytest.mark.parametrize(
    ("card", "support", "message"),
    [
        ({}, {}, "expected a 'name'"),
        ({"name": "x", "files": {}}, {}, r"\['files'\] are written by the export"),
        ({"name": "x"}, {"infer.py": Path(__file__)}, "plain name other than"),
        ({"name": "x"}, {"../evil.py": Path(__file__)}, "plain name other than"),
        ({"name": "x"}, {"features.py": Path("/nowhere/features.py")}, "is not there"),
    ],
)
def test_request_that_the_bundle_cannot_take_is_refused(card, support, message):
    with pytest.raises(ExportError, match=message):
        check_request(card, support)
