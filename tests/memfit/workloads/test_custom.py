"""A user's own model and data go through the pipeline as memfit's workloads do."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfit
from memfit.config import load_config, to_toml
from memfit.errors import ChildError, ConfigError
from memfit.pipeline import open_run
from memfit.step import StepLayout, TrainingStep
from memfit.training.evaluate import evaluate_split
from memfit.training.program import stage_program
from memfit.workloads.custom import CustomWorkload
from memfit.workloads.registry import load_workload

TEMPLATE = Path(memfit.__file__).with_name("template_project")
STAGE = {"train": ["*"], "optimizer": {"name": "adam", "lr": 0.01}}


def arrays(rows: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    tokens = generator.normal(size=(rows, 5, 3)).astype(np.float32)
    lengths = generator.integers(1, 6, size=rows)
    return {"tokens": tokens, "mask": (np.arange(5) < lengths[:, None]).astype(np.float32), "y": tokens.sum(2)}


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, tokens, mask):
        return self.layers(tokens).squeeze(2) * mask


def masked_loss(model, batch):
    errors = (model(batch["tokens"], batch["mask"]) - batch["y"]).pow(2) * batch["mask"]
    return {"error": errors.sum()}


def task(**changes) -> memfit.Task:
    settings = {
        "model": Net,
        "splits": {
            name: arrays(rows, seed)
            for seed, (name, rows) in enumerate({"train": 24, "validation": 9, "test": 8}.items())
        },
        "inputs": ("tokens", "mask"),
        "loss": masked_loss,
        "count": lambda batch: {"error": float(batch["mask"].sum())},
        "predict": lambda model, tokens, mask: {"z": model(tokens, mask)},
        "score": lambda truth, predictions: {"mae": np.abs(truth["y"] - predictions["z"]).mean(), "undefined": None},
        "baselines": lambda train, split: {"zero": {"z": np.zeros_like(split["y"])}},
    }
    return memfit.Task(**{**settings, **changes})


def workload(**changes) -> CustomWorkload:
    return CustomWorkload(task(**changes), {"variant": "own", "variants": {"own": {}, "wide": {"width": 9}}})


@pytest.mark.parametrize("own_count", [True, False])
@pytest.mark.parametrize("accumulation_steps", [1, 3, 7])
def test_gradients_do_not_depend_on_the_cut(own_count, accumulation_steps):
    """Masked positions counted by the task; or a mean over samples that memfit counts itself."""

    def mean(model, batch):
        return F.mse_loss(model(batch["tokens"], batch["mask"]), batch["y"])

    made = workload() if own_count else workload(loss=mean, count=None)
    torch.manual_seed(0)
    model = made.variants()["own"]()
    program = stage_program(made, STAGE)
    batch = made.batch("train", np.arange(13))
    expected = masked_loss(model, batch)["error"] / batch["mask"].sum() if own_count else mean(model, batch)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    stats = TrainingStep(StepLayout(accumulation_steps), program, model, optimizer)(batch)
    assert stats.total == pytest.approx(expected.item(), rel=1e-5)
    for parameter, start, gradient in zip(model.parameters(), before, wanted, strict=True):
        assert torch.allclose(start - parameter.detach(), gradient, rtol=1e-4, atol=1e-6)


def test_evaluation_is_the_mean_over_the_split_whatever_the_batch():
    made = workload()
    model = made.variants()["own"]().eval()
    whole = evaluate_split(made, model, "validation", batch_size=9, layout=StepLayout())
    parts = evaluate_split(made, model, "validation", batch_size=2, layout=StepLayout())
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert np.allclose(parts[1]["z"], whole[1]["z"], atol=1e-6)
    truth = made.truth("validation", np.arange(9))
    assert list(truth) == ["y"]
    assert made.score(truth, whole[1])["undefined"] is None
    assert list(made.baselines("validation")) == ["zero"]


def test_variants_get_their_settings_by_name():
    built = {name: build() for name, build in workload().variants().items()}
    assert [built[name].layers[0].out_features for name in ("own", "wide")] == [4, 9]


def test_augmentation_is_for_training_alone():
    made = workload(augment=lambda batch: {**batch, "tokens": batch["tokens"] * 0})
    assert not made.batch("train", np.arange(3))["tokens"].any()
    assert made.batch("validation", np.arange(3))["tokens"].any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"splits": {"train": arrays(3, 0)}}, "expected train, validation, test, got train"),
        ({"splits": {s: {**arrays(3, 0), "y": np.zeros(2)} for s in ("train", "validation", "test")}}, "one length"),
        ({"splits": {s: arrays(0, 0) for s in ("train", "validation", "test")}}, "one length above 0"),
        ({"inputs": ("tokens", "other")}, r"\['other'\] are not among the arrays"),
        ({"inputs": ()}, "expected 1 to 4, got 0"),
    ],
)
def test_a_task_that_cannot_be_trained_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        task(**changes)


# By import path, from a config


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The template, as `memfit init` makes it, in the current folder."""
    shutil.copytree(TEMPLATE, tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path / "mine"
    sys.modules.pop("task", None)


def start(project: Path, *overrides: str, **settings):
    quick = ("data.rows=300", "stages.0.epochs=2", *overrides)
    config = load_config(project / "config.toml", quick)
    return open_run(config, runs=project / "runs", store=project / "store", **settings)


@pytest.mark.end_to_end
def test_the_template_runs_at_once_and_is_reused_until_its_code_changes(project):
    run = start(project)
    run.perform_until("report")
    summary = run.summary()
    assert summary["metrics"]["mae"] < 2 * summary["baselines"]["train_mean"]["mae"]
    assert "MAE" in (run.run.path / "report.html").read_text(encoding="utf-8")
    card = json.loads((run.run.path / "export" / "model_card.json").read_text(encoding="utf-8"))
    assert card["signature"]["inputs"][0]["shape"] == ["batch", 8]
    assert [entry["name"] for entry in card["signature"]["outputs"]] == ["y_predicted"]
    again = start(project)
    again.perform_until("report")
    assert {step["status"] for step in again.run.record["steps"] if step["name"] != "report"} == {"reused"}
    (project / "task.py").write_text((project / "task.py").read_text(encoding="utf-8") + "\n# more\n", encoding="utf-8")
    changed = start(project)
    changed.perform("prepare")
    assert changed.run.step("prepare")["status"] == "ran"


def test_a_job_names_the_users_module(project):
    run = start(project)
    run.perform("prepare")
    job = {"workload": "task:build", "data_dir": run.run.record["data_dir"], "loss": {}}
    made = load_workload({**job, "model": {"variant": "own", "variants": {"own": {"hidden": 5}}}})
    assert made.num_samples("train") == 300
    assert made.variants()["own"]().head.in_features == 5


def test_its_settings_are_kept_as_they_are(project):
    config = load_config(project / "config.toml", ["data.nested={a=[1, 2]}", "model.hidden=9"])
    assert config.data.model_extra == {"rows": 2000, "nested": {"a": [1, 2]}}
    assert config.model.all_variants() == {
        "own": {"hidden": 9, "num_layers": 2},
        "small": {"hidden": 32, "num_layers": 2},
    }
    (project / "again.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(project / "again.toml") == config


@pytest.mark.parametrize(
    ("workload", "error", "said"),
    [
        ("nowhere:build", ConfigError, "expected a module that Python finds, got 'nowhere:build'"),
        ("task:other", ConfigError, "task has no function 'other'"),
        ("task:Net", ConfigError, "expected it to return a memfit.Task, got Net"),
        ("broken:build", ChildError, "ZeroDivisionError"),
    ],
)
def test_a_module_that_is_not_there_or_fails_is_named(project, workload, error, said):
    (project / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    run = start(project, f"workload={workload}")
    with pytest.raises(error, match=said):
        run.perform_until("plan")
