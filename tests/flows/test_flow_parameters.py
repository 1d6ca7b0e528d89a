"""Where a flow keeps its runs and its data, told by parameter, by environment or by neither."""

from pathlib import Path

import pytest

from flows import flow_parameters
from memfit.config import load_config


@pytest.fixture
def opened(monkeypatch, tmp_path, root):
    """Open a run of a flow, and return where its runs and its store would be."""
    config = load_config(root / "configs/smoke.toml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow_parameters, "open_run", lambda _config, **where: where)

    def open_with(**given: str) -> tuple[Path, Path]:
        where = flow_parameters.open_directory(config, run_dir="", resume=False, fresh=False, **given)
        return where["runs"], where["store"]

    return open_with


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("MEMFIT_RUNS", raising=False)
    monkeypatch.delenv("MEMFIT_STORE", raising=False)


def test_folders_are_in_the_working_directory_unless_told_otherwise(opened, tmp_path):
    assert opened(runs="", store="") == (tmp_path / "runs", tmp_path / "store")


def test_folders_are_those_of_the_environment_where_it_names_them(opened, monkeypatch, tmp_path):
    monkeypatch.setenv("MEMFIT_RUNS", "/data/runs")
    monkeypatch.setenv("MEMFIT_STORE", "elsewhere")
    assert opened(runs="", store="") == (Path("/data/runs"), tmp_path / "elsewhere")


def test_parameters_come_before_the_environment(opened, monkeypatch, tmp_path):
    monkeypatch.setenv("MEMFIT_RUNS", "/data/runs")
    monkeypatch.setenv("MEMFIT_STORE", "/data/store")
    assert opened(runs="mine", store="/own") == (tmp_path / "mine", Path("/own"))
