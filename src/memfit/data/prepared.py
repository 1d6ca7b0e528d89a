"""A prepared series, memory-mapped: windows are cut when a batch is made."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfit.data.splits import SPLITS, classify, exceeds
from memfit.errors import DataError
from memfit.files import read_json

RESIDENT_BYTES = 4 << 20
"""Larger arrays give their mapped pages back after every batch: a budget counts them, though a file backs them."""


class PreparedSeries:
    """The arrays of a prepared directory. Raises DataError where they are missing or not what the manifest says.

    Only shapes are checked here; `prepare_series` checks the bytes. It pickles as its path.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = read_json(self.path / "manifest.json")
            self.values = self._open("values.npy", np.float32)
            self.features = self._open("features.npy", np.float32)
            self.times = self._open("times.npy", np.int64)
            self.targets = self._open("targets.npy", np.int64)
        except (OSError, ValueError) as error:
            raise self._broken(str(error)) from error
        self.context = int(self.manifest["context"])
        self._check_shapes()

    def __reduce__(self) -> tuple[type["PreparedSeries"], tuple[Path]]:
        return PreparedSeries, (self.path,)

    def num_targets(self, split: str) -> int:
        """Return how many rows "train", "validation" or "test" predicts."""
        border = self._border(split)
        return int(border["stop"]) - int(border["start"])

    def rows(self, split: str) -> NDArray[np.int64]:
        """Return the target rows of a split, int64 [n], in order of time; a read-only view."""
        border = self._border(split)
        return np.asarray(self.targets[border["start"] : border["stop"]])

    def batch(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Cut the windows of some target rows, in any order, in the user's units.

        Returns history float32 [n, context] (the rows before the target, oldest first), features float32 [n, F]
        (those of the row before it), target float32 [n], target_class int64 [n], exceeds float32 [n] and row
        int64 [n]. Raises DataError for a row that is no target.
        """
        rows = np.asarray(rows, np.int64)
        self._check_targets(rows)
        windows = np.lib.stride_tricks.sliding_window_view(self.values, self.context)
        target = np.array(self.values[rows])
        batch = {
            "history": np.asarray(windows[rows - self.context]),
            "features": np.asarray(self.features[rows - 1]),
            "target": target,
            "target_class": self.classes(target),
            "exceeds": exceeds(target, self.manifest["threshold"]).astype(np.float32),
            "row": rows.copy(),
        }
        for array in (self.values, self.features, self.targets):
            give_pages_back(array)
        return batch

    def classes(self, values: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the classes of some values: class c holds (edges[c - 1], edges[c]]."""
        return classify(np.asarray(values, np.float32), self.manifest["class_edges"])

    def _open(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        if array.dtype != dtype:
            raise self._broken(f"{name} holds {array.dtype}, expected {np.dtype(dtype)}")
        return array

    def _check_shapes(self) -> None:
        rows, names = self.manifest["rows"], self.manifest["features"]["names"]
        count = self.manifest["borders"]["test"]["stop"]
        expected = {"values": (rows,), "features": (rows, len(names)), "times": (rows,), "targets": (count,)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise self._broken(f"{name}.npy has the shape {getattr(self, name).shape}, expected {shape}")

    def _check_targets(self, rows: NDArray[np.int64]) -> None:
        places = np.minimum(np.searchsorted(self.targets, rows), len(self.targets) - 1)
        if (foreign := self.targets[places] != rows).any():
            raise DataError(
                f"row {rows[np.argmax(foreign)]} is no target; take rows from rows('train'), "
                "rows('validation') or rows('test')"
            )

    def _border(self, split: str) -> dict[str, Any]:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        border: dict[str, Any] = self.manifest["borders"][split]
        return border

    def _broken(self, reason: str) -> DataError:
        return DataError(f"{self.path} is no whole prepared series: {reason}. Prepare it again")


def give_pages_back(array: NDArray[Any]) -> None:
    """Unmap what was touched; the kernel's page cache keeps it, so the next touch costs a minor fault."""
    mapped: Any = array.base
    if array.nbytes > RESIDENT_BYTES and isinstance(mapped, mmap.mmap):
        mapped.madvise(mmap.MADV_DONTNEED)
