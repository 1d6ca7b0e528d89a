"""Labeled images from archives, folders, arrays and packaged samples: which kind of source is read by which module."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from memfit.data import digits
from memfit.data.cifar import num_classes, read_cifar, wanted_files
from memfit.data.image_arrays import outline_npz, read_npz
from memfit.data.image_folders import class_names, list_folder, read_folder
from memfit.data.image_spec import ImageSource
from memfit.data.raw_images import SPLIT_CODES, ImageFile, Outline, RawImages
from memfit.data.spec import nearest
from memfit.errors import DataError
from memfit.files import sha256_file


def list_files(source: ImageSource) -> list[ImageFile]:
    """List the files of a source, in order of their names. Raises DataError where they are missing or too large."""
    if source.kind == "sample":
        return [ImageFile.found(digits.digits_path(), "digits.csv.gz")]
    path = _existing(source)
    try:
        if source.kind == "folder":
            return list_folder(path)
        if path.is_dir():
            path = _within(path, source.kind)
            names = [name for name in sorted(wanted_files(source.kind)) if (path / name).is_file()]
            return [ImageFile.found(path / name, name) for name in names]
        return [ImageFile.found(path, path.name)]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check its permissions") from error


def _existing(source: ImageSource) -> Path:
    assert source.path is not None
    try:
        path = Path(source.path).expanduser()
        there, is_directory = path.exists(), path.is_dir()
        siblings = [] if there or not path.parent.is_dir() else [p.name for p in path.parent.iterdir()]
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a home that nobody has
        raise DataError(f"{source.path[:200]!r}: no path: {error!s:.200}. Give one that exists") from error
    if not there:
        raise DataError(f"{path}: no such file or directory{nearest(path.name, siblings)}")
    if source.kind == "folder" and not is_directory:
        raise DataError(f"{path} is a file; expected a directory with one directory for each class")
    if source.kind == "npz" and is_directory:
        raise DataError(f"{path} is a directory; expected a .npz file")
    return path


def _within(path: Path, kind: str) -> Path:
    """Step into the one directory that CIFAR's archives hold, where the directory above it is given."""
    inner = {
        "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
        "cifar100": ("cifar-100-python", "cifar-100-binary"),
    }
    return next((path / name for name in inner[kind] if (path / name).is_dir()), path)


def hash_file(file: ImageFile) -> str:
    """Hash one file. Raises DataError where it cannot be read."""
    try:
        return sha256_file(file.path)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror}. Check its permissions") from error


def outline_source(source: ImageSource) -> Outline:
    """Tell shapes and classes from names and headers alone: those of CIFAR are known. Raises DataError."""
    if source.kind == "sample":
        return digits.OUTLINE
    if source.kind in ("cifar10", "cifar100"):
        return Outline((32, 32, 3), [str(index) for index in range(num_classes(source))])
    files = list_files(source)
    if source.kind == "folder":
        return Outline((source.image_size, source.image_size, source.channels), class_names(files))
    return outline_npz(files[0].path)


def read_images(
    source: ImageSource, files: list[ImageFile], scratch: Path, report: Callable[[float], None]
) -> RawImages:
    """Read and check all images. `scratch`: where those of a folder are laid down; `report` is told the share done.

    Raises DataError for what is missing, malformed, too large for this machine, or changed meanwhile.
    """
    if source.kind == "folder":
        return read_folder(source, files, scratch, report)
    raw = digits.read_digits(files[0].path) if source.kind == "sample" else _read_whole(source, files)
    for file in files:
        file.check_unchanged()
    return raw


def _read_whole(source: ImageSource, files: list[ImageFile]) -> RawImages:
    if not files:
        raise DataError(f"{source.path}: none of the files of {source.kind} is there; give its archive or directory")
    if source.kind == "npz":
        return read_npz(files[0].path)
    given = _existing(source)
    cifar = read_cifar(source, files[0].path.parent if given.is_dir() else given)
    splits = np.zeros(len(cifar.labels), np.int8)
    splits[len(splits) - cifar.num_test :] = SPLIT_CODES["test"]
    return RawImages(cifar.images, cifar.labels, splits, cifar.class_names)
