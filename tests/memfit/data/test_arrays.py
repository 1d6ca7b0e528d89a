import numpy as np
import pytest

from memfit.data.arrays import ArrayWriter, Moments


def test_pieces_make_a_plain_npy_file(tmp_path):
    array = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    with ArrayWriter(tmp_path / "a.npy", np.float32, (10, 3)) as writer:
        for start in range(0, 10, 4):
            writer.write(array[start : start + 4])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), array)


def test_a_file_with_too_few_rows_is_a_mistake(tmp_path):
    with pytest.raises(AssertionError), ArrayWriter(tmp_path / "a.npy", np.float32, (10,)) as writer:
        writer.write(np.zeros(9))


@pytest.mark.parametrize("piece", [1, 3, 50])
def test_merged_moments_are_those_of_the_whole(piece):
    rows = np.random.default_rng(0).normal([0, 1e6, -3], [1, 1e-2, 5], (50, 3))
    moments = Moments(3)
    for start in range(0, 50, piece):
        moments.add(rows[start : start + piece])
        moments.add(rows[:0])
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.std, rows.std(axis=0), rtol=1e-6)


def test_a_constant_column_has_a_std_of_one():
    moments = Moments(2)
    for size in (3, 4):
        moments.add(np.stack([np.full(size, 0.1), np.arange(size)], axis=1))
    assert moments.std[0] == 1
    assert moments.constant.tolist() == [True, False]


@pytest.mark.parametrize("sizes", [[], [0], [3, 0, 4], [100_000, 23_456]])
def test_a_file_may_have_as_many_rows_as_are_written(tmp_path, sizes):
    pieces = [np.random.default_rng(size).integers(0, 9, (size, 2), np.uint16) for size in sizes]
    with ArrayWriter(tmp_path / "a.npy", np.uint16, (None, 2)) as writer:
        for piece in pieces:
            writer.write(piece)
    found = np.load(tmp_path / "a.npy")
    np.testing.assert_array_equal(found, np.concatenate([np.empty((0, 2), np.uint16), *pieces]))
