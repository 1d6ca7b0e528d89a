"""Prepared images: splits that share nothing, statistics of train alone, directories that are whole or absent."""

import io

import numpy as np
import pytest

from memfit.data.images import choose_splits, drop_shared, images_fingerprint, outline_images, prepare_images
from memfit.data.prepared_images import PreparedImages
from memfit.data.raw_images import RawImages
from memfit.errors import DataError
from tests.memfit.data.image_sets import drawn, prepared, spec_of

RANDOM = np.random.default_rng(0)


def pixels_of(data, split):
    batch = data.batch(split, np.arange(data.num_images(split)))
    return {image.tobytes() for image in batch["image"]}


# Splits and statistics


def test_splits_hold_every_image_once_and_every_class(npz, tmp_path):
    data = prepared(spec_of(path=npz()), tmp_path / "store")
    images, labels = drawn(60)
    assert [data.num_images(split) for split in ("train", "validation", "test")] == [42, 6, 12]
    assert sorted(data.origins.tolist()) == list(range(60))
    for split in ("train", "validation", "test"):
        chosen = RANDOM.permutation(data.num_images(split))
        batch, rows = data.batch(split, chosen), data.rows(split, chosen)
        np.testing.assert_array_equal(batch["image"], images[data.origins[rows]])
        np.testing.assert_array_equal(batch["label"], labels[data.origins[rows]])
        assert len(set(data.manifest["class_counts"][split])) == 1
    assert data.manifest["splits_of_the_source"] == []


def test_the_split_follows_seed_and_pixels_not_the_order_of_the_source(npz, tmp_path):
    images, labels = drawn(60)
    order = RANDOM.permutation(60)
    plain = prepared(spec_of(path=npz()), tmp_path / "a")
    shuffled = prepared(spec_of(path=npz("b.npz", x=images[order], y=labels[order])), tmp_path / "b")
    other = prepared(spec_of(path=npz(), seed=1), tmp_path / "a")
    assert pixels_of(plain, "test") == pixels_of(shuffled, "test")
    assert pixels_of(plain, "test") != pixels_of(other, "test")


def test_statistics_are_those_of_train_images_alone(npz, tmp_path):
    images, labels = drawn(60)
    data = prepared(
        spec_of(path=npz(x_train=images[:40], y_train=labels[:40], x_test=images[40:], y_test=labels[40:])), tmp_path
    )
    train = data.batch("train", np.arange(data.num_images("train")))["image"].astype(np.float64)
    assert data.manifest["normalization"]["mean"] == pytest.approx(train.mean(axis=(0, 1, 2)))
    assert data.manifest["normalization"]["std"] == pytest.approx(train.std(axis=(0, 1, 2)))


def test_pixels_of_other_splits_do_not_move_the_statistics(npz, tmp_path):
    images, labels = drawn(60)
    found = []
    for held in (images[40:], 255 - images[40:] // 2):
        arrays = {
            "x_train": images[:40],
            "y_train": labels[:40],
            "x_validation": held[:10],
            "y_validation": labels[:10],
        }
        data = prepared(spec_of(path=npz(**arrays, x_test=held[10:], y_test=labels[10:20])), tmp_path / "store")
        assert data.manifest["splits_of_the_source"] == ["validation", "test"]
        found.append(data.manifest["normalization"])
    assert found[0] == found[1]


def test_a_channel_that_does_not_vary_has_a_std_of_one(npz, tmp_path):
    images, labels = drawn(60)
    images[..., 1] = 7
    assert (
        prepared(spec_of(path=npz(x=images, y=labels)), tmp_path / "store").manifest["normalization"]["std"][1] == 1.0
    )


def test_copies_in_other_splits_are_dropped_and_counted(npz, tmp_path):
    images, labels = drawn(60)
    train, test = images[:40].copy(), images[40:]
    train[3], train[7], train[8] = test[0], test[1], train[9]
    arrays = {"x_train": train, "y_train": labels[:40], "x_test": test, "y_test": labels[40:]}
    data = prepared(spec_of(path=npz(**arrays), validation_share=0.2), tmp_path / "store")
    dropped = data.manifest["duplicates"]
    assert dropped["dropped_from_train"] + dropped["dropped_from_validation"] >= 2
    assert sum(data.num_images(split) for split in ("train", "validation", "test")) == 60 - (
        dropped["dropped_from_train"] + dropped["dropped_from_validation"]
    )
    splits = [pixels_of(data, split) for split in ("train", "validation", "test")]
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]
    assert data.num_images("test") == 20


def test_dropping_names_the_split_that_loses():
    digests = np.array([1, 1, 2, 2, 3, 3, 4, 1], np.uint64)
    splits = np.array([0, 2, 0, 1, 1, 2, 0, 0], np.int8)
    assert drop_shared(splits, digests) == {"train": 3, "validation": 1}
    assert splits.tolist() == [-1, 2, -1, 1, -1, 2, 0, -1]


