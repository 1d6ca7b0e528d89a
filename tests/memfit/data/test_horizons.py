"""Forecast samples: whole horizons of observed rows within one split, cut from the rows before them."""

import pickle

import numpy as np
import pytest

from memfit.data.horizons import ForecastSeries
from memfit.data.prepare import outline_series, prepare_series
from memfit.data.spec import SeriesSpec
from memfit.data.splits import SPLITS
from memfit.errors import DataError

WINDOW, HORIZON, SEASON = 6, 5, 4
FEATURES = {
    **{key: [] for key in ("lags", "difference_lags", "rolling_windows", "share_windows")},
    "calendar": ["hour"],
    "streak_window": 0,
    "extra_lags": [1],
    "extra_difference_lags": [],
    "extra_mean_windows": [3],
}


def write(path, rows=240, missing=(), tail=0.0):
    """Write an hourly series with an extra column; `tail` is added to the rows that no train target reaches."""
    noise = np.random.default_rng(1).normal(size=(rows, 2))
    noise[170:] += tail
    times = np.datetime64("2024-01-01T00", "h") + np.arange(rows)
    lines = [f"{times[i]}:00:00,{noise[i, 0]:.6f},{noise[i, 1]:.6f}" for i in range(rows) if i not in missing]
    path.write_text("\n".join(["time,load,wind", *lines]) + "\n", encoding="utf-8")
    return path


def spec_of(path, policy="forward_fill"):
    return SeriesSpec.from_dict(
        {
            "source": {"kind": "files", "paths": [str(path)]},
            "time_column": "time",
            "value_column": "load",
            "extra_columns": ["wind"],
            "frequency": "1h",
            "gaps": {"policy": policy},
            "context": WINDOW + 2,
            "class_edges": [0.0],
            "features": FEATURES,
        }
    )


def series_of(tmp_path, name="a", policy="forward_fill", **changes):
    path = write(tmp_path / f"{name}.csv", **changes)
    folder = prepare_series(spec_of(path, policy), tmp_path / "store", code_version="test")
    return ForecastSeries(folder, window=WINDOW, horizon=HORIZON, season=SEASON)


def all_rows(series, split):
    return series.first_rows(split, np.arange(series.num_samples(split)))


def reached(series, split):
    """Return every row that is a target of some sample."""
    return set((all_rows(series, split)[:, None] + np.arange(HORIZON)).ravel().tolist())


@pytest.mark.parametrize("policy", ["forward_fill", "interpolate"])
def test_every_predicted_row_is_observed_and_of_its_split_alone(tmp_path, policy):
    missing = (60, 61, 100, 200)
    series = series_of(tmp_path, missing=missing, policy=policy)
    targets = {split: reached(series, split) for split in SPLITS}
    for split in SPLITS:
        assert targets[split] <= set(series.rows(split).tolist())
        assert not targets[split] & set(missing)
    assert not targets["train"] & (targets["validation"] | targets["test"])
    assert not targets["validation"] & targets["test"]
    assert max(targets["train"]) < min(targets["validation"]) < max(targets["validation"]) < min(targets["test"])


def test_no_sample_that_could_be_is_left_out(tmp_path):
    series = series_of(tmp_path)
    for split in SPLITS:
        assert all_rows(series, split).tolist() == series.rows(split)[: 1 - HORIZON].tolist()


def test_arrays_are_the_rows_before_and_the_rows_after(tmp_path):
    series = series_of(tmp_path)
    rows = all_rows(series, "train")[[7, 0, 30]]
    both = series.sequences(rows, with_features=True)
    alone = series.sequences(rows, with_features=False)
    assert alone["history"].shape == (3, WINDOW, 1)
    assert both["history"].shape == (3, WINDOW, 1 + 4)
    assert series.manifest["features"]["names"][2] == "wind.lag_1"
    wind = np.random.default_rng(1).normal(size=(240, 2))[:, 1]
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(both["history"][index, :, 0], series.values[row - WINDOW : row])
        np.testing.assert_array_equal(both["history"][index, :, 1:], series.features[row - WINDOW : row])
        np.testing.assert_allclose(both["history"][index, :, 3], wind[row - WINDOW : row], atol=1e-5)
        np.testing.assert_array_equal(both["target"][index], series.values[row : row + HORIZON])
    assert np.isfinite(series.sequences(all_rows(series, "train"), with_features=True)["history"]).all()


def test_seasonal_values_were_known_and_lie_whole_seasons_before(tmp_path):
    series = series_of(tmp_path)
    row = int(all_rows(series, "test")[3])
    expected = [series.values[row + back] for back in (-4, -3, -2, -1, -4)]
    assert series.seasonal(np.array([row]))[0].tolist() == expected


def test_nothing_of_train_depends_on_the_rows_after_it(tmp_path):
    one, two = series_of(tmp_path), series_of(tmp_path, "b", tail=50.0)
    assert max(reached(one, "train")) < 170
    assert one.manifest["normalization"] == two.manifest["normalization"]
    rows = all_rows(one, "train")
    first, second = (series.sequences(rows, with_features=True) for series in (one, two))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(one.values, two.values)


def test_a_horizon_that_no_split_holds_is_refused(tmp_path):
    series = series_of(tmp_path)
    with pytest.raises(DataError, match=r"forecasts of 40 rows: expected 2 or more in each split, got .*horizon"):
        ForecastSeries(series.path, window=WINDOW, horizon=40, season=SEASON)


def test_it_pickles_as_its_settings(tmp_path):
    series = series_of(tmp_path)
    again = pickle.loads(pickle.dumps(series))
    assert (again.window, again.horizon, again.season) == (WINDOW, HORIZON, SEASON)
    assert all_rows(again, "test").tolist() == all_rows(series, "test").tolist()


def test_an_outline_has_two_samples_of_a_long_horizon_in_each_split(tmp_path):
    outline_series(spec_of(tmp_path / "none.csv"), tmp_path / "outline", min_targets=41)
    series = ForecastSeries(tmp_path / "outline", window=WINDOW, horizon=40, season=SEASON)
    assert min(series.num_samples(split) for split in SPLITS) == 2
