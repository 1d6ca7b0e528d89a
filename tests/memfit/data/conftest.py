from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from memfit.data.spec import SeriesSpec
from tests.memfit.data.image_sets import drawn

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


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Path]:
    """Write arrays by name; x and y of 60 images of 3 classes where none are given."""

    def write(name: str = "data.npz", **arrays: Any) -> Path:
        images, labels = drawn(60)
        np.savez(tmp_path / name, **(arrays or {"x": images, "y": labels}))
        return tmp_path / name

    return write


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write images of two classes, 20 each: `folder(splits)`; red ones are cats."""

    def write(*splits: str, size: tuple[int, int] = (12, 10), suffix: str = ".png") -> Path:
        random = np.random.default_rng(1)
        for split in splits or ("",):
            for label, channel in (("cat", 0), ("dog", 2)):
                where = tmp_path / "images" / split / label
                where.mkdir(parents=True)
                for index in range(20):
                    pixels = random.integers(0, 60, (size[1], size[0], 3), np.uint8)
                    pixels[..., channel] += 150
                    Image.fromarray(pixels).save(where / f"{index:02}{suffix}")
        return tmp_path / "images"

    return write
