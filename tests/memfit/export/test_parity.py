import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from memfit.errors import ExportError
from memfit.export.infer import compare, join_batches, split_batch
from memfit.export.parity import check_parity, parity_sizes, run_torch, state_tolerances
from memfit.export.signature import Signature

INPUTS = [Signature("x", ["batch", 2])]
OUTPUTS = [Signature("y", ["batch", 2])]
SAMPLES = {"x": np.random.default_rng(0).normal(size=(21, 2)).astype(np.float32)}
TIGHT = {"y": {"atol": 1e-6, "rtol": 1e-6}}


class PlusOne(nn.Module):
    def __init__(self, error=0.0, wrong_from_row=0):
        super().__init__()
        self.error, self.wrong_from_row = error, wrong_from_row

    def forward(self, x):
        error = torch.zeros_like(x)
        error[self.wrong_from_row :] = self.error
        return (x + 1 + error,)


@pytest.fixture
def plus_one(tmp_path):
    return write_model(tmp_path / "model.onnx", "batch")


def write_model(path, batch):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 2]) for name in "xy")
    one = onnx.numpy_helper.from_array(np.ones(1, np.float32), "one")
    body = helper.make_graph([helper.make_node("Add", ["x", "one"], ["y"])], "g", [x], [y], [one])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(body, opset_imports=opset, ir_version=10), path)
    return path


def parity(path, module):
    return check_parity(
        path,
        module,
        inputs=INPUTS,
        outputs=OUTPUTS,
        sample_inputs=SAMPLES,
        expected=run_torch(module, INPUTS, OUTPUTS, SAMPLES),
        tolerances=TIGHT,
    )


def test_equal_models_pass_at_three_batch_sizes(plus_one):
    figures = parity(plus_one, PlusOne())
    assert [(batch["sizes"]["batch"], batch["num_rows"]) for batch in figures["batches"]] == [(1, 1), (3, 3), (8, 21)]
    assert all(batch["outputs"]["y"]["max_absolute"] == 0 for batch in figures["batches"])


def test_wrong_model_is_refused_with_figures(plus_one):
    with pytest.raises(ExportError, match=r"'y' at \{'batch': 1\} differs from torch by 0\.0[12]"):
        parity(plus_one, PlusOne(error=0.0156))


def test_model_wrong_in_late_rows_only_is_refused(plus_one):
    with pytest.raises(ExportError, match=r"'batch': 8"):
        parity(plus_one, PlusOne(error=0.01, wrong_from_row=4))


def test_frozen_batch_is_refused_when_it_runs(tmp_path):
    with pytest.raises(ExportError, match="froze a dimension"):
        parity(write_model(tmp_path / "frozen.onnx", 2), PlusOne())


def test_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ExportError, match="does not load"):
        parity(path, PlusOne())


def test_nan_from_torch_is_refused(plus_one):
    with pytest.raises(ExportError, match=r"NaN in \['y'\]"):
        parity(plus_one, PlusOne(error=float("nan")))


def test_rows_are_run_in_small_batches_and_put_together_in_order():
    seen = []

    class Watched(PlusOne):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    named = run_torch(Watched(), INPUTS, OUTPUTS, SAMPLES)
    assert seen == [8, 8, 5]
    np.testing.assert_array_equal(named["y"], SAMPLES["x"] + 1)


def test_batch_may_be_any_dimension_or_none():
    inputs = [{"name": "a", "shape": ["time", "batch"]}, {"name": "b", "shape": [2]}]
    arrays = {"a": np.arange(15).reshape(3, 5), "b": np.arange(2)}
    parts = list(split_batch(inputs, arrays, 2))
    assert [part["a"].shape for part in parts] == [(3, 2), (3, 2), (3, 1)]
    joined = join_batches(inputs, parts)
    np.testing.assert_array_equal(joined["a"], arrays["a"])
    np.testing.assert_array_equal(joined["b"], arrays["b"])


def test_wrong_number_of_outputs_is_refused():
    with pytest.raises(ExportError, match=r"tuple of \['y', 'y'\], got 1 values"):
        run_torch(PlusOne(), INPUTS, OUTPUTS * 2, SAMPLES)


def test_too_few_sample_rows_are_refused():
    with pytest.raises(ExportError, match="at least 4 rows, got 3"):
        parity_sizes({"batch": 3})


@pytest.mark.parametrize("given", [{"atol": 1e-3}, {"atol": -1.0, "rtol": 0.0}, {"atol": 0, "rtol": 0, "x": 1}])
def test_tolerances_other_than_atol_and_rtol_are_refused(given):
    with pytest.raises(ExportError, match="expected 'atol' and 'rtol'"):
        state_tolerances({"y": np.ones(1)}, given)


def test_default_tolerance_scales_with_the_output_and_a_stated_one_does_not():
    stated = state_tolerances({"big": np.array([1e6, -2e6]), "zero": np.zeros(2)}, None)
    assert stated["big"]["atol"] == pytest.approx(20)
    assert stated["zero"]["atol"] == pytest.approx(1e-5)
    given = {"atol": 0.1, "rtol": 0.2}
    assert state_tolerances({"big": np.array([1e6])}, given) == {"big": given}


def test_comparison_measures_absolute_and_relative_difference():
    figures = compare(np.array([1.0, 100.0, 0.0]), np.array([1.5, 101.0, 0.0]), 0.5, 0.01)
    assert figures["max_absolute"] == 1.0
    assert figures["max_relative"] == 0.5
    assert figures["tolerance_used"] == pytest.approx(0.5 / 0.51)
    assert figures["within"]


@pytest.mark.parametrize(
    ("expected", "got", "within"),
    [
        ([np.inf, 1.0], [np.inf, 1.0], True),
        ([np.inf, 1.0], [-np.inf, 1.0], False),
        ([1.0, 1.0], [np.inf, 1.0], False),
        ([1.0, 1.0], [np.nan, 1.0], False),
        ([0.0, 1.0], [1e-300, 1.0], False),
        ([], [], True),
    ],
)
def test_comparison_with_zero_tolerance(expected, got, within):
    assert compare(np.array(expected), np.array(got), 0.0, 0.0)["within"] is within