def test_copies_within_a_class_stay_together_when_splits_are_drawn(npz, tmp_path):
    images, labels = drawn(60, classes=2)
    images[30:] = images[:30]
    data = prepared(spec_of(path=npz(x=images, y=labels)), tmp_path / "store")
    duplicates = data.manifest["duplicates"]
    assert duplicates["dropped_from_train"] + duplicates["dropped_from_validation"] <= 4  # only at the borders
    assert duplicates["repeated_within_train"] > 10


def test_a_class_whose_images_are_all_copies_is_refused(npz, tmp_path):
    images, labels = drawn(60)
    arrays = {"x_train": images, "y_train": labels, "x_test": images[labels == 1], "y_test": labels[labels == 1]}
    with pytest.raises(DataError, match="class '1' has no image left to train on"):
        prepared(spec_of(path=npz(**arrays)), tmp_path / "store")


def test_a_class_that_is_too_small_is_refused(npz, tmp_path):
    images, _ = drawn(60)
    labels = np.array([1, 1] + [0] * 58)
    with pytest.raises(DataError, match="class '1' has 2 images to train on; expected at least 3"):
        prepared(spec_of(path=npz(x=images, y=labels)), tmp_path / "store")


def test_every_split_has_an_image_of_the_smallest_class():
    raw = RawImages(*drawn(3, classes=1), np.zeros(3, np.int8), ["only"])
    for shares in ((0.01, 0.01), (0.98, 0.98)):
        spec = spec_of(path="x", validation_share=shares[0], test_share=shares[1])
        assert sorted(choose_splits(spec, raw, np.arange(3, dtype=np.uint64)).tolist()) == [0, 1, 2]


# Directories


def test_what_is_whole_is_used_again_and_what_is_not_is_made_anew(npz, tmp_path):
    spec, store, said = spec_of(path=npz()), tmp_path / "store", []
    directory = prepare_images(spec, store, code_version="1", on_progress=lambda *each: said.append(each))
    assert directory.name == images_fingerprint(spec, "1") != images_fingerprint(spec, "2")
    assert [said[0], said[-1]] == [("hash", 0.0), ("done", 1.0)]
    assert {path.name for path in directory.iterdir()} == {
        *("images.npy", "labels.npy", "digests.npy", "origins.npy", "manifest.json")
    }
    made = (directory / "images.npy").stat().st_mtime_ns
    assert prepare_images(spec, store, code_version="1") == directory
    assert (directory / "images.npy").stat().st_mtime_ns == made
    with (directory / "images.npy").open("r+b") as opened:
        opened.seek(-1, io.SEEK_END)
        opened.write(b"\x00" if opened.read(1) != b"\x00" else b"\x01")
    prepare_images(spec, store, code_version="1")
    assert (directory / "images.npy").stat().st_mtime_ns != made


def test_the_fingerprint_does_not_depend_on_where_files_lie(npz, tmp_path):
    first = npz()
    (tmp_path / "elsewhere").mkdir()
    second = tmp_path / "elsewhere" / first.name
    second.write_bytes(first.read_bytes())
    assert images_fingerprint(spec_of(path=first), "1") == images_fingerprint(spec_of(path=second), "1")
    second.write_bytes(npz("other.npz", x=drawn(60, seed=1)[0], y=drawn(60)[1]).read_bytes())
    assert images_fingerprint(spec_of(path=first), "1") != images_fingerprint(spec_of(path=second), "1")


def test_a_failure_leaves_nothing_behind(npz, tmp_path):
    images, labels = drawn(60)
    with pytest.raises(DataError):
        prepared(spec_of(path=npz(x=images, y=labels * 0)), tmp_path / "store")
    assert [path for path in (tmp_path / "store").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("kind", ["sample", "npz", "folder", "cifar10", "cifar100"])
def test_an_outline_has_the_shapes_of_the_data(kind, npz, folder, tmp_path):
    if kind == "folder":
        spec = spec_of(kind, folder(), image_size=8)
    elif kind == "sample":
        spec = spec_of(kind)
    else:
        path = tmp_path / "not looked into"
        path.write_bytes(b"")
        spec = spec_of(kind, npz() if kind == "npz" else path)
    outline_images(spec, tmp_path / "outline")
    outline = PreparedImages(tmp_path / "outline")
    assert min(outline.num_images(split) for split in ("train", "validation", "test")) >= 64
    if kind.startswith("cifar"):
        assert outline.manifest["num_classes"] == (10 if kind == "cifar10" else 100)
        return
    data = prepared(spec, tmp_path / "store")
    assert outline.manifest.keys() | {"source"} == data.manifest.keys()
    for key in ("image_size", "channels", "num_classes", "class_names", "value_range"):
        assert outline.manifest[key] == data.manifest[key]
