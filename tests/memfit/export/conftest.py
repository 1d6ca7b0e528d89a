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
def exports(series_export, export_in_child, tmp_path_factory):
    """Folder and card of every exported net, by name."""
    folder = tmp_path_factory.mktemp("others")
    others = {name: (folder / name, card) for name, card in export_in_child("others", folder).items()}
    return others | {"series": (series_export[0], series_export[1]["card"])}


@pytest.fixture
def bundle(series_export, tmp_path):
    """A copy of the series bundle that a test may spoil."""
    return Path(shutil.copytree(series_export[0], tmp_path / "bundle"))
