import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from memfit.errors import ExportError
from memfit.export import graph
from memfit.export.graph import check_self_contained, check_signature, example_arrays, refuse_oversize, strip
from memfit.export.signature import Signature, bind_samples

INPUTS = [Signature("x", ["batch", 2])]
OUTPUTS = [Signature("y", ["batch", 2])]


def small_model(batch="batch", opset=20, operator="Relu", domain=""):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 2]) for name in "xy")
    inner = helper.make_node(operator, ["x"], ["y"], domain=domain)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(helper.make_graph([inner], "g", [x], [y]), opset_imports=opsets, ir_version=10)


def test_strip_reaches_every_level_and_nothing_else():
    model = small_model()
    clean = model.SerializeToString()
    model.doc_string = "made at /home/me/train.py"
    model.metadata_props.add(key="k", value="v")
    model.graph.metadata_props.add(key="k", value="v")
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="/home/me/train.py")
    model.graph.node[0].doc_string = "line 3"
    model.graph.input[0].metadata_props.add(key="k", value="v")
    model.graph.output[0].doc_string = "line 4"
    model.graph.value_info.append(model.graph.output[0])
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["z"], doc_string="line 5")], "body", [], [])
    model.graph.node[0].attribute.append(helper.make_attribute("body", body))
    strip(model)
    assert b"line" not in model.SerializeToString()
    assert b"/home" not in model.SerializeToString()
    del model.graph.node[0].attribute[:]
    assert model.SerializeToString() == clean


def test_frozen_batch_is_caught():
    check_signature(small_model(), INPUTS, OUTPUTS)
    with pytest.raises(ExportError, match=r"inputs .* got \[\('x', 'float32', \[2, 2\]\)\]"):
        check_signature(small_model(batch=2), INPUTS, OUTPUTS)


def test_unnamed_dimension_is_caught():
    with pytest.raises(ExportError, match=r"\[None, 2\]"):
        check_signature(small_model(batch=None), INPUTS, OUTPUTS)


def test_wrong_dtype_and_name_are_caught():
    with pytest.raises(ExportError, match="inputs of the exported graph"):
        check_signature(small_model(), [Signature("x", ["batch", 2], "float64")], OUTPUTS)
    with pytest.raises(ExportError, match="outputs of the exported graph"):
        check_signature(small_model(), INPUTS, [Signature("z", ["batch", 2])])


def test_other_opset_and_foreign_operators_are_caught():
    check_self_contained(small_model(), 20)
    with pytest.raises(ExportError, match="operator sets"):
        check_self_contained(small_model(opset=18), 20)
    with pytest.raises(ExportError, match=r"com\.microsoft"):
        check_self_contained(small_model(operator="FusedGelu", domain="com.microsoft"), 20)


def test_weights_outside_the_file_are_caught():
    model = small_model()
    weight = onnx.numpy_helper.from_array(np.ones(3, np.float32), "w")
    weight.data_location = TensorProto.EXTERNAL
    model.graph.initializer.append(weight)
    with pytest.raises(ExportError, match=r"outside the file: \['w'\]"):
        check_self_contained(model, 20)


def test_weights_beyond_one_file_are_refused_before_the_export(monkeypatch):
    module = nn.Linear(100, 10)
    monkeypatch.setattr(graph, "PROTOBUF_LIMIT_BYTES", 4 * 1010)
    refuse_oversize(module)
    monkeypatch.setattr(graph, "PROTOBUF_LIMIT_BYTES", 4 * 1010 - 1)
    with pytest.raises(ExportError, match="one ONNX file holds at most"):
        refuse_oversize(module)


def test_shared_weights_count_once(monkeypatch):
    module = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)])
    module[1].weight = module[0].weight
    monkeypatch.setattr(graph, "PROTOBUF_LIMIT_BYTES", 400)
    refuse_oversize(module)


def test_example_has_two_rows_and_keeps_other_dimensions():
    inputs = [Signature("tokens", ["batch", "time"], "int64"), Signature("scale", [1])]
    samples = {"tokens": np.arange(30).reshape(5, 6), "scale": np.ones(1, np.float32)}
    example = example_arrays(inputs, samples)
    assert example["tokens"].shape == (2, 6)
    assert example["scale"].shape == (1,)


def test_single_sample_row_is_refused():
    with pytest.raises(ExportError, match="every named dimension must be there and >= 2"):
        example_arrays(INPUTS, {"x": np.ones((1, 2), np.float32)})


def test_samples_are_checked_against_the_signature():
    bound = bind_samples(INPUTS, {"x": np.ones((4, 2))})
    assert bound["x"].dtype == np.float32
    with pytest.raises(ExportError, match=r"sample inputs: input 'x': expected shape \[batch, 2\], got \[4, 3\]"):
        bind_samples(INPUTS, {"x": np.ones((4, 3))})


def test_unreadable_module_is_an_export_error():
    class Branches(nn.Module):
        def forward(self, x):
            return (x if x.sum() > 0 else -x,)

    example = {"x": np.ones((2, 2), np.float32)}
    with pytest.raises(ExportError, match=r"torch\.onnx\.export failed on Branches"):
        graph.trace(Branches().eval(), INPUTS, OUTPUTS, example, 20)
    assert torch.is_grad_enabled()
