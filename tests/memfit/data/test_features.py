import ast
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.data import features as module
from memfit.data.features import compute_features, feature_names, lookback
from memfit.data.spec import FeatureSpec

FULL = {**FeatureSpec().to_dict(), "calendar": [*module.CALENDAR]}
HOUR = 3_600_000_000_000


def series(num_rows, seed=0, num_extras=0):
    random = np.random.default_rng(seed)
    times = np.cumsum(random.integers(1, 3 * HOUR, num_rows)) - 10_000 * HOUR
    return times, random.normal(1.5, 2, num_rows).round(1), random.normal(size=(num_rows, num_extras))


def columns(spec, times, values, extras=None, threshold=1.5, names=()):
    extras = np.zeros((len(values), 0)) if extras is None else extras
    computed = compute_features(times, values, extras, threshold, spec)
    return dict(zip(feature_names(spec, names), computed.T, strict=True))


def test_needs_numpy_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert {name.split(".")[0] for name in imported} == {"collections", "dataclasses", "functools", "numpy", "typing"}


def test_rolling_statistics_are_those_of_pandas():
    times, values, _ = series(300)
    spec = {
        "rolling_windows": [2, 7, 50],
        "rolling_statistics": [*module.STATISTICS],
        "rolling_quantiles": [0, 0.1, 0.5, 0.9, 1],
    }
    found = columns(spec, times, values)
    rounded = pd.Series(values.astype(np.float32).astype(np.float64))
    for window in (2, 7, 50):
        rolling = rounded.rolling(window)
        std = rolling.std(ddof=0)
        expected = {
            "mean": rolling.mean(),
            "std": std,
            "min": rolling.min(),
            "max": rolling.max(),
            "skew": rolling.apply(lambda w: ((w - w.mean()) ** 3).mean() / max(w.std(ddof=0), 1e-9) ** 3),
            "zscore": ((rounded - rolling.mean()) / std).fillna(0),
            "slope": rolling.apply(lambda w: np.polyfit(np.arange(len(w)), w, 1)[0]),
            **{f"q{100 * q:g}": rolling.quantile(q) for q in (0, 0.1, 0.5, 0.9, 1)},
        }
        for name, column in expected.items():
            np.testing.assert_allclose(
                found[f"{name}_{window}"][49:], column[49:], rtol=1e-4, atol=1e-5, err_msg=f"{name}_{window}"
            )


def test_lags_and_differences_count_from_the_row_to_predict():
    values = np.arange(10.0) ** 2
    found = columns({"lags": [1, 3], "difference_lags": [2]}, np.arange(10) * HOUR, values)
    np.testing.assert_array_equal(found["lag_1"][2:], values[2:])
    np.testing.assert_array_equal(found["lag_3"][2:], values[:-2])
    np.testing.assert_array_equal(found["difference_2"][2:], values[2:] - values[:-2])
    assert np.isnan(found["lag_1"][:2]).all()


def test_calendar_terms_are_those_of_the_rows_own_time():
    times, values, _ = series(500)
    found = columns({"calendar": [*module.CALENDAR]}, times, values)
    stamps = pd.DatetimeIndex(times.astype("datetime64[ns]"))
    minute = stamps.hour * 60 + stamps.minute
    phases = {
        "minute": (stamps.minute * 60 + stamps.second) / 3600,
        "hour": minute / 1440,
        "weekday": (stamps.day_of_week * 1440 + minute) / 10080,
        "yearday": (stamps.day_of_year - 1) / 366,
    }
    for name, phase in phases.items():
        np.testing.assert_allclose(found[f"{name}_sin"][1:], np.sin(2 * np.pi * phase)[1:], atol=1e-6)
        np.testing.assert_allclose(found[f"{name}_cos"][1:], np.cos(2 * np.pi * phase)[1:], atol=1e-6)
    np.testing.assert_array_equal(found["weekend"][1:], stamps[1:].day_of_week >= 5)
    np.testing.assert_allclose(found["elapsed"][1:], np.diff(times) / 1e9, rtol=1e-6)


def test_counts_streaks_up_to_their_cap_and_shares_above():
    values = np.array([0, 0, 0, 2, 3, 4, 5, 5, 1, 0], float)
    found = columns({"streak_window": 3, "share_windows": [4]}, np.arange(10) * HOUR, values)
    np.testing.assert_array_equal(found["streak_above"][3:], [1, 2, 3, 3, 3, 0, 0])
    np.testing.assert_array_equal(found["streak_below"][3:], [0, 0, 0, 0, 0, 1, 2])
    np.testing.assert_array_equal(found["streak_rising"][3:], [1, 2, 3, 3, 0, 0, 0])
    np.testing.assert_array_equal(found["streak_falling"][3:], [0, 0, 0, 0, 0, 1, 2])
    np.testing.assert_array_equal(found["share_above_4"][3:], [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5])


