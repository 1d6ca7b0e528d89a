"""Configs: every fault names the key, what was expected and what was got; overrides apply or are errors."""

import re
import tomllib

import pytest
from pydantic import ValidationError

from memfit.config import MAX_CONFIG_BYTES, config_class, load_config, to_toml
from memfit.errors import ConfigError
from memfit.workloads.registry import WORKLOADS, load_kind


@pytest.fixture
def load(tiny_config):
    return lambda *overrides: load_config(tiny_config, overrides)


def test_defaults_and_overrides_arrive(load):
    config = load("stages.0.lr=3e-4", "seed=9", "plan.precisions=['bf16', 'fp32']", "data.unit=kW", "plan.budget=80%")
    assert config.stages[0].lr == 3e-4
    assert config.stages[1].lr == 5e-4
    assert config.seed == 9
    assert config.plan.precisions == ("bf16", "fp32")
    assert config.data.unit == "kW"
    assert config.plan.budget == "80%"
    assert config.stages[0].patience == 15
    assert config.kind.spec(config.data, config.model).context == 8


def test_overrides_make_tables_that_the_file_left_out(load):
    config = load("stages.0.optimizer.name=sgd", "stages.0.optimizer.momentum=0.5", "model.variants.small.d_model=4")
    assert (config.stages[0].optimizer.name, config.stages[0].optimizer.momentum) == ("sgd", 0.5)
    assert config.model.all_variants()["small"]["d_model"] == 4


def test_later_overrides_win(load):
    assert load("seed=1", "seed=2").seed == 2


FAULTS = {
    "seed=-1": r"seed: .*greater than or equal to 0, got -1",
    "seed=1.5": r"seed: .*integer, got 1.5",
    "seed=true": r"seed: .*integer, got True",
    "stages.1.epochs='3'": r"stages\.1\.epochs: .*integer, got '3'",
    "stages.0.lr=0": r"stages\.0\.lr: .*greater than 0, got 0",
    "stages.0.lr=inf": r"stages\.0\.lr: .*finite number, got inf",
    "data.threshold=nan": r"data\.threshold: .*finite number, got nan",
    "name=a/b": r"name: .*pattern.*got 'a/b'",
    "plan.budget=14gib": r"plan\.budget: .*got '14gib'",
    "plan.device=gpu": r"plan\.device: .*got 'gpu'",
    "plan.precisions=[]": r"plan\.precisions: .*at least 1 item.*got \[\]",
    "plan.precisions=['fp8']": r"plan\.precisions\.0: .*'fp32', 'bf16' or 'fp16', got 'fp8'",
    "plan.variants=['tiny']": r"plan\.variants: \['tiny'\] are not among",
    "stages=[]": r"stages: .*at least 1 item",
    "stages.1.name=first": r"stages: expected each name once, got \['first', 'first'\]",
    "stages.0.train=head.*": r"stages\.0\.train: .*tuple, got 'head\.\*'",
    "stages.0.monitor=maee": r"stages\.0\.monitor: expected one of total, .*mae.*, got 'maee'",
    "stages.0.optimizer.momentum=0.5": r"stages\.0\.optimizer: momentum is for sgd and rmsprop.*adamw",
    "stages.0.optimizer.betas=[0.9, 1.5]": r"stages\.0\.optimizer\.betas\.1: .*less than 1, got 1\.5",
    "stages.0.schedule={name='plateau', warmup_steps=5}": r"stages\.0\.schedule: warmup_steps: expected 0.*got 5",
    "data.source={kind='files'}": r"data\.source: expected paths with kind 'files'",
    "data.train_share=0.9": r"data: train_share and validation_share: expected two shares.*got \(0\.9, 0\.15\)",
    "data.class_edges=[1]": r"data: class_edges and class_quantiles: expected one of the two, got 'both'",
    "data.class_quantiles=[0.7, 0.3]": r"data: class_quantiles: expected .*rising.*got",
    "data.frequency=1x": r"data: frequency: expected .*got '1x'",
    "data.features.rolling_statistics=['meen']": r"data: features\.rolling_statistics .*mean, std.*'meen'",
    "model.size=huge": r"model\.size: .*'full' or 'light', got 'huge'",
    "model.windows=[8, 4]": r"model: windows: expected rising.*got \[8, 4\]",
    "model.tcn_window=5": r"model: tcn_window: expected one of the windows \[4, 8\], got 5",
    "model.d_model=15": r"model: d_model must be even and a multiple of num_heads; got d_model 15",
    "model.variants.light.d_model=4": r"model: variants\.light: expected a name other than the model's own",
    "model.variants.small.d_model=-4": r"model: variants\.small: d_model: .*greater than or equal to 1, got -4",
    "data=3": r"data: .*got 3",
}


