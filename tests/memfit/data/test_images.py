"""Images: sources as they are published, splits that share nothing, statistics of train alone, hostile files."""

import gzip
import io
import json
import pickle
import pickletools
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from memfit.data import cifar, image_sources
from memfit.data.image_spec import ImageSpec
from memfit.data.images import choose_splits, drop_shared, images_fingerprint, outline_images, prepare_images
from memfit.data.plain_pickle import read_plain_pickle
from memfit.data.prepared_images import PreparedImages
from memfit.errors import ConfigError, DataError

RANDOM = np.random.default_rng(0)


def spec_of(kind="npz", path=None, **changes):
    source_keys = ("image_size", "channels", "labels", "name")
    source = {"kind": kind, **({"path": str(path)} if path is not None else {})}
    source |= {key: changes.pop(key) for key in source_keys if key in changes}
    return ImageSpec.from_dict({"source": source, **changes})


def prepared(spec, store, **options):
    return PreparedImages(prepare_images(spec, store, code_version="1", **options))


def drawn(n, size=6, channels=3, classes=3, seed=0):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (n, size, size, channels), np.uint8)
    return images, np.arange(n) % classes


@pytest.fixture
def npz(tmp_path):
    """Write arrays by name; x and y of 60 images of 3 classes where none are given."""

    def write(name="data.npz", **arrays):
        images, labels = drawn(60)
        np.savez(tmp_path / name, **(arrays or {"x": images, "y": labels}))
        return tmp_path / name

    return write


def pixels_of(data, split):
    batch = data.batch(split, np.arange(data.num_images(split)))
    return {image.tobytes() for image in batch["image"]}


# Preparation


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
    raw = image_sources.RawImages(*drawn(3, classes=1), np.zeros(3, np.int8), ["only"])
    for shares in ((0.01, 0.01), (0.98, 0.98)):
        spec = spec_of(path="x", validation_share=shares[0], test_share=shares[1])
        assert sorted(choose_splits(spec, raw, np.arange(3, dtype=np.uint64)).tolist()) == [0, 1, 2]


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


# Prepared


def test_a_batch_is_a_copy_with_the_types_that_training_takes(npz, tmp_path):
    data = prepared(spec_of(path=npz()), tmp_path / "store")
    batch = data.batch("validation", np.array([3, 0]))
    assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (2, 6, 6, 3))
    assert (batch["label"].dtype, batch["label"].shape) == (np.int64, (2,))
    for array in batch.values():
        assert type(array) is np.ndarray
        assert array.flags.writeable
    assert isinstance(data.images, np.memmap)
    assert len(pickle.dumps(data)) < 1000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(data)).images, data.images)


@pytest.mark.parametrize("index", [-1, 6])
def test_refuses_an_index_outside_the_split(npz, tmp_path, index):
    data = prepared(spec_of(path=npz()), tmp_path / "store")
    with pytest.raises(DataError, match="validation has images 0 to 5"):
        data.batch("validation", np.array([0, index]))


def test_refuses_an_unknown_split_and_a_directory_that_is_not_whole(npz, tmp_path):
    data = prepared(spec_of(path=npz()), tmp_path / "store")
    with pytest.raises(DataError, match="unknown split 'dev'"):
        data.num_images("dev")
    manifest = data.path / "manifest.json"
    manifest.write_text(json.dumps({**data.manifest, "channels": 1}))
    with pytest.raises(DataError, match=r"images\.npy has the shape"):
        PreparedImages(data.path)
    manifest.write_text("{}")
    with pytest.raises(DataError, match="no whole prepared images"):
        PreparedImages(data.path)


# The sample


def test_digits_are_those_of_scikit_learn(tmp_path):
    from sklearn.datasets import load_digits

    data = prepared(spec_of("sample"), tmp_path / "store")
    expected = load_digits()
    order = np.asarray(data.origins)
    np.testing.assert_array_equal(data.images[..., 0], expected.images[order])
    np.testing.assert_array_equal(data.labels, expected.target[order])
    assert data.manifest["value_range"] == [0, 16]
    assert sum(data.num_images(split) for split in ("train", "validation", "test")) == 1797


def test_the_sample_that_is_not_installed_says_how_to_get_it(monkeypatch, tmp_path):
    def absent(name):
        raise image_sources.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(image_sources.importlib.metadata, "distribution", absent)
    with pytest.raises(DataError, match=r"pip install memfit\[samples\]"):
        prepared(spec_of("sample"), tmp_path / "store")


