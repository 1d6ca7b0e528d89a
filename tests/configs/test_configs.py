"""Every shipped config loads, writes itself out, builds its model on data of its shapes, and trains it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from memfit.config import load_config, to_toml
from memfit.memory.units import parse_bytes
from memfit.pipeline import open_run
from memfit.step import StepLayout, TrainingStep
from memfit.training.optimizers import freeze_all_but
from memfit.training.program import stage_program
from memfit.workloads.registry import WORKLOADS, load_workload

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def outlined(config, folder: Path):
    """Build a config's workload on made-up data of the shapes that it says."""
    config.kind.outline(config.data, config.model, folder / "data")
    variants = config.model.all_variants()
    job = {
        "workload": config.workload,
        "data_dir": str(folder / "data"),
        "model": {"variant": next(iter(variants)), "variants": variants},
        "loss": config.stages[0].loss.model_dump(mode="json"),
    }
    return load_workload(job)


@pytest.fixture(params=CONFIGS, ids=[path.stem for path in CONFIGS])
def config(request):
    return load_config(request.param)


def named(stem: str):
    return load_config(next(path for path in CONFIGS if path.stem == stem))


def test_the_documented_configs_are_shipped():
    assert {path.stem for path in CONFIGS} >= {
        *("smoke", "weather_quick", "multiscale_t4"),
        *("digits_smoke", "digits_quick", "cifar10_resnet18"),
        *("forecast_smoke", "forecast_quick"),
    }
    assert {load_config(path).workload for path in CONFIGS} == set(WORKLOADS)


def test_writes_itself_out_and_back(config, tmp_path):
    (tmp_path / "resolved.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "resolved.toml") == config


def test_its_first_stage_takes_two_micro_steps(config, tmp_path):
    workload = outlined(config, tmp_path)
    torch.manual_seed(0)
    program = stage_program(workload, config.stages[0].arguments())
    model = program.build().train()
    step = TrainingStep(StepLayout(2), program, model, program.optimizer(model), clip=config.stages[0].clip or None)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    stats = step(workload.batch("train", np.arange(4)))
    assert np.isfinite(stats.total)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_its_stages_train_parameters_that_exist(config, tmp_path):
    model = next(iter(outlined(config, tmp_path).variants().values()))()
    for stage in config.stages:
        freeze_all_but(model, list(stage.train))
        assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.end_to_end
@pytest.mark.parametrize("stem", ["digits_smoke", "forecast_smoke"])
def test_smoke_configs_go_through_the_whole_pipeline(stem, tmp_path):
    run = open_run(named(stem), runs=tmp_path / "runs", store=tmp_path / "store")
    run.perform_until("report")
    summary = run.summary()
    assert Path(summary["files"]["model"]).exists()
    assert set(summary["metrics"]) == set(next(iter(summary["baselines"].values())))


def test_the_reference_series_keeps_everything(tmp_path):
    config = named("multiscale_t4")
    model = outlined(config, tmp_path).variants()["full"]()
    size = sum(parameter.numel() for parameter in model.parameters())
    assert 9.3e6 <= size <= 10.3e6
    assert model.windows == (50, 200, 500, 1000)
    assert (model.tcn_window, model.transformer_window) == (500, 1000)
    assert model.num_features == 121
    assert [stage.global_batch_size for stage in config.stages] == [64, 32, 16]
    assert parse_bytes(config.plan.budget) == 14 * 2**30
    assert config.plan.variants == ()


def test_the_reference_classifier_is_that_of_its_paper(tmp_path):
    """He et al., 2016: ResNet-18 with CIFAR's stem, 11.17 M parameters."""
    config = named("cifar10_resnet18")
    model = outlined(config, tmp_path).variants()["resnet18"]()
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    assert config.kind.min_micro_batch_size(config.model) == 16
    assert config.stages[0].global_batch_size == 128
