"""The process that plans and starts children stays light: it leaves torch to them."""

import subprocess
import sys

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from memfit.pipeline import open_run
from memfit.memory.budget import check_device, resolve_budget
assert check_device("cpu") == "cpu"
assert resolve_budget("1GiB", "cpu") == 2**30
"""


def test_the_pipeline_needs_no_torch_of_its_own():
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True, timeout=60)
