"""The attention of a forecast, read from predictions.npz in little memory: its mean over samples, and a few of them."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_SAMPLES = 3
MAX_STEPS, MAX_ROWS = 96, 240
"""A picture has no more cells; where there are more weights, each cell is the mean of its own."""
MEMBER = "alignment.npy"


@dataclass(frozen=True)
class Alignment:
    """Weights of a decoder's attention, reduced to at most [MAX_STEPS, MAX_ROWS]."""

    mean: NDArray[np.float64]
    """Over all test samples: a row per step of the horizon, a column per row of the history."""
    samples: dict[int, NDArray[np.float64]]
    """The same of some samples, by their number."""
    count: int
    """Samples that the mean is taken over."""
    horizon: int
    window: int


def read_alignment(path: Path) -> Alignment | None:
    """Read the array `alignment` [n, horizon, window] of an npz file, one sample after the other; None without one.

    Raises: ValueError, OSError or zipfile.BadZipFile for a file that cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        if MEMBER not in archive.namelist():
            return None
        with archive.open(MEMBER) as opened:
            shape, dtype = read_header(opened)
            if len(shape) != 3 or 0 in shape or dtype != np.float32:
                raise ValueError(f"alignment: expected float32 [n, horizon, window], got {dtype} {list(shape)}")
            return _reduced(_each(opened, shape), *shape)


def read_header(opened: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read shape and type of a .npy stream, which is left where its numbers begin. Raises: ValueError."""
    version = np.lib.format.read_magic(opened)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(opened)
    if by_columns and len(shape) > 1:
        raise ValueError("expected an array stored row by row, got one stored column by column")
    return shape, dtype


def _each(opened: Any, shape: tuple[int, ...]) -> Iterator[NDArray[np.float64]]:
    """Read one sample's weights after the other, each reduced."""
    _, steps, rows = shape
    size = steps * rows * np.dtype(np.float32).itemsize
    for _ in range(shape[0]):
        read = opened.read(size)
        if len(read) != size:
            raise ValueError(f"alignment: the file ends within a sample; expected {size} bytes, got {len(read)}")
        weights = np.frombuffer(read, np.float32).reshape(steps, rows)
        yield _shrink(_shrink(weights, 0, MAX_STEPS), 1, MAX_ROWS).astype(np.float64)


def _reduced(samples: Iterator[NDArray[np.float64]], count: int, horizon: int, window: int) -> Alignment:
    """Add up all samples and keep some that are evenly spread, neither the first nor the last."""
    wanted = {int((number + 0.5) * count / NUM_SAMPLES) for number in range(NUM_SAMPLES)}
    total: NDArray[np.float64] | float = 0.0
    kept = {}
    for number, weights in enumerate(samples):
        total = total + weights
        if number in wanted:
            kept[number] = weights
    return Alignment(np.asarray(total) / count, kept, count, horizon, window)


def _shrink(weights: NDArray[Any], axis: int, most: int) -> NDArray[Any]:
    """Take means of neighbours along an axis, so that at most so many are left."""
    length = weights.shape[axis]
    if length <= most:
        return weights
    edges = np.linspace(0, length, most + 1).round().astype(int)
    sums = np.add.reduceat(weights, edges[:-1], axis=axis)
    shape = [1, 1]
    shape[axis] = most
    found: NDArray[Any] = sums / np.diff(edges).reshape(shape)
    return found
