"""A finished language model is started from: with other documents, all of it or low-rank changes alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from memfit.config import validate
from memfit.errors import ConfigError
from memfit.export.infer import Model as Exported
from memfit.pipeline import open_run

pytestmark = pytest.mark.end_to_end
STAGE = {"name": "one", "epochs": 1, "epoch_steps": 6, "global_batch_size": 4, "lr": 1e-3}


def config_of(path, words, model=None, **stage):
    """Describe a run on made-up sentences of some words."""
    lines = [" ".join(words[(start + step) % len(words)] for step in range(30)) for start in range(60)]
    path.write_text("\n".join(f"{line} {number}" for number, line in enumerate(lines)), encoding="utf-8")
    source = {"paths": [str(path)], "separator": "\n"}
    tokenizer = {} if (model or {}).get("start") else {"vocab_size": 270}
    document = {
        "name": path.stem,
        "workload": "language",
        "data": {
            "source": source,
            "tokenizer": tokenizer,
            "near_duplicates": 0,
            "validation_share": 0.2,
            "test_share": 0.2,
        },
        "model": {"seq_len": 16, "d_model": 16, "num_layers": 1, **(model or {})},
        "plan": {"budget": "2GiB", "checkpointing": ["none"]},
        "export": {"samples": 4},
        "stages": [{**STAGE, **stage}],
    }
    return validate(document, "test")


def finish(config, folder):
    run = open_run(config, runs=folder / "runs", store=folder / "store")
    run.perform_until("report")
    return run.run.path


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    return finish(config_of(folder / "base.txt", ["the", "plan", "fits", "the", "memory", "of", "a", "card"]), folder)


def weights_of(path):
    return load_file(path / "stages/1-one/checkpoints/last/model.safetensors")


@pytest.mark.parametrize("form", ["run", "bundle"])
def test_low_rank_changes_leave_the_rest_as_it_was(first, form, tmp_path):
    start = str(first if form == "run" else shutil.copytree(first / "export", tmp_path / "bundle"))
    model = {"start": start, "lora_rank": 2, "lora_targets": ["*.ff.*"]}
    run = finish(
        config_of(tmp_path / "other.txt", ["two", "cats", "sleep", "on", "warm", "cards"], model, train=["*lora_*"]),
        tmp_path,
    )
    before, after = load_file(first / "export/weights.safetensors"), weights_of(run)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    changed = [tensor for name, tensor in after.items() if "lora_b" in name]
    assert changed
    assert all(tensor.abs().max() > 0 for tensor in changed)
    card = json.loads((run / "export/model_card.json").read_text())
    assert (
        card["language"]["tokenizer_sha256"]
        == json.loads((first / "export/model_card.json").read_text())["language"]["tokenizer_sha256"]
    )
    Exported(run / "export").check()


def test_patterns_freeze_the_rest(first, tmp_path):
    model = {"start": str(first)}
    run = finish(config_of(tmp_path / "other.txt", ["two", "cats", "sleep"], model, train=["blocks.*"]), tmp_path)
    before, after = load_file(first / "export/weights.safetensors"), weights_of(run)
    assert torch.equal(after["embedding.weight"], before["embedding.weight"])
    assert not torch.equal(after["blocks.0.ff.up.weight"], before["blocks.0.ff.up.weight"])


def test_a_finished_model_can_be_grown_from(first, tmp_path):
    model = {"start": str(first), "d_model": 32, "num_layers": 2}
    run = finish(config_of(tmp_path / "other.txt", ["two", "cats", "sleep"], model), tmp_path)
    assert weights_of(run)["embedding.weight"].shape[1] == 32


def test_another_start_trains_again_and_none_is_refused(first, tmp_path):
    config = config_of(tmp_path / "other.txt", ["two", "cats", "sleep"], {"start": str(first)})
    begun = open_run(config, runs=tmp_path / "runs", store=tmp_path / "store")
    key = begun._start_key
    assert key == json.loads((first / "export/model_card.json").read_text())["files"]["weights.safetensors"]["sha256"]
    with pytest.raises(ConfigError, match="expected a run directory"):
        open_run(
            config.model_copy(update={"model": config.model.model_copy(update={"start": str(tmp_path / "none")})}),
            runs=tmp_path,
            store=tmp_path,
        )