@pytest.mark.parametrize("override", FAULTS)
def test_a_fault_names_the_key_what_was_expected_and_what_was_got(load, override):
    with pytest.raises(ConfigError, match=FAULTS[override]) as raised:
        load(override)
    assert re.search(r"tiny\.toml: \d faults? in the config", str(raised.value))
    assert not str(raised.value).endswith("..")


def test_every_fault_is_listed_at_once(load):
    with pytest.raises(ConfigError, match="3 faults") as raised:
        load("seed=-1", "stages.0.lr=0", "nmae=x")
    assert all(key in str(raised.value) for key in ("seed", "stages.0.lr", "nmae"))


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("nmae=x", "nmae", "name"),
        ("stages.0.lrr=1", "stages.0.lrr", "lr"),
        ("stages.0.optimizer.nam=sgd", "stages.0.optimizer.nam", "name"),
        ("stages.0.schedule.warmup=3", "stages.0.schedule.warmup", "warmup_steps"),
        ("data.features.lagz=[1]", "data.features.lagz", "lags"),
        ("data.source.airprot=JFK", "data.source.airprot", "airport"),
        ("model.drop_out=0.1", "model.drop_out", "dropout"),
        ("plan.buget=1GiB", "plan.buget", "budget"),
        ("model.variants.small.d_modle=4", "d_modle", "d_model"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(load, override, key, nearest):
    with pytest.raises(ConfigError) as raised:
        load(override)
    assert f"{key}: unknown key; the nearest valid one is '{nearest}'" in str(raised.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("stages..lr=3", "expected key.path=value"),
        ("stages.2.lr=1", "expected an index from 0 to 1, got '2'"),
        ("stages.-1.lr=1", "expected an index from 0 to 1, got '-1'"),
        ("stages.first.lr=1", "expected an index from 0 to 1, got 'first'"),
        ("stages.2={}", "expected an index from 0 to 1, got '2'"),
        ("seed.x=1", "does not apply"),
        ("stages.0.lr.x.y=1", "does not apply"),
    ],
)
def test_an_override_that_does_not_apply_is_an_error(load, override, said):
    with pytest.raises(ConfigError) as raised:
        load(override)
    assert said in str(raised.value)
    assert repr(override) in str(raised.value)


def test_further_lines_of_an_override_are_not_lost(load):
    with pytest.raises(ConfigError, match="seed"):
        load('seed=1\nname="other"')


@pytest.mark.parametrize(("text", "unit"), [("data.unit=", ""), ("data.unit=a=b", "a=b"), ("data.unit=' x '", " x ")])
def test_what_is_not_toml_is_text(load, text, unit):
    assert load(text).data.unit == unit


def test_a_missing_key_is_named(tmp_path):
    (tmp_path / "a.toml").write_text('name = "x"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data: Field required(.|\n)*stages: Field required"):
        load_config(tmp_path / "a.toml")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"name = 1\nname = 2"])
