"""The process that plans and starts children stays light: it leaves torch to them."""

import subprocess
import sys

WITHOUT_TORCH = """
import sys
from pathlib import Path
sys.modules["torch"] = None
from memfit.memory.budget import check_device, resolve_budget
from memfit.pipeline import open_run, read_config
assert check_device("cpu") == "cpu"
assert resolve_budget("1GiB", "cpu") == 2**30
config, _ = read_config(Path(sys.argv[1]), [])
runs, store = Path(sys.argv[2]) / "runs", Path(sys.argv[2]) / "store"
open_run(config, runs=runs, store=store).perform("prepare")
"""


def test_preparing_data_and_the_first_look_at_memory_need_no_torch_here(tiny_config, tmp_path):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tiny_config), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    assert (tmp_path / "runs" / "tiny").exists()
