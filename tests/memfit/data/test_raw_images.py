"""Files of a source as they were listed."""

import os

import pytest

from memfit.data.raw_images import ImageFile
from memfit.errors import DataError


def test_a_file_that_is_too_large_is_refused_when_it_is_listed(tmp_path):
    path = tmp_path / "large.png"
    path.touch()
    os.truncate(path, 3 << 20)
    with pytest.raises(DataError, match=r"large\.png: expected at most 2 MiB, got 3 MiB"):
        ImageFile.found(path, "large.png", max_bytes=2 << 20)
    assert ImageFile.found(path, "large.png").num_bytes == 3 << 20


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    file = ImageFile.found(path, "cat/a.png", label="cat")
    file.check_unchanged()
    path.write_bytes(b"three")
    with pytest.raises(DataError, match=r"a\.png changed while it was read"):
        file.check_unchanged()