def test_what_is_not_toml_is_refused(tmp_path, content):
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.toml: not TOML"):
        load_config(tmp_path / "a.toml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_config(tmp_path / "nowhere.toml")


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("#" * (MAX_CONFIG_BYTES + 1), encoding="utf-8")
    with pytest.raises(ConfigError, match="at most 1 MiB, got 1048577 bytes"):
        load_config(path)


def test_is_frozen(load):
    config = load()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 4
    with pytest.raises(ValidationError, match="frozen"):
        config.stages[0].lr = 1.0


def test_what_is_written_out_is_the_same_config_with_every_default(load, tmp_path):
    config = load("model.variants.small.d_model=4", "plan.variants=['small']", "stages.0.loss.class_balance=true")
    text = to_toml(config)
    (tmp_path / "again.toml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "again.toml") == config
    assert to_toml(load_config(tmp_path / "again.toml")) == text
    document = tomllib.loads(text)
    assert document["stages"][0]["patience"] == 15
    assert document["stages"][1]["loss"]["huber_delta"] == 1.0
    assert document["plan"]["deadline_seconds"] == 300.0


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_setting_is_described(workload):
    schema = config_class(workload).model_json_schema()
    parts = {"RunConfig": schema, **schema["$defs"]}
    bare = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, setting in part.get("properties", {}).items()
        if not (
            setting.get("description") or parts.get(setting.get("$ref", "").rsplit("/", 1)[-1], {}).get("description")
        )
    ]
    assert len(parts) > 8
    assert bare == []
    assert [name for name, part in parts.items() if not part.get("description")] == []


def test_every_metric_of_the_workload_may_be_monitored():
    from memfit.metrics.series import series_scores
    from memfit.workloads.series import TERMS

    one = [1.0, 2.0]
    scores = series_scores(one, one, [0, 1], [0, 1], [True, False], [True, False], 2)
    assert set(load_kind("series").monitors) == {"total", *TERMS, *scores}


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [("total", "min"), ("mae", "min"), ("rmse", "min"), ("loss_risk", "min"), ("exceeds", "min"), ("class", "min"),
     ("r2", "max"), ("class_f1", "max"), ("above_accuracy", "max"), ("precision", "max"), ("recall", "max")],
)  # fmt: skip
def test_a_monitor_knows_which_way_is_better(load, monitor, mode):
    arguments = load(f"stages.0.monitor={monitor}").stages[0].arguments()
    assert arguments["monitor_mode"] == mode


def test_a_stage_says_what_the_training_takes(load):
    arguments = load("stages.0.clip=0", "stages.0.optimizer.name=sgd").stages[0].arguments()
    assert arguments["clip"] is None
    assert arguments["optimizer"] == {"name": "sgd", "lr": 1e-3, "weight_decay": 0.01, "momentum": 0.9}
    assert "loss" not in arguments


def test_a_full_model_brings_its_light_variant(load):
    config = load("model={size='full', windows=[4, 8], tcn_window=8, transformer_window=8}", "plan.variants=['light']")
    variants = config.model.all_variants()
    assert list(variants) == ["full", "light"]
    assert variants["light"]["size"] == "light"
    assert variants["light"]["windows"] == (4, 8)


def test_the_context_is_the_longest_window_of_any_variant(load):
    config = load("model.variants.longer={windows=[4, 8, 20]}")
    assert config.kind.spec(config.data, config.model).context == 20


def test_the_data_spec_carries_every_setting(load):
    config = load("data.gaps={policy='interpolate', limit=3}")
    spec = config.kind.spec(config.data, config.model)
    assert spec.context == 8
    assert (spec.gaps.policy, spec.gaps.limit) == ("interpolate", 3)
    assert spec.features.lags == (1, 2, 3)
    assert spec.threshold == 10.5


def test_another_workload_is_named_with_the_nearest(load):
    with pytest.raises(ConfigError, match=r"workload: expected one of series.*got 'seris'; the nearest one is series"):
        load("workload=seris")
    with pytest.raises(ConfigError, match="got 3"):
        load("workload=3")
