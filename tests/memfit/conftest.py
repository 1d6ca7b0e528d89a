"""One whole run of the tiny config, made once by the real command line and looked at by many tests."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class FinishedRun:
    root: Path
    """Holds tiny.toml, runs/ and store/."""
    stdout: str
    stderr: str

    @property
    def config(self) -> Path:
        return self.root / "tiny.toml"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.stdout)

    @property
    def path(self) -> Path:
        return Path(self.summary["run_dir"])


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny_config_text):
    root = tmp_path_factory.mktemp("whole")
    (root / "tiny.toml").write_text(tiny_config_text, encoding="utf-8")
    command = [sys.executable, "-m", "memfit", "run", "tiny.toml", "--json"]
    where = ["--runs", str(root / "runs"), "--store", str(root / "store")]
    done = subprocess.run([*command, *where], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.copy(root / "runs/metrics/tiny.prom", root)  # later runs of this name, by other tests, write theirs over it
    return FinishedRun(root, done.stdout, done.stderr)
