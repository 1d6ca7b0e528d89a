"""Weights that a training starts from: those of a finished run, of a checkpoint, or of an exported bundle."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memfit.errors import ConfigError
from memfit.files import read_json

WEIGHTS = "weights.safetensors"
"""The trained weights in an exported bundle."""
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class StartingPoint:
    """Where weights lie, and what is known of them."""

    weights: Path
    """A file of safetensors."""
    sha256: str
    """Of that file, as it was written."""
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of the model; empty where they were not recorded."""
    state: Path | None = None
    """The checkpoint's optimizer state, if there is one."""
    tokenizer: Path | None = None
    """Of a language model."""


def starting_point(path: str | Path) -> StartingPoint:
    """Find the weights of a run directory (its last stage's best), of a checkpoint's folder or of a bundle.

    Raises: ConfigError that says what was looked for.
    """
    folder = Path(path)
    try:
        if (folder / "model_card.json").is_file():
            return _of_bundle(folder)
        if (folder / "checkpoint.json").is_file():
            return _of_checkpoint(folder)
        if (folder / "run.json").is_file():
            return _of_run(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"start: {folder} cannot be used ({type(error).__name__}: {error}).") from error
    raise ConfigError(
        f"start: expected a run directory, a checkpoint's folder or an exported bundle, got {str(folder)!r}, which "
        "holds none of run.json, checkpoint.json, model_card.json."
    )


def _of_bundle(folder: Path) -> StartingPoint:
    card = read_json(folder / "model_card.json")
    if WEIGHTS not in card["files"]:
        raise ConfigError(f"start: the bundle {folder} holds no {WEIGHTS}. Export it with export.with_weights = true.")
    return StartingPoint(
        folder / WEIGHTS, card["files"][WEIGHTS]["sha256"], dict(card.get("model", {})), None, _if_there(folder)
    )


def _of_checkpoint(folder: Path) -> StartingPoint:
    record = read_json(folder / "checkpoint.json")
    run = next((parent for parent in folder.resolve().parents if (parent / "run.json").is_file()), None)
    return StartingPoint(
        folder / "model.safetensors",
        record["sha256"]["model.safetensors"],
        dict(record.get("model", {})),
        folder / "state.pt",
        _tokenizer(run) if run else None,
    )


def _of_run(folder: Path) -> StartingPoint:
    found = sorted(folder.glob("stages/*/checkpoints/best"), key=lambda best: int(best.parts[-3].partition("-")[0]))
    if not found:
        raise ConfigError(f"start: the run {folder} has no trained weights yet. Finish it: memfit run {folder}")
    return _of_checkpoint(found[-1])


def _tokenizer(run: Path) -> Path | None:
    recorded = read_json(run / "run.json").get("data_dir")
    return (_if_there(Path(recorded)) if recorded else None) or _if_there(run / "export")


def _if_there(folder: Path) -> Path | None:
    return folder / TOKENIZER if (folder / TOKENIZER).is_file() else None
