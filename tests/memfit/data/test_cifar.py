"""CIFAR as it is published: both versions, archives and directories, hostile files."""

import gzip
import io
import pickle
import tarfile

import numpy as np
import pytest

from memfit.data import cifar
from memfit.errors import DataError
from tests.memfit.data.hostile_pickle import Runs
from tests.memfit.data.image_sets import prepared, spec_of


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


def test_gzip_is_known_by_its_bytes_not_its_name(tmp_path, few_classes):
    files, _, labels = cifar_files("cifar10", "binary")
    path = tar(tmp_path / "cifar.bin", files)
    assert gzip.decompress(path.read_bytes())
    assert len(prepared(spec_of("cifar10", path), tmp_path / "store").labels) == len(labels)


def test_a_hostile_archive_runs_nothing(tmp_path, few_classes):
    files, _, _ = cifar_files("cifar10", "python")
    files["data_batch_1"] = pickle.dumps({"data": Runs(tmp_path / "evidence")}, protocol=2)
    with pytest.raises(DataError, match=r"data_batch_1: expected a pickle of arrays.*builtin"):
        prepared(spec_of("cifar10", tar(tmp_path / "cifar.tar.gz", files)), tmp_path / "store")
    assert not (tmp_path / "evidence").exists()
