"""The forecast workload: samples, exact steps, baselines, settings, and the exported graph."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from memfit.errors import ConfigError, DataError
from memfit.export.parity import run_torch_batch
from memfit.export.signature import Signature
from memfit.memory.devices import find_device
from memfit.memory.simulate import simulate
from memfit.metrics.forecast import METRICS
from memfit.recovery import RecoveringStep
from memfit.step import StepLayout, TrainingStep
from memfit.training.program import stage_program
from memfit.workloads.forecast import ForecastWorkload
from memfit.workloads.forecast_settings import ForecastData, ForecastKind, Loss, Model
from tests.memfit.workloads.exporting import export_all

SMALL = {"horizon": 4, "window": 10, "season": 24, "hidden": 8}
DECODER = {"head": "seq2seq", "forcing_samples": 60}
BINS = {**DECODER, "output": "bins", "num_bins": 9}
STAGE = {"train": ["*"], "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}
EXPORTED = {
    "rnn": {"cell": "rnn", "bidirectional": True, "num_layers": 2, "norm": "batch", "inputs": "value"},
    "gru": {"num_layers": 3, "bidirectional": True, "norm": "layer"},
    "lstm": {"cell": "lstm", "bidirectional": True, "num_layers": 2},
    "beam": {**BINS, "cell": "lstm", "attention": "luong", "beam_width": 3},
    "plain_decoder": {**DECODER, "cell": "lstm"},
    "luong": {**DECODER, "attention": "luong", "bidirectional": True, "norm": "layer", "num_layers": 2},
    "bahdanau": {**DECODER, "cell": "rnn", "attention": "bahdanau"},
}


def settings_of(**settings):
    return Model(**{**SMALL, **settings}).all_variants()[settings.get("cell", "gru")]


def data_of(csv, **changes):
    source = {"kind": "files", "paths": [str(csv)]}
    given = {"source": source, "time_column": "time", "value_column": "load", "unit": "MW", "frequency": "1h"}
    return ForecastData(**{**given, **changes})


def prepare(data, model, store):
    return ForecastKind().prepare(data, model, store, code_version="test", fresh=False, on_progress=lambda *_: None)


@pytest.fixture(scope="module")
def folder(tiny_csv, tmp_path_factory):
    return prepare(data_of(tiny_csv), Model(**SMALL), tmp_path_factory.mktemp("store"))


def model_of(**settings):
    return {"variant": "net", "variants": {"net": settings_of(**settings)}}


def workload_of(folder, loss=None, **settings):
    return ForecastWorkload(folder, model_of(**settings), loss or {})


def net_of(workload):
    torch.manual_seed(0)
    return next(iter(workload.variants().values()))()


def first(workload, n, split="train"):
    return workload.batch(split, np.arange(n))


# Samples


def test_batches_hold_raw_histories_and_horizons(folder):
    workload = workload_of(folder)
    batch = first(workload, 3)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"history": (3, 10, 5), "target": (3, 4)}
    assert workload.manifest["features"]["names"] == ["hour_sin", "hour_cos", "yearday_sin", "yearday_cos"]
    assert first(workload_of(folder, inputs="value"), 3)["history"].shape == (3, 10, 1)
    truth = workload.truth("train", np.arange(3))
    np.testing.assert_array_equal(truth["truth_horizon"], batch["target"])
    np.testing.assert_array_equal(truth["truth"], batch["target"][:, 0])
    np.testing.assert_array_equal(truth["persistence"], batch["history"][:, -1, 0])


def test_only_a_decoders_training_batches_draw_numbers(folder):
    state = torch.get_rng_state()
    first(workload_of(folder), 5)
    first(workload_of(folder, **DECODER), 5, "validation")
    assert torch.equal(torch.get_rng_state(), state)
    batch = first(workload_of(folder, **DECODER), 5)
    assert batch["draws"].shape == (5, 4)
    assert not torch.equal(torch.get_rng_state(), state)


def test_normalization_is_that_of_the_rows_before_the_last_train_target_ends(folder):
    workload = workload_of(folder)
    model, data = net_of(workload), workload.data
    seen = data.values[: int(data.rows("train")[-1]) + 1].astype(np.float64)
    assert model.normalization.value_mean.item() == pytest.approx(seen.mean(), rel=1e-6)
    assert model.normalization.value_std.item() == pytest.approx(seen.std(), rel=1e-5)


@pytest.mark.parametrize("loss", ["huber", "mse", "mae"])
def test_the_loss_is_a_mean_over_the_horizon_in_standard_deviations(folder, loss):
    workload = workload_of(folder, {"loss": loss, "huber_delta": 0.5})
    model, batch = net_of(workload).eval(), first(workload, 7)
    error = ((workload.predict(model, batch)["value_horizon"] - batch["target"]) / workload.scale["std"]).abs()
    near = error.clamp(max=0.5)
    expected = {"huber": near * (error - near / 2), "mse": error**2, "mae": error}[loss].mean() * 7
    assert workload.loss(model, batch)["value"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert workload.count(batch) == {"value": 7.0}


def test_the_loss_of_bins_is_their_cross_entropy_along_the_forecast(folder):
    workload = workload_of(folder, **BINS, beam_width=3)
    model, batch = net_of(workload).eval(), first(workload, 7)
    found = model(batch["history"], batch["target"])
    assert workload.loss(model, batch)["value"].item() == pytest.approx(found.cross_entropy.mean(1).sum().item())
    greedy = workload_of(folder, **BINS)
    torch.testing.assert_close(model.normalization.denormalize(found.value), predicted(greedy, batch))
    assert not torch.equal(predicted(workload, batch), predicted(greedy, batch))


def predicted(workload, batch):
    return workload.predict(net_of(workload).eval(), batch)["value_horizon"]


def test_bins_span_four_deviations_of_the_changes_that_train_samples_have(folder):
    workload = workload_of(folder, **BINS)
    batch = first(workload, workload.num_samples("train"))
    changes = (batch["target"] - batch["history"][:, -1:, 0]) / workload.scale["std"]
    points = net_of(workload).head.bins.points
    assert points[-1].item() == pytest.approx(4 * changes.std(correction=0).item(), rel=1e-5)
    assert net_of(workload_of(folder, **BINS, predict_change=False)).head.bins.points[-1].item() == 4.0


# Steps


def one_step(workload, accumulation_steps, checkpointing="none"):
    program = stage_program(workload, STAGE)
    torch.manual_seed(0)
    model = program.build()
    torch.manual_seed(1)
    batch = first(workload, 29)
    step = TrainingStep(StepLayout(accumulation_steps, "fp32", checkpointing), program, model, program.optimizer(model))
    return step(batch), model.state_dict()


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize(
    "settings", [{}, DECODER, {**DECODER, "attention": "luong"}, BINS], ids=["direct", "plain", "luong", "bins"]
)
def test_gradients_do_not_depend_on_how_a_batch_is_cut(folder, settings, checkpointing):
    workload = workload_of(folder, num_layers=2, norm="layer", **settings)
    whole, weights = one_step(workload, 1)
    for cut in (2, 7, 29):
        stats, other = one_step(workload, cut, checkpointing)
        assert stats.total == pytest.approx(whole.total, rel=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("fault", [None, 3])
def test_a_step_that_ran_out_of_memory_counts_its_samples_once(folder, fault):
    workload = workload_of(folder, **DECODER)
    program, changes, due = stage_program(workload, STAGE), [], []
    torch.manual_seed(0)
    model = program.build()
    step = RecoveringStep(StepLayout(), program, model, program.optimizer(model), on_change=changes.append)

    def run_out(*_):
        if due:
            raise MemoryError(due.pop())

    model.register_forward_hook(run_out)
    for number in range(1, 5):
        due += ["none left"] if number == fault else []
        step(first(workload, 12))
    assert len(changes) == (fault is not None)
    assert int(model.samples_trained) == 48


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("settings", [{}, {**BINS, "attention": "bahdanau"}], ids=["direct", "bahdanau"])
@pytest.mark.parametrize("device", ["cpu", "T4"])
def test_a_step_can_be_simulated(folder, cell, settings, device):
    program = stage_program(workload_of(folder, cell=cell, num_layers=2, **settings), STAGE)
    trace = simulate(program, find_device(device), micro_batch_size=16, precision="fp32", checkpointing="none")
    assert trace is not None


# What it is compared with


def test_baselines_are_the_last_value_and_that_of_a_season_before(folder):
    workload = workload_of(folder)
    rows = workload.data.first_rows("test", np.arange(workload.num_samples("test")))
    baselines, values = workload.baselines("test"), workload.data.values
    assert baselines["persistence"]["value_horizon"].tolist() == [[values[row - 1]] * 4 for row in rows]
    expected = [values[row - 24 : row - 20].tolist() for row in rows]
    assert baselines["seasonal_naive"]["value_horizon"].tolist() == expected
    truth = workload.truth("test", np.arange(len(rows)))
    scores = {name: workload.score(truth, arrays) for name, arrays in baselines.items()}
    assert scores["seasonal_naive"]["mae"] < scores["persistence"]["mae"]  # the series is a daily wave
    assert set(METRICS) < set(ForecastKind.monitors)
    assert set(METRICS) <= set(scores["persistence"])
    assert len(workload.score_steps(truth, baselines["persistence"])["mae"]) == 4


def test_predictions_can_be_drawn_and_keep_the_alignment(folder, monkeypatch):
    workload = workload_of(folder, **DECODER, attention="luong")
    arrays = workload.truth("test", np.arange(6))
    with torch.no_grad():
        arrays |= workload.predict(net_of(workload).eval(), first(workload, 6, "test"))
    assert {name: tuple(array.shape) for name, array in arrays.items()} == {
        **dict.fromkeys(("times", "truth", "persistence", "value"), (6,)),
        **dict.fromkeys(("truth_horizon", "value_horizon"), (6, 4)),
        "alignment": (6, 4, 10),
    }
    monkeypatch.setattr("memfit.workloads.forecast.MAX_KEPT_WEIGHTS", 100)
    assert "alignment" not in workload.predict(net_of(workload), first(workload, 1, "test"))
    described = workload.describe()
    json.dumps(described)
    assert (described["headline"], described["unit"], described["horizon"]) == ("mae", "MW", 4)


def test_a_small_net_learns_a_daily_wave_in_seconds(folder):
    workload = workload_of(folder, hidden=16, window=24)
    program = stage_program(workload, {**STAGE, "optimizer": {"name": "adam", "lr": 1e-2}})
    torch.manual_seed(0)
    model = program.build()
    step = TrainingStep(StepLayout(), program, model, program.optimizer(model), clip=1.0)
    for _ in range(25):
        for chosen in np.array_split(torch.randperm(workload.num_samples("train")).numpy(), 5):
            step(workload.batch("train", chosen))
    size = workload.num_samples("test")
    with torch.no_grad():
        found = workload.predict(model.eval(), first(workload, size, "test"))["value_horizon"].numpy()
    truth = workload.truth("test", np.arange(size))
    persistence = workload.score(truth, workload.baselines("test")["persistence"])["mae"]
    assert workload.score(truth, {"value_horizon": found})["mae"] < 0.5 * persistence


# Settings


def test_the_history_reaches_back_as_far_as_features_and_season_need(tiny_csv):
    kind, data = ForecastKind(), data_of(tiny_csv, features={"lags": [3]})
    assert kind.spec(data, Model(**SMALL)).context == 24
    assert kind.spec(data, Model(**{**SMALL, "season": 2})).context == 12
    assert kind.spec(data, Model()).features.extra_lags == (1,)


def test_horizons_longer_than_a_split_are_refused_before_training(tiny_csv, tmp_path):
    with pytest.raises(DataError, match="forecasts of 60 rows"):
        prepare(data_of(tiny_csv), Model(**{**SMALL, "horizon": 60}), tmp_path)


def test_an_outline_has_what_planning_needs(tiny_csv, tmp_path):
    model = Model(**{**SMALL, "horizon": 30}, head="seq2seq")
    ForecastKind().outline(data_of(tiny_csv), model, tmp_path / "data")
    workload = ForecastWorkload(tmp_path / "data", {"variant": "gru", "variants": model.all_variants()}, {})
    assert workload.loss(net_of(workload).train(), first(workload, 2))["value"].isfinite()


@pytest.mark.parametrize(("variants", "fewest"), [({}, 1), ({"other": {"norm": "batch"}}, 2)])
def test_batch_statistics_take_two_samples(variants, fewest):
    assert ForecastKind().min_micro_batch_size(Model(**SMALL, variants=variants)) == fewest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "luong"}, "attention: expected none with head direct"),
        ({"num_layers": 6}, "num_layers"),
        ({"head": "seq2seq", "beam_width": 4}, "beam_width: expected 1 with output value"),
        ({"variants": {"short": {"window": 5}}}, "variants.short: expected the model's own window"),
        ({"variants": {"other": {"cell": "elman"}}}, "variants.other: cell"),
    ],
)
def test_nets_that_cannot_be_built_are_refused(settings, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        Model(**{**SMALL, **settings})


def test_settings_of_classes_and_unknown_losses_are_refused(tiny_csv, folder):
    with pytest.raises((ConfigError, ValueError), match="a forecast has no classes"):
        data_of(tiny_csv, class_quantiles=[0.5])
    with pytest.raises(ConfigError, match=r"loss.loss: expected huber, mse or mae, got 'quantile'"):
        workload_of(folder, {"loss": "quantile"})
    assert Loss().model_dump() == {"loss": "huber", "huber_delta": 1.0}


# Export


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """Export every kind of net in one process: folder and cards."""
    out = tmp_path_factory.mktemp("export")
    models = {name: model_of(**settings) for name, settings in EXPORTED.items()}
    return out, export_all("forecast", folder, out, models)


@pytest.mark.end_to_end
@pytest.mark.parametrize(("n", "steps"), [(1, 1), (3, 10), (5, 4), (2, 37)])
@pytest.mark.parametrize("name", EXPORTED)
def test_the_exported_graph_agrees_with_the_model_at_any_batch_size_and_length(exported, folder, name, n, steps):
    out, cards = exported
    workload = workload_of(folder, **EXPORTED[name])
    model = net_of(workload).eval()
    model.load_state_dict(torch.load(out / f"{name}.pt", weights_only=True))
    history = first(workload, n, "test")["history"].repeat(1, 4, 1)[:, :steps].numpy()
    spec = workload.export(12)
    inputs, outputs = ([Signature(**entry) for entry in entries] for entries in (spec.inputs, spec.outputs))
    expected = run_torch_batch(workload.inference_module(model), inputs, outputs, {"history": history})
    session = onnxruntime.InferenceSession(out / name / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run([*expected], {"history": history})
    for array, wanted in zip(got, expected.values(), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-5)
    assert ("alignment" in expected) == (EXPORTED[name].get("attention", "none") != "none")
    assert cards[name]["signature"]["inputs"][0]["shape"][:2] == ["batch", "time"]


@pytest.mark.end_to_end
def test_the_card_says_what_goes_in_and_what_comes_out(exported):
    out, cards = exported
    card = cards["luong"]
    assert [(entry["name"], entry["shape"]) for entry in card["signature"]["outputs"]] == [
        ("value", ["batch", 4]),
        ("alignment", ["batch", 4, "time"]),
    ]
    assert card["forecast"]["channels"] == ["load", "hour_sin", "hour_cos", "yearday_sin", "yearday_cos"]
    assert (card["forecast"]["window"], card["forecast"]["horizon"]) == (10, 4)
    assert len({batch["sizes"]["time"] for batch in card["parity"]["batches"]}) == 3
    assert (out / "luong" / "features.py").exists()
    assert not (out / "rnn" / "features.py").exists()
