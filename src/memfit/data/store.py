"""Content-addressed directories that are whole or absent, and verified before they are used again."""

import fcntl
import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memfit.files import fingerprint, fsync_directory, read_json, sha256_file, write_json


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash of every file of a directory."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files}


def is_whole(directory: Path, name: str) -> bool:
    """Say whether a directory goes by that name and holds what its manifest says, bit for bit."""
    try:
        manifest = read_json(directory / "manifest.json")
        checksum, arrays = manifest.pop("checksum"), manifest["arrays"]
        unharmed = checksum == fingerprint(manifest) and manifest["fingerprint"] == name
        plain = all(Path(file).name == file and file != ".." for file in arrays)  # none leads out of the directory
        return (
            unharmed
            and plain
            and all(
                (directory / file).stat().st_size == told["bytes"] and sha256_file(directory / file) == told["sha256"]
                for file, told in arrays.items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Hold a directory's lock, so that of two processes one builds and the other finds it built."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `directory` on success and vanishes on an exception.

    Call it while the directory is owned: what a killed process left behind is removed first.
    """
    for left in directory.parent.glob(f".{directory.name}.*.tmp"):
        shutil.rmtree(left)
    token = secrets.token_hex(4)
    temporary = directory.parent / f".{directory.name}.{token}.tmp"
    old = directory.parent / f".{directory.name}.{token}.old.tmp"
    temporary.mkdir()
    try:
        yield temporary
        fsync_directory(temporary)
        if directory.exists():
            directory.rename(old)
        temporary.rename(directory)
        fsync_directory(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def built(store: Path, name: str, build: Callable[[Path], dict[str, Any]], *, fresh: bool = False) -> Path:
    """Return `store/name`, as it is if it is whole; otherwise, or with `fresh`, build it anew.

    build: fills an empty directory and returns its manifest, to which the name is added as "fingerprint".
    """
    directory = store / name
    with owned(directory):
        if fresh or not is_whole(directory, name):
            with replaced(directory) as temporary:
                write_manifest(temporary, {"fingerprint": name, **build(temporary)})
    return directory


def describe_sources(files: Iterable[tuple[str, str, int]]) -> dict[str, Any]:
    """Describe files, each its sha256, name and bytes, in one entry: how many, their bytes, and one hash over all."""
    told, count, num_bytes = hashlib.sha256(), 0, 0
    for sha256, name, size in files:
        told.update(f"{sha256} {name}\n".encode("utf-8", "surrogateescape"))
        count, num_bytes = count + 1, num_bytes + size
    return {"files": count, "bytes": num_bytes, "sha256": told.hexdigest()}


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a directory, with size and hash of its arrays and a checksum of its own."""
    whole = {**manifest, "arrays": describe_files(directory)}
    write_json(directory / "manifest.json", {**whole, "checksum": fingerprint(whole)})
