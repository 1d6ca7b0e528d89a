"""The image workload: gradients that do not depend on the cut, augmentation that resumes, nothing of the test seen."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from memfit.data.image_spec import ImageSpec
from memfit.data.images import outline_images, prepare_images
from memfit.errors import ConfigError
from memfit.memory.devices import find_device
from memfit.memory.simulate import simulate
from memfit.step import StepLayout, TrainingStep
from memfit.training.optimizers import Schedule
from memfit.training.program import stage_program
from memfit.workloads.logistic_regression import fit_and_predict, num_fitted
from memfit.workloads.vision import MONITORS, VisionWorkload
from tests.memfit.workloads.exporting import export_all

LIGHT = {"name": "resnet_light", "width_multiplier": 0.25, "norm": "group"}
BATCHED = {**LIGHT, "norm": "batch"}
EXPORTED = {norm: {"variant": "light", "variants": {"light": {**LIGHT, "norm": norm}}} for norm in ("batch", "group")}
STAGE = {"train": ["*"], "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}
ALL = {"crop_padding": 2, "flip": 0.5, "cutout": 3, "mixup": 0.4}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    spec = ImageSpec.from_dict({"source": {"kind": "sample"}})
    return prepare_images(spec, tmp_path_factory.mktemp("store"), code_version="test")


def workload_of(digits, model=LIGHT, **loss):
    return VisionWorkload(digits, {"variant": "light", "variants": {"light": model}}, loss)


@pytest.fixture
def workload(digits):
    return workload_of(digits)


def first(workload, count, split="train"):
    return workload.batch(split, np.arange(count))


def net_of(workload):
    torch.manual_seed(0)
    return workload.variants()["light"]()


# Losses and gradients


def test_the_term_over_its_count_is_torchs_own_mean(digits):
    workload = workload_of(digits, label_smoothing=0.1)
    model, batch = net_of(workload).train(), first(workload, 30)
    got = workload.loss(model, batch)["class"] / workload.count(batch)["class"]
    torch.testing.assert_close(got, F.cross_entropy(model(batch["image"]), batch["label"], label_smoothing=0.1))
    model.eval()  # what is validated on is not smoothed
    plain = F.cross_entropy(model(batch["image"]), batch["label"], reduction="sum")
    torch.testing.assert_close(workload.loss(model, batch)["class"], plain)


def test_mixed_targets_are_soft_targets(digits):
    workload = workload_of(digits, label_smoothing=0.1, augment={"mixup": 1.0})
    model, batch = net_of(workload).train(), first(workload, 30)
    share = batch["label_share"][:, None]
    one_hot = [F.one_hot(batch[name], 10).float() for name in ("label", "label_other")]
    soft = share * one_hot[0] + (1 - share) * one_hot[1]
    expected = F.cross_entropy(model(batch["image"]), soft, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(workload.loss(model, batch)["class"], expected)
    assert 0.1 < float(share.std()) < 0.4


def one_step(workload, accumulation_steps, checkpointing="none", batch=None):
    program = stage_program(workload, STAGE, workload.min_micro_batch_size)
    torch.manual_seed(0)
    model = program.build()
    step = TrainingStep(StepLayout(accumulation_steps, "fp32", checkpointing), program, model, program.optimizer(model))
    stats = step(first(workload, 29) if batch is None else batch)
    return stats, model.state_dict()


@pytest.mark.parametrize("augment", [{}, ALL])
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_under_group_normalization_gradients_do_not_depend_on_the_cut(digits, augment, checkpointing):
    workload = workload_of(digits, augment=augment, label_smoothing=0.1)
    torch.manual_seed(1)
    batch = first(workload, 29)
    whole, weights = one_step(workload, 1, batch=batch)
    for cut in (2, 7, 29):
        stats, other = one_step(workload, cut, checkpointing, batch)
        assert stats.total == pytest.approx(whole.total, rel=1e-5)
        assert stats.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-4)
        for name, value in weights.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_under_batch_normalization_they_do_which_is_why_it_has_a_smallest_micro_batch(digits):
    grouped, batched = workload_of(digits), workload_of(digits, BATCHED)
    assert (grouped.min_micro_batch_size, batched.min_micro_batch_size) == (1, 16)
    batch = first(batched, 64)
    whole, cut = (one_step(batched, steps, batch=batch)[0].gradient_norm for steps in (1, 4))
    assert cut != pytest.approx(whole, rel=1e-3)
    assert one_step(batched, 4)[0].gradient_norm == one_step(batched, 1)[0].gradient_norm  # 29 are not cut below 16


def test_checkpointing_changes_no_bit_under_batch_normalization(digits):
    workload = workload_of(digits, BATCHED)
    plain, weights = one_step(workload, 2)
    stats, other = one_step(workload, 2, "blocks")
    assert (stats.total, stats.gradient_norm) == (plain.total, plain.gradient_norm)
    assert all(torch.equal(other[name], value) for name, value in weights.items())


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_a_step_can_be_simulated(digits, norm, checkpointing):
    workload = workload_of(digits, {**LIGHT, "norm": norm}, augment=ALL)
    program = stage_program(workload, STAGE, workload.min_micro_batch_size)
    trace = simulate(program, find_device("T4"), micro_batch_size=16, precision="fp16", checkpointing=checkpointing)
    assert trace is not None


# Augmentation


def test_the_same_generator_state_gives_the_same_batch(digits):
    workload = workload_of(digits, augment=ALL)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    batches = [first(workload, 40), first(workload, 40)]
    torch.set_rng_state(state)
    again = [first(workload, 40), first(workload, 40)]
    for one, two in zip(batches, again, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(batches[0]["image"], batches[1]["image"])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_only_train_images_are_changed_and_only_they_draw(digits, split):
    plain, changing = workload_of(digits), workload_of(digits, augment=ALL)
    state = torch.get_rng_state()
    batch = first(changing, 20, split)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(batch[name], value) for name, value in first(plain, 20, split).items())
    assert batch.keys() == {"image", "label"}
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.uint8, torch.int64)


def test_without_augmentation_nothing_is_drawn(workload):
    state = torch.get_rng_state()
    batch = first(workload, 20)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch["image"], torch.from_numpy(workload.data.batch("train", np.arange(20))["image"]))


def augmented_by(digits, **augment):
    torch.manual_seed(0)
    plain = first(workload_of(digits), 200)
    changed = first(workload_of(digits, augment=augment), 200)
    assert torch.equal(changed["label"], plain["label"])
    return plain["image"], changed["image"]


def test_flips_are_mirror_images_of_the_asked_share(digits):
    plain, changed = augmented_by(digits, flip=0.3)
    flipped = (changed == plain.flip(2)).flatten(1).all(1)
    kept = (changed == plain).flatten(1).all(1)
    assert (flipped | kept).all()
    assert 0.2 < flipped.float().mean() < 0.4


def test_crops_are_shifted_images_with_zeros_moved_in(digits):
    plain, changed = augmented_by(digits, crop_padding=2)
    padded = F.pad(plain, (0, 0, 2, 2, 2, 2))
    shifts = [(row, column) for row in range(5) for column in range(5)]
    equal = torch.stack([(padded[:, r : r + 8, c : c + 8] == changed).flatten(1).all(1) for r, c in shifts])
    assert equal.any(dim=0).all()
    assert equal.any(dim=1).all()  # every shift occurs


def test_cutout_fills_one_square_with_the_mean(digits):
    plain, changed = augmented_by(digits, cutout=3)
    mean = round(workload_of(digits).manifest["normalization"]["mean"][0])
    differs = (plain != changed)[..., 0]
    assert (changed[differs.unsqueeze(-1)] == mean).all()
    rows, columns = differs.any(dim=2).sum(dim=1), differs.any(dim=1).sum(dim=1)
    assert (rows.max(), columns.max()) == (3, 3)


def test_mixup_blends_two_images_of_the_batch(digits):
    torch.manual_seed(0)
    plain = first(workload_of(digits), 20)
    changed = first(workload_of(digits, augment={"mixup": 0.5}), 20)
    assert changed["image"].dtype == torch.float32
    for index in range(20):
        share = changed["label_share"][index]
        blends = share * plain["image"][index] + (1 - share) * plain["image"].float()
        near = [i for i in range(20) if torch.allclose(blends[i], changed["image"][index], atol=1e-4)]
        assert any(plain["label"][i] == changed["label_other"][index] for i in near)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"augment": {"flip": 1.5}}, "augment.flip: expected a share"),
        ({"augment": {"crop_padding": -1}}, "augment.crop_padding: expected 0 to 1024"),
        ({"augment": {"mixup": -0.1}}, "augment.mixup: expected"),
        ({"augment": {"cutuot": 3}}, r"loss.augment.cutuot is no setting \(did you mean 'cutout'"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected at least 0"),
        ({"smoothing": 0.1}, "loss.smoothing is no setting"),
    ],
)
def test_refuses_settings_that_cannot_work(digits, loss, message):
    with pytest.raises(ConfigError, match=message):
        workload_of(digits, **loss)


# What is seen, predicted and compared


def test_normalization_is_that_of_train_images_alone(workload):
    train = first(workload, workload.num_samples("train"))["image"].double()
    model = net_of(workload)
    assert model.mean.item() == pytest.approx(train.mean().item(), rel=1e-6)
    assert model.std.item() == pytest.approx(train.std(unbiased=False).item(), rel=1e-6)


def test_no_image_is_in_two_splits(workload):
    digests = {
        split: workload.truth(split, np.arange(workload.num_samples(split)))["digest"]
        for split in ("train", "validation", "test")
    }
    for one, two in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not np.isin(digests[one], digests[two]).any()
    assert {split: len(each) for split, each in digests.items()} == {"train": 1295, "validation": 143, "test": 359}


def test_truth_agrees_with_the_batches(workload):
    chosen = np.array([5, 0, 7])
    truth = workload.truth("test", chosen)
    assert truth["class_truth"].tolist() == workload.batch("test", chosen)["label"].tolist()
    assert len(set(truth["origin"].tolist())) == 3


def test_predictions_are_probabilities_and_score(workload):
    model, size = net_of(workload).eval(), workload.num_samples("test")
    with torch.no_grad():
        found = workload.predict(model, first(workload, size, "test"))["class_probabilities"]
    assert found.sum(dim=1).tolist() == pytest.approx([1.0] * size, rel=1e-5)
    scores = workload.score(workload.truth("test", np.arange(size)), {"class_probabilities": found.numpy()})
    assert set(scores) | {"total", "class"} == set(MONITORS)


def test_variants_come_with_the_wanted_one_first(digits):
    variants = {"small": {**LIGHT, "width_multiplier": 0.5}, "wanted": LIGHT}
    found = VisionWorkload(digits, {"variant": "wanted", "variants": variants}, {}).variants()
    assert list(found) == ["wanted", "small"]
    sizes = [sum(p.numel() for p in build().parameters()) for build in found.values()]
    assert sizes[0] < sizes[1]


# Baselines


def test_baselines_are_the_majority_and_a_logistic_regression_as_good_as_scikit_learns(workload):
    from sklearn.linear_model import LogisticRegression

    truth = workload.truth("test", np.arange(workload.num_samples("test")))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    baselines = workload.baselines("test")
    assert torch.equal(torch.get_rng_state(), state)
    scores = {name: workload.score(truth, predictions) for name, predictions in baselines.items()}
    counts = workload.manifest["class_counts"]
    assert scores["majority"]["top1_accuracy"] == pytest.approx(
        counts["test"][int(np.argmax(counts["train"]))] / workload.num_samples("test")
    )
    assert scores["majority"]["nll"] == pytest.approx(np.log(10), abs=0.01)
    train, test = (workload.data.batch(s, np.arange(workload.num_samples(s))) for s in ("train", "test"))
    rows = train["image"].reshape(len(train["image"]), -1).astype(float)
    mean, std = rows.mean(axis=0), rows.std(axis=0)
    std[std == 0] = 1
    reference = LogisticRegression(max_iter=10_000, tol=1e-7).fit((rows - mean) / std, train["label"])
    expected = reference.predict_proba((test["image"].reshape(len(test["image"]), -1) - mean) / std)
    got = baselines["logistic_regression"]["class_probabilities"]
    assert np.abs(got - expected).max() < 0.01
    assert scores["logistic_regression"]["top1_accuracy"] > 0.95


def test_large_images_are_averaged_and_many_are_thinned_out(monkeypatch):
    random = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = random.integers(0, 100, (40, 70, 50, 3), np.uint8)
    images[labels == 1, :, :, 1] += 100
    found = fit_and_predict(lambda i: images[i], labels, 2, lambda i: images[i], 40)
    assert (found.argmax(axis=1) == labels).all()
    assert num_fitted(50_000, 32, 32, 3) == 50_000
    monkeypatch.setattr("memfit.workloads.logistic_regression.MAX_VALUES", 1 << 20)
    assert num_fitted(50_000, 32, 32, 3) == 341
    assert num_fitted(50_000, 224, 224, 3) == 341


def test_what_the_baselines_were_fitted_on_is_said(workload, monkeypatch):
    assert workload.describe()["baselines_fitted_on"]["logistic_regression"] == "1295 of 1295 train images"
    monkeypatch.setattr("memfit.workloads.logistic_regression.MAX_VALUES", 64 * 100)
    assert workload.describe()["baselines_fitted_on"]["logistic_regression"] == "100 of 1295 train images"
    json.dumps(workload.describe())


# Export


@pytest.fixture(scope="module")
def exported(digits, tmp_path_factory):
    """Export both kinds of normalization: folder and cards."""
    folder = tmp_path_factory.mktemp("export")
    return folder, export_all("vision", digits, folder, EXPORTED)


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_exported_graph_agrees_with_the_model_at_any_batch_size(exported, digits, norm, n):
    folder, _ = exported
    workload = VisionWorkload(digits, EXPORTED[norm], {})
    model = net_of(workload).eval()
    model.load_state_dict(torch.load(folder / f"{norm}.pt", weights_only=True))
    batch = first(workload, n, "test")
    with torch.no_grad():
        expected = workload.predict(model, batch)["class_probabilities"].numpy()
    session = onnxruntime.InferenceSession(folder / norm / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(["class_probabilities"], {"image": batch["image"].float().numpy()})
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_card_says_what_goes_in_and_what_comes_out(exported, norm):
    card = exported[1][norm]
    (image,), (output,) = card["signature"]["inputs"], card["signature"]["outputs"]
    assert (image["name"], image["shape"], image["unit"]) == ("image", ["batch", 8, 8, 1], "0 to 16")
    assert (output["name"], output["shape"]) == ("class_probabilities", ["batch", 10])
    assert card["vision"]["class_names"] == [str(digit) for digit in range(10)]
    assert card["vision"]["normalization"].keys() == {"mean", "std"}
    assert [batch["sizes"]["batch"] for batch in card["parity"]["batches"]][:2] == [1, 3]


# Training


def test_an_outline_has_what_planning_needs(tmp_path):
    outline_images(ImageSpec.from_dict({"source": {"kind": "cifar10", "path": __file__}}), tmp_path / "outline")
    workload = workload_of(tmp_path / "outline", {"name": "resnet18", "width_multiplier": 0.125}, augment=ALL)
    batch = first(workload, 4)
    assert batch["image"].shape == (4, 32, 32, 3)
    assert workload.loss(net_of(workload).train(), batch)["class"] > 0


def test_a_small_net_learns_digits_in_seconds(digits):
    workload = workload_of(digits, {**BATCHED, "width_multiplier": 0.5}, augment={"crop_padding": 1})
    program = stage_program(workload, {**STAGE, "optimizer": {"name": "adamw", "lr": 5e-3}}, 16)
    torch.manual_seed(0)
    model = program.build()
    step = TrainingStep(StepLayout(), program, model, program.optimizer(model), clip=1.0)
    schedule = Schedule(step.optimizer, {"name": "cosine", "warmup_steps": 5, "final_factor": 0.0}, 80, "max")
    for _ in range(4):
        for chosen in np.array_split(torch.randperm(workload.num_samples("train")).numpy(), 20):
            step(workload.batch("train", chosen))
            schedule.after_step()
    size = workload.num_samples("validation")
    with torch.no_grad():
        found = workload.predict(model.eval(), first(workload, size, "validation"))
    truth = workload.truth("validation", np.arange(size))
    arrays = {name: value.numpy() for name, value in found.items()}
    assert workload.score(truth, arrays)["top1_accuracy"] > 0.9
