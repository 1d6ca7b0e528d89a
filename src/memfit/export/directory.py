"""A directory that appears whole: built beside its place, moved in at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memfit.errors import ExportError
from memfit.files import fsync_directory


@contextmanager
def replace_directory(target: Path, *, marker: str) -> Iterator[Path]:
    """Yield an empty directory beside `target`; on success it takes `target`'s place.

    marker: a file by which an earlier directory of this kind is known; anything else there is refused with an
    ExportError before work begins. On an exception `target` stays as it was. One writer at a time: names left by
    a killed one are taken over.
    """
    building, previous = (target.with_name(f".{target.name}.{role}") for role in ("building", "previous"))
    target.parent.mkdir(parents=True, exist_ok=True)
    if previous.exists() and not target.exists():
        previous.rename(target)  # killed between the two renames of `swap`
    if target.exists() and not (target / marker).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} is there and holds no {marker}; it is not replaced. Name another directory")
    discard(building, previous)
    building.mkdir()
    try:
        yield building
        fsync_tree(building)
        swap(building, target, previous)
    finally:
        discard(building, previous)


def swap(building: Path, target: Path, previous: Path) -> None:
    """Move `building` to `target`, keeping the old one as `previous`; put it back where that fails."""
    if target.exists():
        target.rename(previous)
    try:
        building.rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise
    fsync_directory(target.parent)


def discard(*folders: Path) -> None:
    """Remove directories that may be there."""
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def fsync_tree(folder: Path) -> None:
    """Make every file and name below `folder` durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as opened:
                os.fsync(opened.fileno())
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        fsync_directory(path)
