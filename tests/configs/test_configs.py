"""Every shipped config loads, writes itself out, builds its model on data of its shapes, and trains it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from memfit.config import load_config, to_toml
from memfit.memory.budget import resolve_budget
from memfit.memory.planner import plan_stage
from memfit.memory.request import PlanRequest
from memfit.memory.units import parse_bytes
from memfit.pipeline import open_run
from memfit.step import StepLayout, TrainingStep
from memfit.training.program import stage_program
from memfit.workloads.registry import WORKLOADS, load_workload

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Hold the data of user's own workloads, once for all tests."""
    return tmp_path_factory.mktemp("store")


def outlined(config, folder: Path, store: Path, stage: int = 0):
    """Build a stage's workload on made-up data of the shapes that it says; where nobody can tell them, on its own."""
    return load_workload(job_of(config, folder, store, stage))


def job_of(config, folder: Path, store: Path, stage: int) -> dict:
    data_dir = folder / "data"
    if not data_dir.exists() and not config.kind.outline(config.data, config.model, data_dir):
        how = {"code_version": "test", "fresh": False, "on_progress": lambda _phase, _share: None}
        data_dir = config.kind.prepare(config.data, config.model, store, **how)
    variants = config.stage_models()[stage].all_variants()
    return {
        "workload": config.workload,
        "data_dir": str(data_dir),
        "model": {"variant": next(iter(variants)), "variants": variants},
        "loss": config.stages[stage].loss.model_dump(mode="json"),
        "stage": config.stages[stage].arguments(),
        "min_micro_batch_size": config.kind.min_micro_batch_size(config.stage_models()[stage]),
    }


@pytest.fixture(params=CONFIGS, ids=[path.stem for path in CONFIGS])
def config(request):
    return load_config(request.param)


def named(stem: str):
    return load_config(next(path for path in CONFIGS if path.stem == stem))


def test_the_documented_configs_are_shipped():
    assert {path.stem for path in CONFIGS} >= {
        *("smoke", "weather_quick", "multiscale_t4"),
        *("digits_smoke", "digits_quick", "cifar10_resnet18"),
        *("forecast_smoke", "forecast_quick", "forecast_reference"),
        *("custom_smoke", "custom_quick"),
        *("language_smoke", "language_quick", "recurrent_tiny"),
        *("experts_smoke", "experts_quick", "experts_t4"),
    }
    workloads = {load_config(path).workload for path in CONFIGS}
    assert workloads == {*WORKLOADS, "memfit.template_project.task:build"}


def test_writes_itself_out_and_back(config, tmp_path):
    (tmp_path / "resolved.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "resolved.toml") == config


def different_stages(config) -> list[int]:
    """Leave out the stages whose step is that of one before."""
    seen, found = [], []
    for index, (stage, model) in enumerate(zip(config.stages, config.stage_models(), strict=True)):
        if (facts := (model, stage.train, stage.loss, stage.optimizer)) not in seen:
            seen.append(facts)
            found.append(index)
    return found


def test_its_stages_take_two_micro_steps(config, tmp_path, store):
    for index in different_stages(config):
        workload, stage = outlined(config, tmp_path, store, index), config.stages[index]
        torch.manual_seed(0)
        program = stage_program(workload, stage.arguments())
        model = program.build().train()
        step = TrainingStep(StepLayout(2), program, model, program.optimizer(model), clip=stage.clip or None)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        stats = step(workload.batch("train", np.arange(4)))
        assert np.isfinite(stats.total)
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert changed
        assert changed <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert not any(name.startswith("backbone.") for name in changed)


@pytest.mark.end_to_end
def test_its_stages_can_be_planned_by_estimate(config, tmp_path, store):
    device = "cpu" if config.plan.device == "cpu" else "t4"
    budget = resolve_budget(config.plan.budget, device)
    for index in different_stages(config):
        job, stage = job_of(config, tmp_path, store, index), config.stages[index]
        plan = plan_stage(
            PlanRequest(
                stage=stage.name,
                program={"factory": "memfit.training.program:from_job", "arguments": job},
                global_batch_size=stage.global_batch_size,
                budget_bytes=budget,
                device=device,
                precisions=config.plan.precisions,
                checkpointings=config.plan.checkpointing,
                variant=job["model"]["variant"],
                wanted_variant=job["model"]["variant"],
                fingerprint="",
                clip=stage.clip or None,
                estimate_only=True,
                min_micro_batch_size=job["min_micro_batch_size"],
                log=tmp_path / "plan.log",
            )
        )
        assert plan.micro_batch_size * plan.accumulation_steps >= stage.global_batch_size
        assert 0 < plan.upper_peak_bytes <= budget
        assert not plan.verified


@pytest.mark.end_to_end
@pytest.mark.parametrize("stem", ["digits_smoke", "forecast_smoke", "custom_smoke", "language_smoke", "experts_smoke"])
def test_smoke_configs_go_through_the_whole_pipeline(stem, tmp_path):
    run = open_run(named(stem), runs=tmp_path / "runs", store=tmp_path / "store")
    run.perform_until("report")
    summary = run.summary()
    assert Path(summary["files"]["model"]).exists()
    assert set(summary["metrics"]) == set(next(iter(summary["baselines"].values())))


def test_the_reference_series_keeps_everything(tmp_path, store):
    config = named("multiscale_t4")
    model = outlined(config, tmp_path, store).variants()["full"]()
    size = sum(parameter.numel() for parameter in model.parameters())
    assert 9.3e6 <= size <= 10.3e6
    assert model.windows == (50, 200, 500, 1000)
    assert (model.tcn_window, model.transformer_window) == (500, 1000)
    assert model.num_features == 121
    assert [stage.global_batch_size for stage in config.stages] == [64, 32, 16]
    assert parse_bytes(config.plan.budget) == 14 * 2**30
    assert config.plan.variants == ()


def test_the_reference_classifier_is_that_of_its_paper(tmp_path, store):
    """He et al., 2016: ResNet-18 with CIFAR's stem, 11.17 M parameters."""
    config = named("cifar10_resnet18")
    model = outlined(config, tmp_path, store).variants()["resnet18"]()
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    assert config.kind.min_micro_batch_size(config.model) == 16
    assert config.stages[0].global_batch_size == 128


def test_the_reference_forecaster_is_deep_and_sees_a_week(tmp_path, store):
    config = named("forecast_reference")
    workload = outlined(config, tmp_path, store)
    model = workload.variants()["lstm"]()
    recurrent = [module for module in model.modules() if isinstance(module, torch.nn.LSTM)]
    assert [(layer.hidden_size, layer.bidirectional) for layer in recurrent] == [(100, False)] * 5
    assert workload.batch("train", np.arange(2))["history"].shape[1] == 168
    assert model(workload.batch("test", np.arange(2))["history"])[1].shape == (2, 24, 168)
    assert config.kind.min_micro_batch_size(config.model) == 1
    assert config.plan.variants == ()
