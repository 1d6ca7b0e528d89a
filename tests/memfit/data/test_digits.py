"""The packaged sample of handwritten digits."""

import numpy as np
import pytest

from memfit.data import digits
from memfit.errors import DataError
from tests.memfit.data.image_sets import prepared, spec_of


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
        raise digits.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(digits.importlib.metadata, "distribution", absent)
    with pytest.raises(DataError, match=r"pip install memfit\[samples\]"):
        prepared(spec_of("sample"), tmp_path / "store")