# CIFAR


def python_2_batch(pixels, labels, key="labels"):
    """Write what CIFAR's authors wrote with Python 2: text and bytes are both strings of bytes."""
    raw = pixels.tobytes()
    shape = b"M" + len(pixels).to_bytes(2, "little") + b"M" + pixels.shape[1].to_bytes(2, "little")
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87Rq\x04(K\x01"
        + shape
        + b"\x86cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87Rq\x06(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(raw).to_bytes(4, "little")
        + raw
        + b"tb"
    )
    numbers = b"]q\x07(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    name = b"U" + bytes([len(key)]) + key.encode()
    return b"\x80\x02}q\x01(U\x04data" + array + name + numbers + b"U\x0bbatch_labelU\x05batchu."


def cifar_files(kind, version, seed=0):
    """Make the files of a small CIFAR: 12 images a file; return them, and images and labels in order."""
    random = np.random.default_rng(seed)
    files, all_images, all_labels = {}, [], []
    layout = cifar.LAYOUTS[kind][version == "binary"]
    classes = 3 if kind == "cifar10" else 5
    for name in (*layout.train, layout.test):
        pixels = random.integers(0, 256, (60, 3072), np.uint8)
        fine = np.arange(60) % classes
        if version == "binary":
            head = [fine // 2, fine] if kind == "cifar100" else [fine]
            files[name] = np.column_stack([*head, pixels]).astype(np.uint8).tobytes()
        else:
            files[name] = python_2_batch(pixels, fine, "labels" if kind == "cifar10" else "fine_labels")
        all_images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        all_labels.append(fine)
    return files, np.concatenate(all_images), np.concatenate(all_labels)


def tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def few_classes(monkeypatch):
    monkeypatch.setattr(cifar, "num_classes", lambda source: 3 if source.kind == "cifar10" else 5)


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_reads_both_versions_of_cifar_from_archive_and_directory(kind, version, few_classes, tmp_path):
    files, images, labels = cifar_files(kind, version)
    packed = prepared(spec_of(kind, tar(tmp_path / "cifar.tar.gz", files)), tmp_path / "store")
    num_train = len(labels) - 60
    assert packed.manifest["splits_of_the_source"] == ["test"]
    assert sorted(packed.origins[packed.rows("test", np.arange(60))].tolist()) == [*range(num_train, len(labels))]
    np.testing.assert_array_equal(packed.images, images[packed.origins])
    np.testing.assert_array_equal(packed.labels, labels[packed.origins])
    folder = tmp_path / "extracted"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    unpacked = prepared(spec_of(kind, folder), tmp_path / "store")
    np.testing.assert_array_equal(unpacked.images, packed.images)
    assert (tar(tmp_path / "plain.tar", files, "w")).stat().st_size > 0
    plain = prepared(spec_of(kind, tmp_path / "plain.tar"), tmp_path / "store")
    np.testing.assert_array_equal(plain.labels, packed.labels)


def test_class_names_come_from_the_archive(tmp_path):
    files, _, _ = cifar_files("cifar10", "python")
    names = [f"kind {index}" for index in range(10)]
    files["batches.meta"] = pickle.dumps({"label_names": names, "num_cases_per_batch": 60}, protocol=2)
    found = cifar.read_cifar(spec_of("cifar10", "x").source, tar(tmp_path / "cifar.tar.gz", files))
    assert found.class_names == names
    files, _, _ = cifar_files("cifar100", "binary")
    files["coarse_label_names.txt"] = "\n".join(f"group_{index}" for index in range(20)).encode()
    found = cifar.read_cifar(spec_of("cifar100", "x", labels="coarse").source, tar(tmp_path / "c.tar.gz", files))
    assert found.class_names[:2] == ["group_0", "group_1"]
    assert set(found.labels.tolist()) == {0, 1, 2}


def test_a_missing_file_of_cifar_is_named(tmp_path):
    files, _, _ = cifar_files("cifar10", "binary")
    del files["data_batch_3.bin"]
    with pytest.raises(DataError, match=r"data_batch_3.bin not there"):
        prepared(spec_of("cifar10", tar(tmp_path / "cifar.tar.gz", files)), tmp_path / "store")


def test_a_torn_archive_and_torn_records_are_refused(tmp_path):
    files, _, _ = cifar_files("cifar10", "binary")
    torn = tmp_path / "torn.tar.gz"
    torn.write_bytes(tar(tmp_path / "cifar.tar.gz", files).read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"Fetch it again|not there"):
        prepared(spec_of("cifar10", torn), tmp_path / "store")
    files["data_batch_2.bin"] = files["data_batch_2.bin"][:-1]
    with pytest.raises(DataError, match="expected records of 3073 bytes"):
        prepared(spec_of("cifar10", tar(tmp_path / "short.tar.gz", files)), tmp_path / "store")


def test_an_archive_that_expands_too_far_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "MAX_ARCHIVE_BYTES", 1 << 20)
    bomb = tar(tmp_path / "bomb.tar.gz", {"other": bytes(4 << 20)})
    with pytest.raises(DataError, match="expand to at most 1 MiB"):
        prepared(spec_of("cifar10", bomb), tmp_path / "store")


