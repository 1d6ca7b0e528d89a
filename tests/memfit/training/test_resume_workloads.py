"""Stages of every workload that were stopped end as those that were not, to the last bit."""

import shutil
from pathlib import Path

import pytest

import memfit
from memfit import errors
from memfit.data.image_spec import ImageSpec
from memfit.data.images import outline_images
from memfit.workloads import language_settings
from memfit.workloads.custom_settings import CustomKind, Model, Settings
from memfit.workloads.forecast_settings import Model as Forecast
from memfit.workloads.language_settings import CorpusData, LanguageKind
from memfit.workloads.language_settings import Model as Corpus
from memfit.workloads.registry import WORKLOADS

AUGMENT = {"crop_padding": 1, "flip": 0.5, "cutout": 3, "mixup": 0.4}
FORECASTER = {
    "horizon": 3,
    "window": 6,
    "season": 4,
    "hidden": 6,
    "dropout": 0.2,
    "norm": "batch",
    "head": "seq2seq",
    "attention": "luong",
    "forcing_samples": 300,
}
"""Everything that a stopped stage could lose: forcing, its count, dropout and running statistics."""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Made-up images of digits' shape: 70 of each split."""
    folder = tmp_path_factory.mktemp("images") / "data"
    outline_images(ImageSpec.from_dict({"source": {"kind": "sample"}}), folder)
    return folder


@pytest.fixture
def jobs(attempts, images, prepared, tiny_model, tmp_path, monkeypatch):
    """`jobs(workload, name, precision)`: a stage of three epochs of that workload."""
    shutil.copytree(Path(memfit.__file__).with_name("template_project"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    forecaster = Forecast(**FORECASTER).all_variants()["gru"]
    net = {"name": "resnet_light", "width_multiplier": 0.25, "norm": "batch", "dropout": 0.2}

    def custom() -> dict:
        kind, store = CustomKind("task:build"), tmp_path / "store"
        folder = kind.prepare(
            Settings(rows=60), Model(), store, code_version="", fresh=False, on_progress=lambda *_: None
        )
        return {"workload": "task:build", "data_dir": str(folder), "model": {"variant": "own", "variants": {"own": {}}}}

    def language() -> dict:
        kind, data = LanguageKind(), CorpusData(source={"kind": "sample"}, tokenizer={"vocab_size": 300})
        model = Corpus(seq_len=64, packing="document", d_model=16, num_layers=1, dropout=0.2)
        monkeypatch.setattr(language_settings, "OUTLINE_TOKENS", 1 << 12)
        if not (tmp_path / "corpus").exists():
            kind.outline(data, model, tmp_path / "corpus")
        variants = {"variant": "recurrent", "variants": model.all_variants()}
        return {"workload": "language", "data_dir": str(tmp_path / "corpus"), "model": variants, "loss": {}}

    made = {
        "series": dict,
        "language": language,
        "vision": lambda: {
            "workload": "vision",
            "data_dir": str(images),
            "model": {"variant": "net", "variants": {"net": net}},
            "loss": {"label_smoothing": 0.1, "augment": AUGMENT},
        },
        "forecast": lambda: {
            "workload": "forecast",
            "data_dir": str(prepared),
            "model": {"variant": "net", "variants": {"net": forecaster}},
            "loss": {},
        },
        "task:build": lambda: {**custom(), "loss": {}},
    }
    assert set(WORKLOADS) <= set(made)

    def build(workload: str, name: str, precision: str):
        stage = {"epochs": 3, "checkpoint_every_steps": 2}
        plan = {"precision": precision, "variant": "light" if workload == "series" else None}
        return attempts(name, stage=stage, plan=plan, **made[workload]())

    return build


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("workload", ["series", "language", "vision", "forecast", "task:build"])
def test_a_stage_that_was_stopped_twice_ends_the_same(jobs, workload, precision):
    whole, stopped = jobs(workload, "whole", precision), jobs(workload, "stopped", precision)
    whole.run()
    stopped.run_interrupted(3, 4)
    assert [stopped.weights(link) for link in ("last", "best")] == [whole.weights(link) for link in ("last", "best")]
    assert stopped.events() == whole.events()
    assert len(whole.of_kind("epoch")) == 3


def test_preparing_ones_own_data_runs_in_a_child_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text(
        "def prepare(data, directory):\n    (directory / 'x').write_text('half')\n    raise OSError('No space left')\n"
        "def build():\n    pass\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    kind = CustomKind("half:build")
    with pytest.raises(errors.ChildError, match="No space left"):
        kind.prepare(Settings(), Model(), tmp_path / "store", code_version="", fresh=False, on_progress=lambda *_: None)
    assert [path.name for path in (tmp_path / "store").iterdir() if path.is_dir()] == ["logs"]
