"""Where images come from: paths that do not exist."""

import pytest

from memfit.errors import DataError
from tests.memfit.data.image_sets import prepared, spec_of


def test_a_missing_source_names_the_nearest(npz, tmp_path):
    npz("images.npz")
    with pytest.raises(DataError, match=r"no such file or directory \(did you mean 'images.npz'\?\)"):
        prepared(spec_of(path=tmp_path / "image.npz"), tmp_path / "store")
    with pytest.raises(DataError, match="no path"):
        prepared(spec_of(path="~nobody-of-this-name/x.npz"), tmp_path / "store")