def test_a_link_in_an_archive_is_no_file(tmp_path):
    files, _, _ = cifar_files("cifar10", "binary")
    del files["test_batch.bin"]
    path = tar(tmp_path / "cifar.tar", files, "w")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("cifar/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"test_batch\.bin not there"):
        prepared(spec_of("cifar10", path), tmp_path / "store")


# Pickles


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_reads_arrays_lists_and_text_of_any_protocol(protocol):
    document = {
        "data": RANDOM.integers(0, 256, (3, 4), np.uint8),
        "labels": [1, 2, 300],
        b"names": [b"a", "b"],
        "more": (None, True, -5, 1.5, 2**40),
    }
    read = read_plain_pickle(pickle.dumps(document, protocol=protocol), "data")
    np.testing.assert_array_equal(read.pop("data"), document.pop("data"))
    assert read == document


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_hostile_pickle_runs_nothing(protocol, tmp_path):
    evidence = tmp_path / "evidence"
    for document in (Runs(evidence), {"data": Runs(evidence)}, [Runs(evidence)]):
        raw = pickle.dumps(document, protocol=protocol)
        with pytest.raises(DataError, match="Nothing of it was run"):
            read_plain_pickle(raw, "data")
    assert not evidence.exists()
    pickle.loads(raw)
    assert evidence.exists()  # it would have, had it been loaded


def test_a_hostile_archive_runs_nothing(tmp_path, few_classes):
    files, _, _ = cifar_files("cifar10", "python")
    files["data_batch_1"] = pickle.dumps({"data": Runs(tmp_path / "evidence")}, protocol=2)
    with pytest.raises(DataError, match=r"data_batch_1: expected a pickle of arrays.*builtin"):
        prepared(spec_of("cifar10", tar(tmp_path / "cifar.tar.gz", files)), tmp_path / "store")
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80\x02}",
        b"no pickle",
        b"\x80\x02cos\nsystem\nU\x04true\x85R.",
        b"\x80\x02cnumpy\nndarray\n(U\x01aU\x01bu.",  # items for a class
        b"\x80\x02cnumpy\nndarray\n}b.",  # a state for a class
        b"\x80\x02]r\xff\xff\xff\xff.",  # a place in the memo for which others reserve 64 GB
        b"\x80\x02U\x01b" + b"\x86" * 3 + b".",
        b"\x80\x02}" + b"".join([b"K\x00q\x00"] + [b"h\x00h\x00\x86q\x00"] * 60) + b"K\x00s.",  # a key of 2^60 parts
        b"\x80\x02\x8a\xff",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x02Qx.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R.",  # without a state
    ],
)
def test_malformed_pickles_are_refused_in_no_time(raw):
    try:
        assert read_plain_pickle(raw, "data") == []
    except DataError as error:
        assert "data: expected a" in str(error)  # noqa: PT017


def test_arrays_of_objects_and_of_other_sizes_are_refused():
    for array in (np.array([{}, []], object), np.zeros(3, np.float32), np.asfortranarray(np.zeros((2, 3), np.uint8))):
        with pytest.raises(DataError, match="expected a pickle of arrays"):
            read_plain_pickle(pickle.dumps({"data": array}, protocol=2), "data")


