import json

import pytest

from memfit.errors import ConfigError
from memfit.starting_point import starting_point


def write(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """A run of eleven stages, so that names sort otherwise than numbers."""
    folder = tmp_path / "run"
    for number in (1, 2, 11):
        step = folder / "stages" / f"{number}-stage" / "checkpoints" / "step-5"
        write(step / "checkpoint.json", {"sha256": {"model.safetensors": f"{number}"}, "model": {"d_model": number}})
        (step.parent / "best").symlink_to("step-5")
    data = tmp_path / "store" / "data"
    write(data / "tokenizer.json", {})
    write(folder / "run.json", {"data_dir": str(data)})
    return folder


def test_a_run_starts_with_the_best_weights_of_its_last_stage(run, tmp_path):
    found = starting_point(run)
    assert (found.sha256, found.model) == ("11", {"d_model": 11})
    assert found.weights.parent.resolve() == run / "stages/11-stage/checkpoints/step-5"
    assert found.tokenizer == tmp_path / "store/data/tokenizer.json"
    assert found.state.name == "state.pt"


def test_a_checkpoint_of_any_stage_can_be_named(run):
    found = starting_point(run / "stages/2-stage/checkpoints/best")
    assert found.sha256 == "2"
    assert found.tokenizer is not None  # of the run that it belongs to


def test_a_bundle_says_what_it_holds(tmp_path):
    card = {"files": {"weights.safetensors": {"sha256": "a"}}, "model": {"d_model": 3}}
    write(tmp_path / "model_card.json", card)
    found = starting_point(tmp_path)
    assert (found.sha256, found.model, found.state, found.tokenizer) == ("a", {"d_model": 3}, None, None)


def test_a_bundle_without_weights_is_refused(tmp_path):
    write(tmp_path / "model_card.json", {"files": {}})
    with pytest.raises(ConfigError, match=r"export\.with_weights = true"):
        starting_point(tmp_path)


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a run directory, a checkpoint's folder or an exported bundle"):
        starting_point(tmp_path)
    write(tmp_path / "run.json", {})
    with pytest.raises(ConfigError, match="no trained weights yet"):
        starting_point(tmp_path)
    (tmp_path / "model_card.json").write_text("[1]")
    with pytest.raises(ConfigError, match="cannot be used"):
        starting_point(tmp_path)
