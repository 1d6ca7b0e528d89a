"""Arrays that grow on disk row by row, and moments that grow with them."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class ArrayWriter:
    """Write a .npy file in pieces along its first dimension; no more than a piece is in memory.

    shape: the first entry may be None, for as many rows as are written. Used as a context; leaving it makes the file
    durable.
    """

    def __init__(self, path: Path, dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
        self._dtype, self._shape, self.num_rows = np.dtype(dtype), shape, 0
        self._file = path.open("wb")
        self._write_header(shape[0] or 0)

    def _write_header(self, num_rows: int) -> None:
        """Write a header, which numpy pads so that one with another number of rows takes its place."""
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (num_rows, *self._shape[1:])}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, rows: NDArray[Any]) -> None:
        """Append rows."""
        assert rows.shape[1:] == self._shape[1:]
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)
        self.num_rows += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            assert kind is not None or self._shape[0] in (None, self.num_rows)
            if self._shape[0] is None:
                self._file.seek(0)
                self._write_header(self.num_rows)
            self._file.flush()
            os.fsync(self._file.fileno())


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write a whole array as a durable .npy file."""
    with ArrayWriter(path, array.dtype.type, array.shape) as writer:
        writer.write(array)


@dataclass
class Moments:
    """Mean and population std of columns, merged from pieces (Chan, Golub and LeVeque, 1979)."""

    num_columns: int
    count: int = 0
    mean: NDArray[np.float64] = field(init=False)
    squares: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.squares = np.zeros(self.num_columns), np.zeros(self.num_columns)

    def add(self, rows: NDArray[Any]) -> None:
        """Merge rows [n, columns]."""
        if len(rows) == 0:
            return
        first = rows[0].astype(np.float64)
        shifted = rows - first  # a constant column then has exactly no spread
        center = shifted.mean(axis=0)
        squares = ((shifted - center) ** 2).sum(axis=0)
        total = self.count + len(rows)
        apart = first + center - self.mean if self.count else np.zeros(self.num_columns)
        self.squares += squares + apart**2 * (self.count * len(rows) / total)
        self.mean = self.mean + apart * (len(rows) / total) if self.count else first + center
        self.count = total

    @property
    def std(self) -> NDArray[np.float64]:
        """The spread; 1 for a column that does not vary, so that it normalizes to 0 and not to NaN."""
        spread: NDArray[np.float64] = np.sqrt(self.squares / max(self.count, 1))
        return np.where(spread > 0, spread, 1.0)

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Which columns do not vary."""
        same: NDArray[np.bool_] = self.squares == 0
        return same
