"""What several rooms share: a tiny prepared series, a config for it, and targets that a child process can import."""

import math
import os
import shutil
import tempfile
from pathlib import Path

# Before torch is imported anywhere: many small processes on few cores are fastest, and repeatable, on one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MEMFIT_LOCKS"] = tempfile.mkdtemp(prefix="memfit-locks-")  # locks of the tests' own

import numpy as np
import pytest

TINY_FEATURES = {
    "lags": [1, 2, 3],
    "difference_lags": [1],
    "rolling_windows": [4],
    "rolling_statistics": ["mean", "std"],
    "rolling_quantiles": [],
    "calendar": ["hour"],
    "streak_window": 0,
    "share_windows": [4],
    "extra_lags": [],
    "extra_difference_lags": [],
    "extra_mean_windows": [],
}
TINY_MODEL = {
    "size": "light",
    "windows": [4, 8],
    "tcn_window": 8,
    "transformer_window": 8,
    "d_model": 8,
    "num_layers": 1,
    "num_heads": 2,
    "ff": 16,
    "nbeats_hidden": 8,
    "tcn_channels": 4,
    "feature_hidden": 8,
    "fusion_hidden": 16,
    "dropout": 0.2,
    "attention_dropout": 0.1,
}
TINY_CONFIG = """
name = "tiny"
seed = 3

[data]
source = {{ kind = "files", paths = ["{csv}"] }}
time_column = "time"
value_column = "load"
unit = "MW"
frequency = "1h"
threshold = 10.5
class_quantiles = [0.3, 0.7]

[data.features]
lags = [1, 2, 3]
difference_lags = [1]
rolling_windows = [4]
rolling_statistics = ["mean", "std"]
rolling_quantiles = []
calendar = ["hour"]
streak_window = 0
share_windows = [4]
extra_lags = []
extra_difference_lags = []
extra_mean_windows = []

[model]
size = "light"
windows = [4, 8]
tcn_window = 8
transformer_window = 8
d_model = 8
num_layers = 1
num_heads = 2
ff = 16
nbeats_hidden = 8
tcn_channels = 4
feature_hidden = 8
fusion_hidden = 16

[plan]
budget = "2GiB"
checkpointing = ["none"]

[export]
samples = 8

[[stages]]
name = "first"
epochs = 2
global_batch_size = 16
lr = 1e-3

[[stages]]
name = "second"
epochs = 1
global_batch_size = 8
lr = 5e-4
max_steps = 6
"""


def series_csv(path: Path, rows: int = 232) -> Path:
    """Write an hourly series with a daily wave, a trend and noise."""
    noise = np.random.default_rng(0).normal(size=rows)
    values = [10 + 2 * math.sin(i * math.tau / 24) + 0.002 * i + 0.3 * noise[i] for i in range(rows)]
    times = np.datetime64("2024-01-01T00", "h") + np.arange(rows)
    lines = [f"{time}:00:00,{value:.4f}" for time, value in zip(times, values, strict=True)]
    path.write_text("\n".join(["time,load", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_csv(tmp_path_factory):
    return series_csv(tmp_path_factory.mktemp("source") / "load.csv")


@pytest.fixture(scope="session")
def tiny_config_text(tiny_csv):
    return TINY_CONFIG.format(csv=tiny_csv)


@pytest.fixture
def tiny_config(tmp_path, tiny_config_text):
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_config_text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tiny_csv):
    """The tiny series, prepared: about 156 train, 34 validation and 34 test targets."""
    from memfit.data.prepare import prepare_series  # not above: a machine with torch alone runs the GPU tests
    from memfit.data.spec import SeriesSpec

    spec = SeriesSpec.from_dict(
        {
            "source": {"kind": "files", "paths": [str(tiny_csv)]},
            "time_column": "time",
            "value_column": "load",
            "unit": "MW",
            "frequency": "1h",
            "context": 8,
            "threshold": 10.5,
            "class_quantiles": [0.3, 0.7],
            "features": TINY_FEATURES,
        }
    )
    return prepare_series(spec, tmp_path_factory.mktemp("store"), code_version="test")


@pytest.fixture
def tiny_model():
    """Settings of the model as a job carries them."""
    return {"variant": "light", "variants": {"light": dict(TINY_MODEL)}}


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """Copy a module of the tests to where child processes find it: `importable(path)`."""

    def copy(module: Path) -> str:
        folder = tmp_path / "importable"
        folder.mkdir(exist_ok=True)
        shutil.copy(module, folder)
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        return module.stem

    return copy
