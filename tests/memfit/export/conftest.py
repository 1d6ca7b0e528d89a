import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("exporting_child.py")


@pytest.fixture(scope="session")
def export_in_child():
    """Run one case of exporting_child.py; warnings are errors there too."""

    def run(case, out_dir):
        child = subprocess.run(
            [sys.executable, "-W", "error", CHILD, case, out_dir],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=120,
        )
        assert child.returncode == 0, child.stderr
        assert child.stderr == ""
        return json.loads(child.stdout)

    return run


@pytest.fixture(scope="session")
def series_export(export_in_child, tmp_path_factory):
    """The series bundle's folder, and what the child said."""
    folder = tmp_path_factory.mktemp("series") / "export"
    return folder, export_in_child("series", folder)


@pytest.fixture(scope="session")
def attention_export(export_in_child, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention") / "export"
    return folder, export_in_child("attention", folder)


@pytest.fixture(scope="session")
def tokens_export(export_in_child, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "export"
    return folder, export_in_child("tokens", folder)


@pytest.fixture
def bundle(series_export, tmp_path):
    """A copy of the series bundle that a test may spoil."""
    return Path(shutil.copytree(series_export[0], tmp_path / "bundle"))