def test_only_known_instructions_are_interpreted():
    from memfit.data.plain_pickle import _Reader

    names = {opcode.name for opcode in pickletools.opcodes}
    own = {name for name in names if hasattr(_Reader, f"_{name.lower()}")}
    assert own <= {
        *("MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND"),
        *("APPENDS", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "BINGET", "LONG_BINGET"),
        *("GET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    }


# Folders


@pytest.fixture
def folder(tmp_path):
    """Write images of two classes, 20 each: `folder(splits)`; red ones are cats."""

    def write(*splits, size=(12, 10), suffix=".png"):
        random = np.random.default_rng(1)
        for split in splits or ("",):
            for label, channel in (("cat", 0), ("dog", 2)):
                where = tmp_path / "images" / split / label
                where.mkdir(parents=True)
                for index in range(20):
                    pixels = random.integers(0, 60, (size[1], size[0], 3), np.uint8)
                    pixels[..., channel] += 150
                    Image.fromarray(pixels).save(where / f"{index:02}{suffix}")
        return tmp_path / "images"

    return write


def test_a_folder_of_classes_becomes_squares(folder, tmp_path):
    root = folder()
    (root / ".hidden").mkdir()
    (root / "cat" / "notes.txt").write_text("no image")
    data = prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    assert data.manifest["class_names"] == ["cat", "dog"]
    assert data.manifest["image_size"] == [8, 8]
    batch = data.batch("test", np.arange(data.num_images("test")))
    assert np.array_equal(batch["image"].mean(axis=(1, 2)).argmax(axis=1), 2 * batch["label"])
    assert data.manifest["source"]["files"] == 40
    assert not (data.path / "decoded.npy").exists()


def test_splits_of_a_folder_are_kept(folder, tmp_path):
    data = prepared(spec_of("folder", folder("train", "val", "test"), image_size=10, channels=1), tmp_path / "store")
    assert data.manifest["splits_of_the_source"] == ["validation", "test"]
    assert [data.num_images(split) for split in ("train", "validation", "test")] == [40, 40, 40]
    assert data.manifest["channels"] == 1


def test_images_of_the_right_size_are_taken_as_they_are(folder, tmp_path):
    root = folder(size=(8, 8))
    data = prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    first = np.asarray(Image.open(root / "cat" / "00.png"))
    np.testing.assert_array_equal(data.images[np.flatnonzero(data.origins == 0)[0]], first)


def test_an_image_that_is_turned_by_its_metadata_is_turned(folder, tmp_path):
    root = folder(size=(8, 8))
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(root / "cat" / "00.png", exif=exif)
    data = prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    turned = data.images[np.flatnonzero(data.origins == 0)[0]]
    assert (turned[:4].max(), turned[4:].min()) == (0, 255)


def test_a_decompression_bomb_is_refused_by_its_header(folder, tmp_path, monkeypatch):
    root = folder()
    Image.new("L", (6000, 6000)).save(root / "dog" / "bomb.png")
    with pytest.raises(DataError, match=r"bomb.png: expected at most 33,554,432 pixels, got 6000 x 6000"):
        prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)
    with pytest.raises(DataError, match=r"bomb.png: .*decompression bomb"):
        prepared(spec_of("folder", root, image_size=8), tmp_path / "store")


def test_what_is_no_image_is_refused(folder, tmp_path):
    root = folder()
    spoiled = root / "cat" / "05.png"
    for content in (b"", b"GIF89a no", spoiled.read_bytes()[:100]):
        spoiled.write_bytes(content)
        with pytest.raises(DataError, match=r"05.png: no whole image"):
            prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(spoiled)
    with pytest.raises(DataError, match="expected 8 bits a channel"):
        prepared(spec_of("folder", root, image_size=8), tmp_path / "store")


def test_folders_without_images_or_with_new_classes_are_refused(folder, tmp_path):
    root = folder("train", "test")
    (root / "test" / "bird").mkdir()
    with pytest.raises(DataError, match="bird: expected images"):
        prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    Image.new("RGB", (8, 8)).save(root / "test" / "bird" / "0.png")
    with pytest.raises(DataError, match="class 'bird' is in validation or test but not in train"):
        prepared(spec_of("folder", root, image_size=8), tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="got no images"):
        prepared(spec_of("folder", tmp_path / "empty", image_size=8), tmp_path / "store")


# Arrays


@pytest.mark.parametrize("names", ["x_{} y_{}", "{}_images {}_labels"])
def test_known_names_of_arrays_are_found(npz, tmp_path, names):
    images, labels = drawn(60, channels=1)
    parts = {"train": slice(0, 40), "val": slice(40, 50), "test": slice(50, 60)}
    first, second = names.split()
    arrays = {first.format(key): images[part][..., 0] for key, part in parts.items()}
    arrays |= {second.format(key): labels[part][:, None] for key, part in parts.items()}
    data = prepared(spec_of(path=npz(**arrays)), tmp_path / "store")
    assert [data.num_images(split) for split in ("train", "validation", "test")] == [40, 10, 10]
    assert data.manifest["image_size"] + [data.manifest["channels"]] == [6, 6, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "expected arrays x and y"),
        ({"x": np.zeros((4, 6, 6), np.float32), "y": np.arange(4)}, r"x: expected uint8 .* got float32"),
        ({"x": np.zeros((4, 6), np.uint8), "y": np.arange(4)}, r"got uint8 \[4, 6\]"),
        ({"x": np.zeros((4, 6, 6), np.uint8), "y": np.arange(3)}, "as many y as x"),
        ({"x": np.zeros((4, 6, 6), np.uint8), "y": np.ones(4)}, "y: expected whole numbers"),
        ({"x": np.zeros((4, 6, 6), np.uint8), "y": -np.arange(4)}, "expected labels 0 to"),
        ({"x": np.zeros((4, 6, 6, 7), np.uint8), "y": np.arange(4)}, "4 channels"),
        ({"x": np.array([{}] * 4, object), "y": np.arange(4)}, "got object"),
    ],
)
def test_arrays_that_are_no_images_are_refused(npz, tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        prepared(spec_of(path=npz(**arrays)), tmp_path / "store")


def test_an_npz_file_that_lies_or_expands_too_far_is_refused(tmp_path, monkeypatch):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 8)})
    labels = io.BytesIO()
    np.save(labels, np.arange(4))
    with zipfile.ZipFile(tmp_path / "lies.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue())
        archive.writestr("y.npy", labels.getvalue())
    with pytest.raises(DataError, match="which is more than it holds"):
        prepared(spec_of(path=tmp_path / "lies.npz"), tmp_path / "store")
    monkeypatch.setattr("memfit.data.limits.HARMLESS_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((30000, 8, 8), np.uint8), y=np.zeros(30000, np.int64))
    with pytest.raises(DataError, match="expected at most 200 times as many"):
        prepared(spec_of(path=tmp_path / "bomb.npz"), tmp_path / "store")
    (tmp_path / "none.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"expected a \.npz file"):
        prepared(spec_of(path=tmp_path / "none.npz"), tmp_path / "store")


# Outlines and specs


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


def test_a_missing_source_names_the_nearest(npz, tmp_path):
    npz("images.npz")
    with pytest.raises(DataError, match=r"no such file or directory \(did you mean 'images.npz'\?\)"):
        prepared(spec_of(path=tmp_path / "image.npz"), tmp_path / "store")
    with pytest.raises(DataError, match="no path"):
        prepared(spec_of(path="~nobody-of-this-name/x.npz"), tmp_path / "store")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"source": {"kind": "mnist"}}, "source.kind: expected one of cifar10"),
        ({"source": {"kind": "npz"}}, "source.path: expected a path"),
        ({"source": {"kind": "sample", "path": "x"}}, "source.path: expected none"),
        ({"source": {"kind": "folder", "path": "x"}}, "source.image_size: expected 1 to 2048 pixels, got 0"),
        ({"source": {"kind": "npz", "path": "x"}, "validation_share": 0}, "validation_share: expected a share"),
        ({"source": {"kind": "npz", "path": "x"}, "sede": 1}, r"sede is no setting \(did you mean 'seed'\?\)"),
        ({"source": {"kind": "cifar100", "path": "x", "labels": "both"}}, 'source.labels: expected "fine"'),
        (["source"], "data: expected a table"),
    ],
)
def test_refuses_settings_that_cannot_work(document, message):
    with pytest.raises(ConfigError, match=message):
        ImageSpec.from_dict(document)


def test_a_spec_is_its_document():
    spec = spec_of("cifar100", "x.tar.gz", labels="coarse", seed=3)
    assert ImageSpec.from_dict(spec.to_dict()) == spec


def test_gzip_is_known_by_its_bytes_not_its_name(tmp_path, few_classes):
    files, _, labels = cifar_files("cifar10", "binary")
    path = tar(tmp_path / "cifar.bin", files)
    assert gzip.decompress(path.read_bytes())
    assert len(prepared(spec_of("cifar10", path), tmp_path / "store").labels) == len(labels)
