"""Images in .npz files: known names, and arrays that are refused before they are read."""

import io
import zipfile

import numpy as np
import pytest

from memfit.errors import DataError
from tests.memfit.data.image_sets import drawn, prepared, spec_of


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
