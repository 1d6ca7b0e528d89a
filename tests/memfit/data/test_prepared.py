import json
import pickle

import numpy as np
import pytest

from memfit.data.prepare import prepare_series
from memfit.data.prepared import PreparedSeries
from memfit.errors import DataError


@pytest.fixture
def series(tmp_path, make_frame, make_spec, write_csv):
    frame = make_frame(200).assign(value=np.arange(200.0))  # the value is the row
    spec = make_spec(write_csv(frame.drop(index=[50])), gaps={"policy": "forward_fill"}, threshold=100)
    return PreparedSeries(prepare_series(spec, tmp_path / "store", code_version="1"))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_batch_holds_the_past_and_the_target_apart(series, split):
    rows = np.random.default_rng(0).permutation(series.rows(split))
    batch = series.batch(rows)
    assert len(rows) == series.num_targets(split)
    np.testing.assert_array_equal(batch["target"], rows)
    np.testing.assert_array_equal(batch["row"], rows)
    assert (batch["history"].max(axis=1) < rows).all()
    expected = rows[:, None] - 8 + np.arange(8)
    np.testing.assert_array_equal(batch["history"], np.where(expected == 50, 49, expected))
    lag_1 = series.manifest["features"]["names"].index("lag_1")
    np.testing.assert_array_equal(batch["features"][:, lag_1], np.where(rows - 1 == 50, 49, rows - 1))
    np.testing.assert_array_equal(batch["exceeds"], rows > 100)
    np.testing.assert_array_equal(batch["target_class"], series.classes(batch["target"]))
    assert not np.isnan(batch["features"]).any()


def test_a_batch_has_the_types_that_training_takes(series):
    batch = series.batch(series.rows("train")[:5])
    types = {name: (array.dtype.str, array.shape) for name, array in batch.items()}
    width = len(series.manifest["features"]["names"])
    assert types == {
        "history": ("<f4", (5, 8)),
        "features": ("<f4", (5, width)),
        "target": ("<f4", (5,)),
        "target_class": ("<i8", (5,)),
        "exceeds": ("<f4", (5,)),
        "row": ("<i8", (5,)),
    }
    for array in batch.values():
        assert type(array) is np.ndarray
        assert array.flags.writeable
        assert array.flags.c_contiguous


def test_the_arrays_stay_on_disk(series):
    for array in (series.values, series.features, series.times, series.targets):
        assert isinstance(array, np.memmap)


def test_an_empty_batch_is_empty(series):
    assert series.batch(np.empty(0, np.int64))["history"].shape == (0, 8)


@pytest.mark.parametrize("row", [-1, 7, 50, 200])
def test_refuses_a_row_that_is_no_target(series, row):
    with pytest.raises(DataError, match=f"row {row} is no target"):
        series.batch(np.array([20, row]))


def test_refuses_an_unknown_split(series):
    with pytest.raises(DataError, match="unknown split 'dev'; expected one of train, validation, test"):
        series.rows("dev")


def test_pickles_as_its_path(series):
    pickled = pickle.dumps(series)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).values, series.values)


def test_refuses_a_directory_that_is_not_whole(series):
    path = series.path
    (path / "targets.npy").unlink()
    with pytest.raises(DataError, match=r"no whole prepared series.*targets.npy.*Prepare it again"):
        PreparedSeries(path)


def test_refuses_arrays_of_another_shape(series):
    path = series.path / "manifest.json"
    path.write_text(json.dumps({**series.manifest, "rows": 199}))
    with pytest.raises(DataError, match=r"values.npy has the shape \(200,\), expected \(199,\)"):
        PreparedSeries(series.path)
