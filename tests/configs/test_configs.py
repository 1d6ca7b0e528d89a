"""Every shipped config loads, writes itself out, and builds its model."""

from pathlib import Path

import pytest
import torch

from memfit.config import load_config, to_toml
from memfit.data.features import feature_names
from memfit.memory.units import parse_bytes
from memfit.models.multiscale import build_multiscale

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def build(config, variant: str):
    """Build a variant as the workload does, with made-up normalization."""
    spec = config.kind.spec(config.data, config.model)
    num_features = len(feature_names(spec.features.to_dict(), list(spec.extra_columns)))
    cuts = spec.class_edges or spec.class_quantiles or (0.2, 0.4, 0.6, 0.8)
    return build_multiscale(
        **config.model.all_variants()[variant],
        num_features=num_features,
        num_classes=len(cuts) + 1,
        value_mean=5.0,
        value_std=2.0,
        feature_mean=[0.0] * num_features,
        feature_std=[1.0] * num_features,
    )


@pytest.fixture(params=CONFIGS, ids=[path.stem for path in CONFIGS])
def config(request):
    return load_config(request.param)


def test_the_documented_configs_are_shipped():
    assert {path.stem for path in CONFIGS} >= {"smoke", "weather_quick", "multiscale_t4"}


def test_writes_itself_out_and_back(config, tmp_path):
    (tmp_path / "resolved.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "resolved.toml") == config


def test_its_model_maps_rows_to_three_heads(config):
    wanted = next(iter(config.model.all_variants()))
    model = build(config, wanted).eval()
    with torch.no_grad():
        outputs = model(
            torch.rand(2, config.kind.spec(config.data, config.model).context), torch.rand(2, model.num_features)
        )
    assert outputs["value"].shape == outputs["exceeds_logit"].shape == (2,)
    assert outputs["class_logits"].shape[0] == 2


def test_its_stages_train_parameters_that_exist(config):
    from memfit.training.optimizers import freeze_all_but

    model = build(config, next(iter(config.model.all_variants())))
    for stage in config.stages:
        freeze_all_but(model, list(stage.train))
        assert any(parameter.requires_grad for parameter in model.parameters())


def test_the_reference_keeps_everything():
    config = load_config(next(path for path in CONFIGS if path.stem == "multiscale_t4"))
    model = build(config, "full")
    size = sum(parameter.numel() for parameter in model.parameters())
    assert 9.3e6 <= size <= 10.3e6
    assert model.windows == (50, 200, 500, 1000)
    assert (model.tcn_window, model.transformer_window) == (500, 1000)
    assert model.num_features == 121
    assert [stage.global_batch_size for stage in config.stages] == [64, 32, 16]
    assert parse_bytes(config.plan.budget) == 14 * 2**30
    assert config.plan.variants == ()