def test_a_value_equal_to_the_threshold_in_float32_is_not_above_it():
    found = columns({"share_windows": [2]}, np.arange(3) * HOUR, np.full(3, 1.1, np.float32), threshold=1.1)
    assert found["share_above_2"][-1] == 0


def test_extra_columns_have_features_of_their_own():
    times, values, extras = series(40, num_extras=2)
    spec = {"lags": [1], "extra_lags": [1, 2], "extra_difference_lags": [3], "extra_mean_windows": [4]}
    found = columns(spec, times, values, extras, names=["a", "b"])
    assert [name for name in found if name.startswith("b.")] == ["b.lag_1", "b.lag_2", "b.difference_3", "b.mean_4"]
    second = pd.Series(extras[:, 1])
    np.testing.assert_allclose(found["b.lag_2"][3:], second.shift(1)[3:], rtol=1e-6)
    np.testing.assert_allclose(found["b.difference_3"][3:], second.diff(3)[3:], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["b.mean_4"][3:], second.rolling(4).mean()[3:], rtol=1e-4, atol=1e-6)


def test_a_constant_stretch_gives_exact_zeros():
    spec = {"rolling_windows": [7], "rolling_statistics": ["mean", "std", "skew", "zscore", "slope"]}
    last = compute_features(np.arange(9) * HOUR, np.full(9, 0.1), np.zeros((9, 0)), 1.5, spec)[-1]
    assert last[0] == np.float32(0.1)
    np.testing.assert_array_equal(last[1:], 0)


@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_a_row_is_the_same_bits_from_its_lookback_alone_and_under_any_chunking(data, seed):
    back = lookback(FULL) - 1
    times, values, extras = series(back + 40, seed, num_extras=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_VALUES", data.draw(st.integers(1, 30)) * (back + 1))
        whole = compute_features(times, values, extras, 1.5, FULL)
    row = data.draw(st.integers(back, len(values) - 1))
    seen = slice(row - back, row + 1)
    alone = compute_features(times[seen], values[seen], extras[seen], 1.5, FULL)
    assert np.isnan(whole[:back]).all()
    assert not np.isnan(whole[back:]).any()
    assert alone[-1].tobytes() == whole[row].tobytes()
    assert alone[-1].tobytes() == compute_features(times, values, extras, 1.5, FULL)[row].tobytes()


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(6, 59), seed=st.integers(0, 99))
def test_changing_the_future_changes_no_earlier_row(cut, seed):
    spec = {**FULL, "rolling_windows": [5], "share_windows": [4], "lags": [1, 5], "difference_lags": [2]}
    spec |= {"streak_window": 4, "extra_lags": [2], "extra_mean_windows": [3]}
    times, values, extras = series(60, 1, 1)
    other_times, other_values, other_extras = series(60, seed + 2, 1)
    changed = [times.copy(), values.copy(), extras.copy()]
    for array, other in zip(changed, (other_times + times[-1], other_values * 9, other_extras * 9)):
        array[cut:] = other[cut:]
    before = compute_features(times, values, extras, 1.5, spec)
    after = compute_features(*changed, 1.5, spec)
    assert after[:cut].tobytes() == before[:cut].tobytes()
    assert not np.array_equal(after[cut:], before[cut:])


def test_float32_and_float64_inputs_give_the_same_features():
    times, values, extras = series(200, num_extras=1)
    wide = compute_features(times, values, extras, 1.5, FULL)
    narrow = compute_features(times, values.astype(np.float32), extras.astype(np.float32), 1.5, FULL)
    assert wide.tobytes() == narrow.tobytes()


def test_a_series_shorter_than_the_lookback_has_no_features():
    assert np.isnan(compute_features(np.arange(5), np.ones(5), np.ones((5, 0)), 1.5, FULL)).all()


def test_the_largest_values_do_not_overflow():
    values = np.where(np.arange(200) % 2, 1e37, -1e37)
    computed = compute_features(np.arange(200) * HOUR, values, np.zeros((200, 0)), 1.5, FULL)
    assert np.isfinite(computed[168:]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e37])
def test_refuses_values_that_are_not_finite(bad):
    values = np.ones(9)
    values[4] = bad
    with pytest.raises(ValueError, match=r"values must be finite.*row 4"):
        compute_features(np.arange(9), values, np.ones((9, 0)), 1.5, {"lags": [1]})
    with pytest.raises(ValueError, match=r"extras must be finite.*row 4"):
        compute_features(np.arange(9), np.ones(9), values[:, None], 1.5, {"lags": [1]})


def test_refuses_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"\[N\], \[N\] and \[N, E\]; got \(9,\), \(8,\)"):
        compute_features(np.arange(9), np.ones(8), np.ones((8, 0)), 1.5, {"lags": [1]})


def test_refuses_an_unknown_feature_setting():
    with pytest.raises(ValueError, match="lagz is no feature setting"):
        feature_names({"lagz": [1]}, [])
