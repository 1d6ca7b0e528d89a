import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch

# A process of its own, as the pipeline does: exporting leaves state behind that changes later exports.
EXPORT = """
import sys
import torch

program = torch.export.load(sys.argv[1])
print(program)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
