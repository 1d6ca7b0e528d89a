"""Checkpoints: whole or absent, checked by hash, loadable without unpickling code.

A checkpoint is a folder `step-N`; `last` and `best` are links to such folders, exchanged atomically.
"""

import errno
import os
import pickle
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memfit.errors import CheckpointError
from memfit.files import fsync_directory, read_json, sha256_file, write_json

WEIGHTS, STATE, RECORD = "model.safetensors", "state.pt", "checkpoint.json"
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip
"""What readers raise at files that are missing, torn, or hold code."""
_STEP, _LINK = re.compile("step-[0-9]{1,18}"), re.compile("last|best|epoch-[0-9]+")
_REFUSED = ("iostream error", "PytorchStreamWriter", "unexpected pos", "I/O error", "IoError", "os error")
"""What writers in C++ and Rust say where a disk refuses, instead of an OSError."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and whose hashes agree."""

    weights: dict[str, torch.Tensor]
    state: dict[str, Any]
    record: dict[str, Any]


def write_payload(folder: Path, weights: Mapping[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write weights and state into a folder and fsync them; used by training and by the probe alike."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
        torch.save(state, folder / STATE)
    except (RuntimeError, SafetensorError) as error:
        if not any(words in str(error) for words in _REFUSED):
            raise
        raise OSError(errno.EIO, f"{error}", str(folder)) from error
    for name in (WEIGHTS, STATE):
        with (folder / name).open("rb") as written:
            os.fsync(written.fileno())


def save_checkpoint(
    checkpoints: Path,
    weights: Mapping[str, torch.Tensor],
    state: dict[str, Any],
    record: dict[str, Any],
    links: tuple[str, ...],
) -> Path:
    """Write `step-N` atomically, then point the links at it.

    `record` is JSON-able and holds "step", and "best_step" where an earlier one has the best weights so far (else 0 or
    its own); the links and the hashes of the files are added to it.
    """
    target = checkpoints / f"step-{record['step']}"
    temporary = checkpoints / f".{target.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()  # and no parents: a folder that has vanished is not made up
    try:
        write_payload(temporary, weights, state)
        hashes = {name: sha256_file(temporary / name) for name in (WEIGHTS, STATE)}
        write_json(temporary / RECORD, {**record, "links": links, "sha256": hashes})
        if target.exists():  # the same step again, after a resume: out of the way first, so that no kill leaves half
            target.rename(checkpoints / f".{target.name}.{secrets.token_hex(4)}.old.tmp")
        temporary.rename(target)
        fsync_directory(checkpoints)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for link in links:
        point(checkpoints / link, target.name)
    return target


def point(link: Path, target: str) -> None:
    """Make a link point at a sibling, atomically."""
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}.tmp")
    temporary.symlink_to(target)
    temporary.replace(link)
    fsync_directory(link.parent)


def prune(checkpoints: Path, newest: int = 1) -> None:
    """Remove the steps that are neither among the newest nor what a link points at, and what a killed write left."""
    kept = {link.resolve().name for link in checkpoints.iterdir() if link.is_symlink()}
    kept |= {folder.name for folder in _by_age(checkpoints)[:newest]}
    for folder in (*checkpoints.glob("step-*"), *checkpoints.glob(".step-*.tmp")):
        if folder.name not in kept:
            shutil.rmtree(folder)


def _by_age(checkpoints: Path) -> list[Path]:
    """List the steps, the newest first."""
    steps = [folder for folder in checkpoints.glob("step-*") if _STEP.fullmatch(folder.name)]
    return sorted(steps, key=lambda folder: int(folder.name[5:]), reverse=True)


def _check_names(record: dict[str, Any]) -> None:
    """Refuse what would become a path that leads out of the folder of checkpoints. Raises: ValueError, TypeError."""
    links, best = record.get("links", []), record.get("best_step", 0)
    if not all(isinstance(link, str) and _LINK.fullmatch(link) for link in links):
        raise ValueError(f"expected links last, best or epoch-N, got {links!r:.80}")
    if not isinstance(best, int):
        raise TypeError(f"expected a number as best_step, got {best!r:.80}")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after comparing its files with their hashes.

    Raises: CheckpointError when a file is missing, torn, corrupt, or holds anything but tensors and plain values.
    """
    with _unusable(folder):
        record = _checked_record(folder)
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        return Checkpoint(load_file(folder / WEIGHTS), state, record)


def check_hashes(folder: Path) -> None:
    """Compare a checkpoint's files with their hashes, and read nothing of it into memory. Raises: CheckpointError."""
    with _unusable(folder):
        _checked_record(folder)


@contextmanager
def _unusable(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"{folder}: not a usable checkpoint ({type(error).__name__}: {error}).") from error


def _checked_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = read_json(folder / RECORD)
    _check_names(record)
    for name in (WEIGHTS, STATE):
        expected = record["sha256"][name]
        if (got := sha256_file(folder / name)) != expected:
            raise CheckpointError(f"{folder / name}: expected sha256 {expected[:12]}…, got {got[:12]}…: it is corrupt.")
    return record


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def newest(
    checkpoints: Path,
    fingerprint: str | None = None,
    log_bytes: int | None = None,
    warn: Callable[[str], None] = _warn,
) -> Checkpoint | None:
    """Read the newest usable checkpoint, and point its links at it; others are passed over with a warning.

    fingerprint: one of another is set aside under another name, where nothing prunes it. log_bytes: length of the event
    log, which must reach as far as the checkpoint. The best weights before it must be usable as well: they may be
    needed yet.
    """
    for folder in _by_age(checkpoints):
        try:
            found = load_checkpoint(folder)
            if fingerprint not in (None, found.record.get("fingerprint")):
                aside = folder.rename(folder.with_name(f"foreign-{folder.name}.{secrets.token_hex(4)}"))
                raise CheckpointError(
                    f"{folder}: expected a checkpoint of this stage ({fingerprint}), got one of another config, data "
                    f"or code ({found.record.get('fingerprint')}). Set aside as {aside.name}."
                )
            if log_bytes is not None and found.state["progress"]["events_bytes"] > log_bytes:
                raise CheckpointError(f"{folder}: the event log beside it ends before it: it is torn.")
            if found.record.get("best_step", 0) not in (0, found.record["step"]):
                check_hashes(checkpoints / f"step-{found.record['best_step']}")
        except CheckpointError as error:
            warn(f"{error} Using the one before {folder.name}.")
        else:
            for link in found.record.get("links", ()):  # a kill may have come between the two
                point(checkpoints / link, folder.name)
            return found
    return None
