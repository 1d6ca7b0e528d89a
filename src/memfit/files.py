"""Files that are whole or absent: atomic writes, JSON, content hashes, and disks that have no room for them."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memfit.errors import RunStateError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOENT, errno.EIO)
"""Full, over quota, a file too large, read-only, vanished, broken."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it over `path`.

    On an exception the temporary file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_free_disk(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse work that a disk has no room for, before it begins. Raises: RunStateError."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise RunStateError(
            f"{what}: expected {num_bytes / 2**20:,.0f} MiB free in {folder}, got {free / 2**20:,.0f} MiB. Free some, "
            "or choose another directory."
        )


@contextmanager
def disk_errors(what: str, cure: str) -> Iterator[None]:
    """Say what a disk refused in the middle of the work, and what to do. Raises: RunStateError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise RunStateError(f"{what}: the disk refused: {error}. {cure}") from error


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable: a rename survives a power loss only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically; NaN and infinity are refused, as JSON has neither."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_if_whole(path: Path) -> dict[str, Any]:
    """Read a JSON object; one that is absent or torn is empty."""
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError):
        return {}


def sha256_file(path: Path) -> str:
    """Hash a file's bytes in bounded memory."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def fingerprint(document: Any) -> str:
    """Hash a JSON-able document, independent of the order of its keys (16 hex digits)."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
