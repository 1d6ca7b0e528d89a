"""The packaged sample: 1,797 handwritten digits, the test half of UCI's optical digits (Alpaydin and Kaynak)."""

import gzip
import importlib.metadata
import io
import os
import zlib
from pathlib import Path

import numpy as np

from memfit.data.raw_images import Outline, RawImages
from memfit.errors import DataError

MAX_DIGITS_BYTES = 1 << 20
OUTLINE = Outline((8, 8, 1), [str(digit) for digit in range(10)], (0, 16))


def digits_path() -> Path:
    """Find the sample's file, which scikit-learn brings. Raises DataError where it is not installed."""
    try:
        found = importlib.metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError("the sample digits is not installed; install it with: pip install memfit[samples]") from error
    path = Path(os.fspath(found))  # type: ignore[call-overload]
    if not path.is_file():
        raise DataError("scikit-learn holds no digits.csv.gz; reinstall it with: pip install memfit[samples]")
    return path


def read_digits(path: Path) -> RawImages:
    """Read rows of 64 pixels, 0 to 16, and the digit. Raises DataError."""
    try:
        with gzip.open(path) as opened:
            text = opened.read(MAX_DIGITS_BYTES)
        table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: expected rows of 65 numbers; {error!s:.200}. Reinstall scikit-learn") from error
    if table.ndim != 2 or table.shape[1] != 65 or table[:, :64].max() > 16 or table[:, 64].max() > 9:
        raise DataError(f"{path}: expected 64 pixels of 0 to 16 and a digit in each row. Reinstall scikit-learn")
    labels, splits = table[:, 64].astype(np.int64), np.zeros(len(table), np.int8)
    images = np.ascontiguousarray(table[:, :64]).reshape(-1, *OUTLINE.shape)
    return RawImages(images, labels, splits, OUTLINE.class_names, OUTLINE.value_range)
