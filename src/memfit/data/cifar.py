"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), python and binary versions, from the archive or its directory."""

import gzip
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from memfit.data.image_spec import ImageSource
from memfit.data.plain_pickle import read_plain_pickle
from memfit.errors import DataError

MAX_ARCHIVE_BYTES = 1 << 29
"""Most bytes that an archive may expand to; the largest of the originals has 186 MB."""
MAX_MEMBER_BYTES = 1 << 28
"""Most bytes of one file in it; the largest of the originals has 155 MB."""
SIZE, CHANNELS = 32, 3
PIXELS = SIZE * SIZE * CHANNELS


@dataclass(frozen=True)
class Layout:
    """Which files a version has, and how a record of the binary one begins."""

    train: tuple[str, ...]
    test: str
    names: str
    """The file with the classes' names; an archive may come without it."""
    num_label_bytes: int = 0
    """Label bytes before the pixels of a binary record; 0 in the python version."""


LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "cifar10": (
        Layout(tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        Layout(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", 1),
    ),
    "cifar100": (
        Layout(("train",), "test", "meta"),
        Layout(("train.bin",), "test.bin", "fine_label_names.txt", 2),
    ),
}
"""The python and the binary version of each."""


@dataclass(frozen=True)
class Cifar:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N], the test images last, of which there are so many."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    num_test: int
    class_names: list[str]


def num_classes(source: ImageSource) -> int:
    """Return how many classes a version of the data has."""
    return 10 if source.kind == "cifar10" else 100 if source.labels == "fine" else 20


def wanted_files(kind: str) -> list[str]:
    """Name every file that either version may have."""
    found = [name for layout in LAYOUTS[kind] for name in (*layout.train, layout.test, layout.names)]
    return [*found, "coarse_label_names.txt"] if kind == "cifar100" else found


def read_cifar(source: ImageSource, path: Path) -> Cifar:
    """Read all images of an archive or a directory. Raises DataError for files that are missing or malformed."""
    files = _from_directory(path, source.kind) if path.is_dir() else _from_archive(path, source.kind)
    layout = _complete(files, source.kind, path)
    parts = [_part(files[name], layout, source, name) for name in (*layout.train, layout.test)]
    images, labels = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    count = num_classes(source)
    if labels.size and labels.max() >= count:
        raise DataError(f"{path}: expected labels 0 to {count - 1}, got {labels.max()}. Is it {source.kind}?")
    return Cifar(images, labels.astype(np.int64), len(parts[-1][1]), _class_names(files, layout, source))


def _complete(files: Mapping[str, bytes], kind: str, path: Path) -> Layout:
    """Choose the version whose files are all there."""
    missing: list[list[str]] = []
    for layout in LAYOUTS[kind]:
        missing.append([name for name in (*layout.train, layout.test) if name not in files])
        if not missing[-1]:
            return layout
    fewest = min(missing, key=len)
    raise DataError(
        f"{path}: expected the files of {kind}, python or binary version; {', '.join(fewest)} not there. Give the "
        "original archive, or the directory that it was extracted to"
    )


def _from_directory(path: Path, kind: str) -> dict[str, bytes]:
    found = {}
    for name in wanted_files(kind):
        file = path / name
        if file.is_file():
            _check_size(file.stat().st_size, str(file))
            found[name] = file.read_bytes()
    return found


def _check_size(num_bytes: int, what: str) -> None:
    if num_bytes > MAX_MEMBER_BYTES:
        most = MAX_MEMBER_BYTES >> 20
        raise DataError(f"{what}: expected at most {most} MiB, got {num_bytes >> 20} MiB. Take the original files")


class _Bounded:
    """A stream that ends with an error after so many bytes."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream, self._path, self._left = stream, path, MAX_ARCHIVE_BYTES

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        part = self._stream.read(min(size, self._left + 1))
        self._left -= len(part)
        if self._left < 0:
            raise DataError(
                f"{self._path}: expected to expand to at most {MAX_ARCHIVE_BYTES >> 20} MiB, got more. Take the "
                "original archive"
            )
        return part


def _from_archive(path: Path, kind: str) -> dict[str, bytes]:
    """Read the wanted members of a tar file, compressed or not, without writing any."""
    wanted, found = set(wanted_files(kind)), {}
    try:
        with path.open("rb") as raw, _expanded(raw) as stream:
            bounded: Any = _Bounded(stream, path)
            with tarfile.open(fileobj=bounded, mode="r|") as archive:
                for member in archive:
                    name = PurePosixPath(member.name).name
                    if name in wanted and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                        if name in found:
                            raise DataError(f"{path}: {name} is there twice. Take the original archive")
                        _check_size(member.size, f"{path}, {name}")
                        opened = archive.extractfile(member)
                        assert opened is not None
                        found[name] = opened.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected a tar file (.tar.gz or .tar); {error!s:.200}. Fetch it again") from error
    return found


def _expanded(raw: IO[bytes]) -> IO[bytes]:
    """Open gzip by its first bytes, whatever the file's name."""
    compressed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if compressed else raw  # type: ignore[return-value]


def _part(
    content: bytes, layout: Layout, source: ImageSource, name: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the images [n, 32, 32, 3] and labels [n] of one file."""
    if layout.num_label_bytes:
        pixels, labels = _binary(content, layout, source, name)
    else:
        pixels, labels = _python(content, source, name)
    return np.ascontiguousarray(pixels.reshape(-1, CHANNELS, SIZE, SIZE).transpose(0, 2, 3, 1)), labels


def _binary(
    content: bytes, layout: Layout, source: ImageSource, name: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    length = layout.num_label_bytes + PIXELS
    if not content or len(content) % length:
        raise DataError(f"{name}: expected records of {length} bytes, got {len(content)} bytes. Fetch it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, length)
    column = 1 if source.kind == "cifar100" and source.labels == "fine" else 0
    return records[:, layout.num_label_bytes :], records[:, column].astype(np.int64)


def _python(content: bytes, source: ImageSource, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    key = "labels" if source.kind == "cifar10" else f"{source.labels}_labels"
    document = _texts(read_plain_pickle(content, name))
    pixels, labels = document.get("data"), document.get(key)
    whole = isinstance(pixels, np.ndarray) and pixels.shape[1:] == (PIXELS,) and len(pixels) > 0
    if not whole or not isinstance(labels, list) or len(labels) != len(np.asarray(pixels)):
        raise DataError(f"{name}: expected data [n, {PIXELS}] of unsigned bytes and {key} [n]. Fetch it again")
    if not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DataError(f"{name}: expected {key} of whole numbers from 0. Fetch it again")
    return np.asarray(pixels), np.array(labels, np.int64)


def _texts(document: Any) -> dict[str, Any]:
    """Return a dict with its keys as text: Python 3 reads those of Python 2 as either."""
    if not isinstance(document, dict):
        return {}
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in document.items()}


def _class_names(files: Mapping[str, bytes], layout: Layout, source: ImageSource) -> list[str]:
    count = num_classes(source)
    names: list[Any] = []
    if layout.num_label_bytes:
        file = f"{source.labels}_label_names.txt" if source.kind == "cifar100" else layout.names
        names = files.get(file, b"").decode("utf-8", "replace").split()
    elif layout.names in files:
        key = "label_names" if source.kind == "cifar10" else f"{source.labels}_label_names"
        found = _texts(read_plain_pickle(files[layout.names], layout.names)).get(key)
        names = found if isinstance(found, list) else []
    names = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)[:200] for name in names]
    return names if len(names) == count else [str(index) for index in range(count)]
