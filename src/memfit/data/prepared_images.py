"""Prepared images, memory-mapped: batches are copied out when they are asked for."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfit.data.prepared import give_pages_back
from memfit.data.splits import SPLITS
from memfit.errors import DataError
from memfit.files import read_json


class PreparedImages:
    """The arrays of a prepared directory. Raises DataError where they are missing or not what the manifest says.

    Only shapes are checked here; `prepare_images` checks the bytes. It pickles as its path.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = read_json(self.path / "manifest.json")
            self.images = self._open("images.npy", np.uint8)
            self.labels = self._open("labels.npy", np.int64)
            self.digests = self._open("digests.npy", np.uint64)
            self.origins = self._open("origins.npy", np.int64)
            self._check_shapes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise self._broken(str(error)) from error

    def __reduce__(self) -> tuple[type["PreparedImages"], tuple[Path]]:
        return PreparedImages, (self.path,)

    def num_images(self, split: str) -> int:
        """Return how many images "train", "validation" or "test" has."""
        start, stop = self._border(split)
        return stop - start

    def rows(self, split: str, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where images of a split are in the arrays. Raises DataError for an index that it has not."""
        start, stop = self._border(split)
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= stop - start):
            raise DataError(
                f"{split} has images 0 to {stop - start - 1}; got {indices.min()} to {indices.max()}. Count within the "
                "split"
            )
        return start + indices

    def batch(self, split: str, indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Copy images of a split, in any order: image uint8 [n, H, W, C] and label int64 [n]."""
        rows = self.rows(split, indices)
        batch = {"image": np.asarray(self.images[rows]), "label": np.asarray(self.labels[rows])}
        for array in (self.images, self.labels):
            give_pages_back(array)
        return batch

    def _open(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        if array.dtype != dtype:
            raise self._broken(f"{name} holds {array.dtype}, expected {np.dtype(dtype)}")
        return array

    def _check_shapes(self) -> None:
        count = self.manifest["borders"]["test"]["stop"]
        image = (*self.manifest["image_size"], self.manifest["channels"])
        expected = {"images": (count, *image), "labels": (count,), "digests": (count,), "origins": (count,)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise self._broken(f"{name}.npy has the shape {getattr(self, name).shape}, expected {shape}")

    def _border(self, split: str) -> tuple[int, int]:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        border = self.manifest["borders"][split]
        return int(border["start"]), int(border["stop"])

    def _broken(self, reason: str) -> DataError:
        return DataError(f"{self.path} are no whole prepared images: {reason}. Prepare them again")
