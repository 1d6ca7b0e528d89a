"""The files of one run directory, read once; what does not exist yet is empty."""

import tomllib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from memfit.files import read_json
from memfit.report.alignments import Alignment, read_alignment, read_header
from memfit.report.history import StageHistory, read_history

T = TypeVar("T")

PROBABILITIES, CONFIDENCE = "class_probabilities", "confidence"
"""In predictions.npz, a row's probabilities; as it is read, the largest of them."""


@dataclass
class Run:
    """Everything that a report may show."""

    path: Path
    info: dict[str, Any] = field(default_factory=dict)
    """run.json."""
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    plans: list[dict[str, Any]] = field(default_factory=list)
    stages: list[StageHistory] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Arrays of one number per test row."""
    alignment: Alignment | None = None
    """Where a forecast's attention looks."""
    card: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Files that exist and could not be read, each with the reason."""

    @property
    def name(self) -> str:
        """The run's name: from run.json, else from its directory."""
        return str(self.info.get("name") or self.path.parent.name or "run")

    @property
    def run_id(self) -> str:
        """The run's id: from run.json, else from its directory."""
        return str(self.info.get("run_id") or self.path.name)

    @property
    def unit(self) -> str:
        """The unit of the target, or nothing."""
        return str(self.evaluation.get("unit") or self.manifest.get("unit") or "")

    @property
    def export_dir(self) -> Path:
        """Where the exported bundle lies."""
        return self.path / "export"


def read_run(run_dir: Path) -> Run:
    """Read a run directory in whatever state it is.

    A missing file leaves its part empty; an unreadable one also leaves a line in `problems`.
    """
    run = Run(run_dir.resolve())
    run.info = _json_object(run, run.path / "run.json")
    run.config_text = _read(run, run.path / "config.toml", _text) or ""
    run.config = _read(run, run.path / "config.toml", _toml) or {}
    run.plans = objects(_json_object(run, run.path / "plan.json").get("stages"))
    run.stages = _stages(run)
    run.evaluation = _json_object(run, run.path / "evaluation.json")
    run.predictions = _read(run, run.path / "predictions.npz", _columns) or {}
    run.alignment = _read(run, run.path / "predictions.npz", read_alignment) if run.predictions else None
    run.card = _json_object(run, run.export_dir / "model_card.json")
    run.manifest = _manifest(run)
    return run


def objects(value: Any) -> list[dict[str, Any]]:
    """Return the JSON objects of a list; anything else is an empty list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def mapping(document: Any, *keys: str) -> dict[str, Any]:
    """Return the JSON object found by following keys, or an empty one."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document if isinstance(document, dict) else {}


def _read(run: Run, path: Path, parse: Callable[[Path], T]) -> T | None:
    if not path.is_file():
        return None
    try:
        return parse(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        run.problems.append(f"{path.name} could not be read: {error}")
        return None


def _json_object(run: Run, path: Path) -> dict[str, Any]:
    document = _read(run, path, read_json)
    if document is not None and not isinstance(document, dict):
        run.problems.append(f"{path.name} should hold a JSON object, not a {type(document).__name__}")
    return document if isinstance(document, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(_text(path))


def _columns(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of one dimension, and the largest probability of each row; others are not even unpacked."""
    with zipfile.ZipFile(path) as archive:
        dimensions = {member: _num_dimensions(archive, member) for member in archive.namelist()}
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        found = {member.removesuffix(".npy"): arrays[member] for member, count in dimensions.items() if count == 1}
        if dimensions.get(f"{PROBABILITIES}.npy") == 2 and arrays[PROBABILITIES].size:
            found[CONFIDENCE] = arrays[PROBABILITIES].max(axis=1)
    return found


def _num_dimensions(archive: zipfile.ZipFile, member: str) -> int:
    with archive.open(member) as opened:
        return len(read_header(opened)[0])


def _stages(run: Run) -> list[StageHistory]:
    """Read the stages in the order of the number that begins their directory's name."""
    paths = sorted((run.path / "stages").glob("*/events.jsonl"), key=lambda path: _numbered(path.parent.name))
    read = [_read(run, path, _history) for path in paths]
    return [history for history in read if history is not None]


def _history(path: Path) -> StageHistory:
    return read_history(path, _numbered(path.parent.name)[1])


def _numbered(directory: str) -> tuple[int, str]:
    number, dash, name = directory.partition("-")
    return (int(number), name) if dash and number.isdecimal() else (0, directory)


def _manifest(run: Run) -> dict[str, Any]:
    recorded = run.info.get("data_dir")
    if not isinstance(recorded, str) or not recorded:
        return {}
    beside = run.path / recorded  # an absolute path stays what it is
    return _json_object(run, (beside if beside.is_dir() else Path(recorded)) / "manifest.json")
