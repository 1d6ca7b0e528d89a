"""Images as they were read, before they are split: what every source returns."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memfit.data.limits import MAX_FILE_BYTES, MIB
from memfit.errors import DataError

SPLIT_CODES = {"train": 0, "validation": 1, "test": 2}
"""How a split is written in arrays; images without one of their own count as train until splits are drawn."""


@dataclass(frozen=True)
class ImageFile:
    """A source's file as it was when it was listed: name within the source, and for folders class and split."""

    path: Path
    name: str
    num_bytes: int
    modified_ns: int
    label: str = ""
    split: str = "train"

    @classmethod
    def found(
        cls, path: Path, name: str, *, label: str = "", split: str = "train", max_bytes: int = MAX_FILE_BYTES
    ) -> "ImageFile":
        """Note a file as it is now. Raises DataError where it is larger than `max_bytes`."""
        state = path.stat()
        if state.st_size > max_bytes:
            raise DataError(f"{path}: expected at most {max_bytes // MIB:,} MiB, got {state.st_size // MIB:,} MiB")
        return cls(path, name, state.st_size, state.st_mtime_ns, label, split)

    def check_unchanged(self) -> None:
        """Raise DataError where the file is another one by now."""
        state = self.path.stat()
        if (state.st_size, state.st_mtime_ns) != (self.num_bytes, self.modified_ns):
            raise DataError(f"{self.path} changed while it was read; run again when it is complete")


@dataclass(frozen=True)
class RawImages:
    """Images uint8 [N, H, W, C], labels int64 [N] and split codes int8 [N], in the source's order."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    splits: NDArray[np.int8]
    class_names: list[str]
    value_range: tuple[int, int] = (0, 255)


@dataclass(frozen=True)
class Outline:
    """What is known of a source before its images are read."""

    shape: tuple[int, int, int]
    class_names: list[str]
    value_range: tuple[int, int] = (0, 255)
