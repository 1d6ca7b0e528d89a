"""Checkpoints are whole or absent, notice damage, and never run code."""

import os
import pickle
import shutil

import pytest
import torch
from torch import nn

from memfit.errors import CheckpointError
from memfit.files import read_json, sha256_file, write_json
from memfit.training import checkpoint
from memfit.training.checkpoint import load_checkpoint, newest, point, prune, save_checkpoint

STATE = {"optimizer": {"lr": 0.1, "moment": torch.ones(3)}, "progress": {"epoch": 2}}


def save(folder, step: int, links=("last",), **record):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(step)
    return save_checkpoint(folder, nn.Linear(3, 2).state_dict(), STATE, {"step": step, **record}, links)


def test_reads_back_what_was_written(tmp_path):
    written = save(tmp_path, 7, fingerprint="f")
    loaded = load_checkpoint(tmp_path / "last")
    torch.manual_seed(7)
    expected = nn.Linear(3, 2).state_dict()
    assert written.name == "step-7"
    assert loaded.weights.keys() == expected.keys()
    assert all(torch.equal(loaded.weights[name], expected[name]) for name in expected)
    assert torch.equal(loaded.state["optimizer"]["moment"], torch.ones(3))
    assert loaded.state["progress"] == {"epoch": 2}
    assert (loaded.record["step"], loaded.record["fingerprint"]) == (7, "f")


def test_links_move_and_nothing_temporary_stays(tmp_path):
    save(tmp_path, 1, ("last", "best"))
    save(tmp_path, 2)
    assert (tmp_path / "last").readlink().name == "step-2"
    assert (tmp_path / "best").readlink().name == "step-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "step-1", "step-2"]


@pytest.mark.parametrize("broken", ["save_file", "write_json", "fsync"])
def test_a_write_that_fails_leaves_the_one_before(tmp_path, monkeypatch, broken):
    save(tmp_path, 1)

    def fail(*_arguments, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if broken == "fsync" else checkpoint, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-1"]
    assert newest(tmp_path).record["step"] == 1


def test_the_same_step_can_be_written_again(tmp_path):
    save(tmp_path, 3, note="first")
    save(tmp_path, 3, note="second")
    assert load_checkpoint(tmp_path / "last").record["note"] == "second"
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-3"]


def test_prune_keeps_what_links_name_and_clears_what_kills_left(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    point(tmp_path / "best", "step-2")
    (tmp_path / ".step-5.0a1b.tmp").mkdir()
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "step-2", "step-4"]


def test_the_newest_by_step_not_by_name(tmp_path):
    for step in (9, 10, 2):
        save(tmp_path, step)
    assert newest(tmp_path).record["step"] == 10


def test_no_checkpoint_is_none(tmp_path):
    assert newest(tmp_path) is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "weights torn": lambda folder: os.truncate(folder / "model.safetensors", 50),
    "weights changed": lambda folder: flip(folder / "model.safetensors"),
    "state changed": lambda folder: flip(folder / "state.pt"),
    "state gone": lambda folder: (folder / "state.pt").unlink(),
    "record gone": lambda folder: (folder / "checkpoint.json").unlink(),
    "record torn": lambda folder: os.truncate(folder / "checkpoint.json", 20),
    "record of another kind": lambda folder: write_json(folder / "checkpoint.json", [1]),
    "record without hashes": lambda folder: write_json(folder / "checkpoint.json", {"step": 2}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path, damage):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    DAMAGE[damage](folder)
    with pytest.raises(CheckpointError, match="step-2"):
        load_checkpoint(folder)
    with pytest.warns(RuntimeWarning, match="step-2.*Using the one before"):
        assert newest(tmp_path).record["step"] == 1


def test_hashes_that_agree_do_not_make_garbage_weights(tmp_path):
    folder = save(tmp_path, 2)
    (folder / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"not json")
    seal(folder)
    with pytest.raises(CheckpointError, match="not a usable checkpoint"):
        load_checkpoint(folder)


def seal(folder):
    """Make the record's hashes agree with the files, as an attacker would."""
    record = read_json(folder / "checkpoint.json")
    names = ("model.safetensors", "state.pt")
    write_json(folder / "checkpoint.json", {**record, "sha256": {name: sha256_file(folder / name) for name in names}})


class Bomb:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("raw", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, raw):
    folder, trace = save(tmp_path / "steps", 2), tmp_path / "ran"
    if raw:
        (folder / "state.pt").write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    else:
        torch.save({"optimizer": Bomb(trace)}, folder / "state.pt")
    seal(folder)
    with pytest.raises(CheckpointError, match="not a usable checkpoint"):
        load_checkpoint(folder)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists(), "the payload of this test must be able to run"
    shutil.rmtree(trace)
