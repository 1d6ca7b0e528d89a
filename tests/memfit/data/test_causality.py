"""Change the future, and nothing before it changes: through the whole preparation."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memfit.data.prepare import prepare_series
from memfit.data.prepared import PreparedSeries

NUM_ROWS = 90
POLICIES = st.sampled_from(["forward_fill", "interpolate"])


def make_table(seed):
    """Return 90 hourly rows with missing values, missing extras and missing rows."""
    random = np.random.default_rng(seed)
    times = pd.date_range("2024-01-01", periods=NUM_ROWS, freq="1h", tz="UTC")
    frame = pd.DataFrame(random.normal(1.5, 1, (NUM_ROWS, 2)), columns=["value", "extra"])
    holes = random.random((NUM_ROWS, 2)) < 0.12
    holes[[0, 1, 2, -3, -2, -1]] = False
    frame = frame.mask(holes)
    frame.insert(0, "time", times.strftime("%Y-%m-%dT%H:%M:%SZ"))
    absent = random.random(NUM_ROWS) < 0.08
    absent[[0, 1, 2, -3, -2, -1]] = False
    return frame, absent


def prepare(make_spec, frame, absent, policy):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        frame[~absent].to_csv(path, index=False)
        gaps = {"policy": policy, "limit": 30}
        spec = make_spec(path, extra_columns=["extra"], gaps=gaps, class_quantiles=[0.5])
        series = PreparedSeries(prepare_series(spec, Path(folder) / "store", code_version="1"))
        everything = series.batch(np.asarray(series.targets))
    return series.manifest, {int(row): index for index, row in enumerate(everything["row"])}, everything


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(9, NUM_ROWS - 4), policy=POLICIES)
def test_no_row_sees_what_comes_after_it(make_spec, seed, cut, policy):
    frame, absent = make_table(seed)
    other, other_absent = make_table(seed + 1)
    later = frame.copy()
    later.loc[cut:, ["value", "extra"]] = other.loc[cut:, ["value", "extra"]] * 3
    later_absent = np.where(np.arange(NUM_ROWS) < cut, absent, other_absent)
    _, rows, before = prepare(make_spec, frame, absent, policy)
    _, later_rows, after = prepare(make_spec, later, later_absent, policy)
    assert {row for row in rows if row < cut} == {row for row in later_rows if row < cut}
    for row in rows.keys() & later_rows.keys():
        one, two = rows[row], later_rows[row]
        if row <= cut:  # the inputs of the first changed row lie before it
            assert before["history"][one].tobytes() == after["history"][two].tobytes()
            assert before["features"][one].tobytes() == after["features"][two].tobytes()
        if row < cut:
            assert before["target"][one] == after["target"][two]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), policy=POLICIES)
def test_what_is_fitted_sees_nothing_beyond_the_last_train_target(make_spec, seed, policy):
    frame, absent = make_table(seed)
    manifest, rows, _ = prepare(make_spec, frame, absent, policy)
    last = sorted(rows)[manifest["borders"]["train"]["stop"] - 1]
    later = frame.copy()
    later.loc[last + 1 :, ["value", "extra"]] *= -3
    assume(last + 1 < NUM_ROWS)
    after, later_rows, _ = prepare(make_spec, later, absent, policy)
    assert rows == later_rows
    assert after["borders"] == manifest["borders"]
    for fitted in ("normalization", "class_edges"):
        assert after[fitted] == manifest[fitted]
    assert after["class_counts"]["train"] == manifest["class_counts"]["train"]
    assert after["exceed_share"]["train"] == manifest["exceed_share"]["train"]
    assert after["statistics"] != manifest["statistics"]
