"""Images and labels in one .npz file: which arrays are theirs, and checks before anything large is read."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfit.data.image_spec import MAX_CLASSES, MAX_IMAGE_SIZE
from memfit.data.limits import MIB, check_expansion
from memfit.data.raw_images import SPLIT_CODES, Outline, RawImages
from memfit.errors import DataError
from memfit.memory.host import host_memory

MAX_NPZ_EXPANSION = 200
"""How many times its size a larger .npz file may expand to."""
_ARRAYS = (
    ("x", "y", "train"),
    ("x_train", "y_train", "train"),
    ("x_validation", "y_validation", "validation"),
    ("x_val", "y_val", "validation"),
    ("x_test", "y_test", "test"),
    ("train_images", "train_labels", "train"),
    ("val_images", "val_labels", "validation"),
    ("test_images", "test_labels", "test"),
)
"""Names of images and labels that a .npz file may have, and their split: those of Keras and of MedMNIST too."""


@dataclass(frozen=True)
class _Arrays:
    shapes: list[tuple[int, ...]]
    labels: list[NDArray[np.int64]]
    splits: list[str]
    images: list[NDArray[np.uint8]]


def outline_npz(path: Path) -> Outline:
    """Tell the images' shape from their headers, and the classes from the labels. Raises DataError."""
    arrays = _read_npz(path, only_labels=True)
    shape = _image_shape(path, arrays.shapes[0])
    return Outline(shape, [str(index) for index in range(_count(path, np.concatenate(arrays.labels)))])


def read_npz(path: Path) -> RawImages:
    """Read all images and labels, in the order of their arrays' names above. Raises DataError."""
    arrays = _read_npz(path, only_labels=False)
    shape = _image_shape(path, arrays.shapes[0])
    images = np.concatenate([part.reshape(len(part), *shape) for part in arrays.images])
    labels = np.concatenate(arrays.labels)
    codes = [np.full(len(part), SPLIT_CODES[split], np.int8) for part, split in zip(arrays.labels, arrays.splits)]
    return RawImages(images, labels, np.concatenate(codes), [str(index) for index in range(_count(path, labels))])


def _count(path: Path, labels: NDArray[np.int64]) -> int:
    """Count the classes; labels must be 0 to C - 1."""
    lowest, highest = int(labels.min(initial=0)), int(labels.max(initial=0))
    if not labels.size or lowest < 0 or highest >= MAX_CLASSES:
        raise DataError(f"{path}: expected labels 0 to {MAX_CLASSES - 1} at most, got {lowest} to {highest}")
    return highest + 1


def _image_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    height, width, channels = (*shape[1:], 1)[:3]
    if min(height, width, channels) < 1 or max(height, width) > MAX_IMAGE_SIZE or channels > 4:
        raise DataError(
            f"{path}: expected images [n, H, W] or [n, H, W, C] of up to {MAX_IMAGE_SIZE} pixels a side and 4 "
            f"channels, channels last; got {list(shape)}"
        )
    return height, width, channels


def _read_npz(path: Path, *, only_labels: bool) -> _Arrays:
    """Read the arrays that have known names; without their images if only the labels are wanted."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            known = [entry for entry in _ARRAYS if entry[0] in members and entry[1] in members]
            splits = [split for _, _, split in known]
            if "train" not in splits or len(set(splits)) != len(splits):
                raise DataError(
                    f"{path}: expected arrays x and y, or x_train, y_train, x_test, y_test (and x_validation, "
                    f"y_validation); got {', '.join(sorted(members))[:200]}"
                )
            total = sum(archive.getinfo(members[name]).file_size for entry in known for name in entry[:2])
            check_expansion(path, total, MAX_NPZ_EXPANSION)
            if total > host_memory().free_bytes // 3:
                raise DataError(f"{path}: expands to {total // MIB:,} MiB, more than a third of free memory. Split it")
            found = _Arrays([], [], splits, [])
            for images, labels, _ in known:
                found.shapes.append(_header(archive, members[images], path, images))
                found.labels.append(_labels(archive, members[labels], path, labels))
                if not only_labels:
                    found.images.append(_load(archive, members[images]))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected a .npz file of plain arrays; {error!s:.200}") from error
    _check_arrays(path, found, known)
    return found


def _check_arrays(path: Path, found: _Arrays, known: list[tuple[str, str, str]]) -> None:
    for (images, labels, _), shape, own in zip(known, found.shapes, found.labels):
        if shape[0] != len(own) or shape[1:] != found.shapes[0][1:]:
            raise DataError(
                f"{path}: expected as many {labels} as {images}, and images of one size; got {len(own)} and "
                f"{list(shape)}, after {list(found.shapes[0])}"
            )


def _header(archive: zipfile.ZipFile, member: str, path: Path, name: str) -> tuple[int, ...]:
    """Read the shape of an array of images. Raises DataError where its dtype or size is not what is expected."""
    with archive.open(member) as opened:
        shape, dtype = _parse_header(opened)
    if dtype != np.uint8 or len(shape) not in (3, 4):
        raise DataError(
            f"{path}: {name}: expected uint8 [n, H, W] or [n, H, W, C], got {dtype} {list(shape)}. Multiply shares by "
            "255 and convert, channels last"
        )
    if int(np.prod(shape, dtype=object)) > archive.getinfo(member).file_size:
        raise DataError(f"{path}: {name} says it has the shape {list(shape)}, which is more than it holds")
    return shape


def _parse_header(opened: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(opened)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(opened)
    return shape, dtype


def _labels(archive: zipfile.ZipFile, member: str, path: Path, name: str) -> NDArray[np.int64]:
    with archive.open(member) as opened:
        shape, dtype = _parse_header(opened)
    column = shape[:1] if len(shape) == 2 and shape[1] == 1 else shape
    too_many = int(np.prod(shape, dtype=object)) * dtype.itemsize > archive.getinfo(member).file_size
    if dtype.kind not in "iu" or len(column) != 1 or too_many:
        raise DataError(f"{path}: {name}: expected whole numbers [n], got {dtype} {list(shape)}")
    return _load(archive, member).reshape(column).astype(np.int64)


def _load(archive: zipfile.ZipFile, member: str) -> NDArray[Any]:
    with archive.open(member) as opened:
        array: NDArray[Any] = np.lib.format.read_array(opened, allow_pickle=False)
    return array
