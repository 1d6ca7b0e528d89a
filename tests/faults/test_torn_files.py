"""Files that a power loss or a bad disk cut short: the run that meets them ends as if they had not been."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from memfit.config import load_config
from memfit.files import read_json
from memfit.pipeline import Pipeline, open_run
from tests.faults.test_killed_children import steps

LAST = "report"


def perform(config: Path, folder: Path, events: list | None = None) -> Pipeline:
    """Begin or go on with the one run in a folder."""
    run = open_run(
        load_config(config),
        runs=folder / "runs",
        store=folder / "store",
        run_dir=folder / "runs" / "tiny" / "run",
        on_event=(events if events is not None else []).append,
    )
    run.perform_until(LAST)
    return run


def results(run: Pipeline) -> list[object]:
    """What a run is for: weights, events, scores, the model."""
    path, found = run.run.path, []
    for index in range(2):
        checkpoints = path / run.stage_dir(index) / "checkpoints"
        found += [(checkpoints / link / "model.safetensors").read_bytes() for link in ("last", "best")]
    with np.load(path / "predictions.npz") as predictions:
        found += [predictions[name].tobytes() for name in sorted(predictions)]
    return [*found, steps(run), read_json(path / "evaluation.json"), (path / "export" / "model.onnx").read_bytes()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_config_text):
    """A finished run, its config, and what it came to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.toml").write_text(tiny_config_text, encoding="utf-8")
    run = perform(folder / "tiny.toml", folder)
    return folder, results(run)


def files(folder: Path) -> list[Path]:
    """Every file that a run and its store hold, but for logs and locks."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    real = [path for path in found if path.resolve() == path]  # not a second time through a link
    return [path for path in real if path.suffix != ".log" and not path.name.startswith(".") and path.parent != folder]


def shorten(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.unlink()  # the copy beside it, if it is a link, stays
    path.write_bytes(content[: draw.randrange(len(content))] if content else b"")


@pytest.mark.parametrize("part", range(5))
def test_every_file_may_be_torn(whole, tmp_path, part):
    """Each file is in one of five draws, torn at a random offset; the run is given once more."""
    folder, expected = whole
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    draw = random.Random(part)
    chosen = files(tmp_path / "copy")[part::5]
    for path in chosen:
        shorten(path, draw)
    run = perform(tmp_path / "copy" / "tiny.toml", tmp_path / "copy")
    assert results(run) == expected
    assert all(step["status"] in ("ran", "reused") for step in run.run.record["steps"])


@pytest.mark.parametrize(
    "name",
    ["run.json", "config.toml", "plan.json", "evaluation.json", "export/model.onnx", "stages/1-first/events.jsonl"],
)
def test_a_file_torn_alone(whole, tmp_path, name):
    folder, expected = whole
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    shorten(tmp_path / "copy" / "runs" / "tiny" / "run" / name, random.Random(name))
    assert results(perform(tmp_path / "copy" / "tiny.toml", tmp_path / "copy")) == expected


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_torn_checkpoint_of_a_finished_stage_is_trained_again(whole, tmp_path, which):
    folder, expected = whole
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    checkpoints = tmp_path / "copy" / "runs" / "tiny" / "run" / "stages" / "1-first" / "checkpoints"
    shorten((checkpoints / which).resolve() / "model.safetensors", random.Random(which))
    events: list[dict] = []
    assert results(perform(tmp_path / "copy" / "tiny.toml", tmp_path / "copy", events)) == expected
    assert any(event["event"] == "warning" and "corrupt" in event["message"] for event in events)
