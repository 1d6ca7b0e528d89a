import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch

# In a process of its own, as in the pipeline: an export leaves state behind that can change later ones.
EXPORT = """
import json, sys
import torch
from memfit.models.multiscale import build_multiscale

folder, arguments = sys.argv[1], json.loads(sys.argv[2])
net = build_multiscale("light", **arguments).eval()
net.load_state_dict(torch.load(f"{folder}/weights.pt", weights_only=True))
batch = torch.export.Dim("batch")
torch.onnx.export(
    net,
    (torch.randn(2, net.context), torch.randn(2, arguments["num_features"])),
    dynamo=True,
    opset_version=20,
    input_names=["history", "features"],
    output_names=["value", "class_logits", "exceeds_logit"],
    dynamic_shapes={"history": {0: batch}, "features": {0: batch}},
    verbose=False,
).save(f"{folder}/model.onnx", external_data=False)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_arguments, make_tiny):
    folder = tmp_path_factory.mktemp("onnx")
    net = make_tiny(dropout=0.2).eval()
    torch.nn.init.normal_(net.value_head.weight, std=0.1)
    torch.save(net.state_dict(), folder / "weights.pt")
    command = [sys.executable, "-c", EXPORT, str(folder), json.dumps(tiny_arguments | {"dropout": 0.2})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return net, onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("n", [1, 3, 7])
def test_the_exported_graph_agrees_at_any_batch_size(exported, make_rows, n):
    net, session = exported
    history, features = make_rows(n)
    with torch.no_grad():
        expected = net(history, features)
    got = session.run(list(expected), {"history": history.numpy(), "features": features.numpy()})
    for name, output in zip(expected, got):
        np.testing.assert_allclose(output, expected[name].numpy(), atol=1e-5, rtol=0, err_msg=name)


def test_the_exported_batch_is_symbolic(exported):
    _, session = exported
    shapes = {tensor.name: tensor.shape for tensor in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "history": ["batch", 24],
        "features": ["batch", 5],
        "value": ["batch"],
        "class_logits": ["batch", 3],
        "exceeds_logit": ["batch"],
    }
