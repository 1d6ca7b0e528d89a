"""The series workload: losses that are sums, counts that fit them, truth and baselines on the same rows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memfit.workloads.registry import WORKLOADS, load_workload
from memfit.workloads.series import SeriesWorkload


def workload_of(prepared, tiny_model, **loss) -> SeriesWorkload:
    return SeriesWorkload(prepared, tiny_model, loss)


@pytest.fixture
def workload(prepared, tiny_model):
    return workload_of(prepared, tiny_model)


@pytest.fixture
def model(workload):
    torch.manual_seed(0)
    return workload.variants()["light"]().eval()


def first(workload, count: int, split: str = "train"):
    return workload.batch(split, np.arange(count))


def test_is_found_by_name_with_what_a_job_carries(prepared, tiny_model):
    job = {"workload": "series", "data_dir": str(prepared), "model": tiny_model, "loss": {}, "more": 1}
    assert type(load_workload(job)).__name__ == WORKLOADS["series"].workload.split(":")[1]


def test_a_batch_holds_only_what_lies_before_its_target(workload):
    batch = first(workload, 5)
    for index, row in enumerate(batch["row"].tolist()):
        history = np.asarray(workload.data.values[row - 8 : row])
        assert batch["history"][index].numpy() == pytest.approx(history)
        assert batch["features"][index].numpy() == pytest.approx(np.asarray(workload.data.features[row - 1]))
        assert float(batch["target"][index]) == pytest.approx(float(workload.data.values[row]))


def test_losses_of_parts_add_up_to_the_loss_of_the_whole(workload, model):
    whole = workload.loss(model, first(workload, 20))
    parts = [workload.loss(model, workload.batch("train", part)) for part in np.array_split(np.arange(20), 3)]
    assert set(whole) == {"value", "class", "exceeds"}
    for term, value in whole.items():
        assert sum(part[term].item() for part in parts) == pytest.approx(value.item(), rel=1e-5)


def test_counts_of_parts_add_up_and_are_known_before_the_forward_pass(prepared, tiny_model):
    workload = workload_of(prepared, tiny_model, class_balance=True)
    whole = workload.count(first(workload, 20))
    parts = [workload.count(workload.batch("train", part)) for part in np.array_split(np.arange(20), 3)]
    assert {term: sum(part[term] for part in parts) for term in whole} == pytest.approx(whole)
    assert whole["value"] == whole["exceeds"] == 20


@pytest.mark.parametrize(("kind", "function"), [("huber", F.huber_loss), ("mse", F.mse_loss)])
def test_terms_over_counts_are_torchs_own_means(prepared, tiny_model, kind, function):
    settings = {"value_weight": 2.0, "class_weight": 3.0, "exceeds_weight": 0.5, "exceeds_positive_weight": 4.0}
    workload = workload_of(prepared, tiny_model, value_loss=kind, class_balance=True, **settings)
    torch.manual_seed(0)
    model, batch = workload.variants()["light"]().eval(), first(workload, 40)
    outputs, counts = model(batch["history"], batch["features"]), workload.count(batch)
    target = (batch["target"] - workload.scale["mean"]) / workload.scale["std"]
    weights = workload.class_weights
    expected = {
        "value": 2.0 * function(outputs["value"], target),
        "class": 3.0 * F.cross_entropy(outputs["class_logits"], batch["target_class"], weight=weights),
        "exceeds": 0.5
        * F.binary_cross_entropy_with_logits(outputs["exceeds_logit"], batch["exceeds"], pos_weight=torch.tensor(4.0)),
    }
    got = {term: value.item() / counts[term] for term, value in workload.loss(model, batch).items()}
    assert got == pytest.approx({term: value.item() for term, value in expected.items()}, rel=1e-5)


def test_balanced_classes_weigh_the_same_in_all(prepared, tiny_model):
    workload = workload_of(prepared, tiny_model, class_balance=True)
    counts = torch.tensor(workload.manifest["class_counts"]["train"], dtype=torch.float32)
    assert (workload.class_weights * counts).tolist() == pytest.approx([float(counts.sum()) / 3] * 3)


def test_both_sides_of_the_threshold_are_balanced_unless_told_otherwise(prepared, tiny_model, workload):
    share = workload.manifest["exceed_share"]["train"]
    assert 0 < share < 1
    assert workload.positive_weight == pytest.approx((1 - share) / share)
    assert workload_of(prepared, tiny_model, exceeds_positive_weight=3.0).positive_weight == 3.0


def test_an_unknown_loss_setting_is_refused(prepared, tiny_model):
    with pytest.raises(TypeError, match="valeu_weight"):
        workload_of(prepared, tiny_model, valeu_weight=1.0)


def test_an_untrained_net_predicts_the_value_before_in_the_users_unit(workload, model):
    with torch.no_grad():
        predictions = workload.predict(model, first(workload, 30))
    truth = workload.truth("train", np.arange(30))
    assert predictions["value"].numpy() == pytest.approx(truth["persistence"], rel=1e-4)
    assert predictions["class_probabilities"].sum(dim=1).tolist() == pytest.approx([1.0] * 30, rel=1e-5)
    assert ((predictions["exceeds_probability"] > 0) & (predictions["exceeds_probability"] < 1)).all()


def test_truth_agrees_with_the_batches(workload):
    truth, batch = workload.truth("test", np.arange(10)), first(workload, 10, "test")
    assert truth["truth"] == pytest.approx(batch["target"].numpy())
    assert truth["class_truth"].tolist() == batch["target_class"].tolist()
    assert truth["exceeds_truth"].tolist() == (batch["exceeds"] > 0).tolist()
    assert np.all(np.diff(truth["times"]) > 0)


def test_baselines_are_trivial_and_score_as_they_must(workload):
    truth = workload.truth("test", np.arange(workload.num_samples("test")))
    baselines = workload.baselines("test")
    scores = {name: workload.score(truth, predictions) for name, predictions in baselines.items()}
    assert set(baselines) == {"persistence", "train_mean", "majority"}
    error = np.abs(truth["truth"] - truth["persistence"]).mean()
    assert scores["persistence"]["mae"] == pytest.approx(float(error), rel=1e-5)
    assert len(set(baselines["train_mean"]["value"].tolist())) == 1
    counts = workload.manifest["class_counts"]["train"]
    assert set(baselines["majority"]["class_probabilities"].argmax(axis=1)) == {int(np.argmax(counts))}
    perfect = {
        "value": truth["truth"],
        "class_probabilities": np.eye(3)[truth["class_truth"]],
        "exceeds_probability": truth["exceeds_truth"].astype(float),
    }
    best = workload.score(truth, perfect)
    assert (best["mae"], best["class_accuracy"], best["below_accuracy"]) == (0, 1, 1)


def test_variants_come_with_the_wanted_one_first(prepared, tiny_model):
    light = tiny_model["variants"]["light"]
    settings = {"variant": "light", "variants": {"smaller": {**light, "d_model": 4}, "light": light}}
    workload = SeriesWorkload(prepared, settings, {})
    assert list(workload.variants()) == ["light", "smaller"]
    sizes = [sum(p.numel() for p in build().parameters()) for build in workload.variants().values()]
    assert sizes[0] > sizes[1]


def test_the_exported_graph_has_the_described_inputs_and_outputs(workload, model):
    spec = workload.export(8)
    outputs = workload.inference_module(model)(*(torch.from_numpy(spec.sample_inputs[e["name"]]) for e in spec.inputs))
    assert [entry["name"] for entry in spec.outputs] == ["value", "class_probabilities", "exceeds_probability"]
    for entry, output in zip(spec.outputs, outputs, strict=True):
        assert [8 if size == "batch" else size for size in entry["shape"]] == list(output.shape)
    for entry in spec.inputs:
        assert list(spec.sample_inputs[entry["name"]].shape) == [8, *entry["shape"][1:]]
    rows = workload.data.rows("test")[-8:]
    assert spec.sample_inputs["history"][:, -1] == pytest.approx(np.asarray(workload.data.values[rows - 1]))
    assert all(path.is_file() for path in spec.support_files.values())
    assert workload.describe()["unit"] == "MW"
