"""Batches of prepared images, and directories that hold none."""

import json
import pickle

import numpy as np
import pytest

from memfit.data.prepared_images import PreparedImages
from memfit.errors import DataError
from tests.memfit.data.image_sets import prepared, spec_of


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
