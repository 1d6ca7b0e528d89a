from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from memfit.data.spec import SeriesSpec

SMALL_FEATURES = {
    "lags": [1, 2, 4],
    "difference_lags": [1],
    "rolling_windows": [5],
    "share_windows": [4],
    "streak_window": 3,
    "extra_lags": [1, 3],
    "extra_mean_windows": [4],
}


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., SeriesSpec]:
    """Build a small spec: context 8, lookback 5, columns time, value and, if asked for, extra ones."""

    def build(*paths: object, **changes: Any) -> SeriesSpec:
        document = {
            "source": {"kind": "files", "paths": [str(path) for path in paths]},
            "time_column": "time",
            "value_column": "value",
            "context": 8,
            "features": SMALL_FEATURES,
            **changes,
        }
        return SeriesSpec.from_dict(document)

    return build


@pytest.fixture(scope="session")
def make_frame() -> Callable[..., pd.DataFrame]:
    """Make an hourly series with a value and an extra column."""

    def build(num_rows: int = 60, start: str = "2024-01-01", seed: int = 0) -> pd.DataFrame:
        times = pd.date_range(start, periods=num_rows, freq="1h", tz="UTC")
        noise = np.random.default_rng(seed).normal(1.5, 1.0, (num_rows, 2)).round(3)
        texts = times.strftime("%Y-%m-%dT%H:%M:%SZ")
        return pd.DataFrame({"time": texts, "value": noise[:, 0], "extra": noise[:, 1]})

    return build


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[..., Path]:
    def write(frame: pd.DataFrame, name: str = "series.csv") -> Path:
        frame.to_csv(tmp_path / name, index=False)
        return tmp_path / name

    return write
