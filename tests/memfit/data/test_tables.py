import gzip
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memfit.data.tables import Columns, read_table
from memfit.errors import DataError

COLUMNS = Columns("time", ("value",))


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read_one(tmp_path, time="2024-01-01", value="1"):
    return read_table(write(tmp_path / "a.csv", f"time,value\n{time},{value}\n"), COLUMNS)


def iso(times):
    return [str(pd.Timestamp(int(t))) for t in times]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-01-01T06:00:00Z", "2024-01-01 06:00:00"),
        ("2024-01-01 06:00", "2024-01-01 06:00:00"),
        ("2024-01-01T06:00:00+02:00", "2024-01-01 04:00:00"),
        ("2024-01-01", "2024-01-01 00:00:00"),
        ("2024-01-01T06:00:00.123456789Z", "2024-01-01 06:00:00.123456789"),
        ("1960-05-01T00:00:00Z", "1960-05-01 00:00:00"),
    ],
)
def test_times_become_utc_and_naive_ones_are_taken_as_utc(tmp_path, text, expected):
    assert iso(read_one(tmp_path, time=text).times) == [expected]


def test_zones_may_be_mixed_from_row_to_row(tmp_path):
    rows = ["2024-01-01T00:00:00", "2024-01-01T02:00:00+01:00", "2024-01-01T02:00:00Z"]
    table = read_table(write(tmp_path / "a.csv", "time,value\n" + "".join(f"{t},1\n" for t in rows)), COLUMNS)
    assert np.diff(table.times).tolist() == [3_600_000_000_000] * 2


@pytest.mark.parametrize(
    "text", ["", "now", "today", "2024", "20240101", "1704067200", "01/02/2024", "2024-13-01", "noon", "NaT"]
)
def test_refuses_a_time_that_is_not_iso_8601_and_names_its_row(tmp_path, text):
    path = write(tmp_path / "a.csv", f"time,value\n2024-01-01,1\n{text},2\n")
    with pytest.raises(DataError, match=f"a.csv, row 2: '{text}' in column 'time' is no time; expected ISO"):
        read_table(path, COLUMNS)


@pytest.mark.parametrize("year", ["1500", "2300", "9999"])
def test_refuses_times_beyond_nanoseconds(tmp_path, year):
    with pytest.raises(DataError, match="column 'time'"):
        read_one(tmp_path, time=f"{year}-01-01")


@pytest.mark.parametrize("text", ["", "NA", "nan", "NaN", "null", "None", " "])
def test_a_missing_number_is_nan(tmp_path, text):
    assert np.isnan(read_one(tmp_path, value=text).numbers).all()


@pytest.mark.parametrize(("text", "expected"), [("1e3", 1000), (" 2.5 ", 2.5), ("-7", -7), ("inf", np.inf)])
def test_reads_numbers(tmp_path, text, expected):
    assert read_one(tmp_path, value=text).numbers.tolist() == [[expected]]


@pytest.mark.parametrize("text", ["abc", "1_000", "0x10", "1;5", "True", "--3"])
def test_refuses_text_among_numbers_and_names_the_first_bad_row(tmp_path, text):
    rows = "".join(f"2024-01-01T{hour:02}:00,{1}\n" for hour in range(5))
    path = write(tmp_path / "a.csv", f"time,value\n{rows}2024-01-02,{text}\n2024-01-03,worse\n")
    with pytest.raises(DataError, match=f"a.csv, row 6: '{text}' in column 'value' is no number"):
        read_table(path, COLUMNS)


def test_names_the_right_row_in_a_later_batch(tmp_path):
    num_rows = 100_000
    rows = [f"2024-01-01,{i}" for i in range(num_rows)]
    rows[num_rows - 2] = "2024-01-01,oops"
    path = write(tmp_path / "a.csv", "time,value\n" + "\n".join(rows) + "\n")
    assert path.stat().st_size > 1 << 20
    with pytest.raises(DataError, match=f"row {num_rows - 1}: 'oops'"):
        read_table(path, COLUMNS)


def test_a_long_bad_text_is_cut(tmp_path):
    with pytest.raises(DataError) as caught:
        read_one(tmp_path, value="x" * 5000)
    assert len(str(caught.value)) < 400


def test_a_missing_column_names_the_nearest_one(tmp_path):
    path = write(tmp_path / "a.csv", "time,vlaue\n2024-01-01,1\n")
    with pytest.raises(DataError, match=r"no column 'value' \(did you mean 'vlaue'\?\); it has time, vlaue"):
        read_table(path, COLUMNS)


def test_refuses_a_column_name_that_stands_twice(tmp_path):
    with pytest.raises(DataError, match="2 columns are named 'value'"):
        read_table(write(tmp_path / "a.csv", "time,value,value\n2024-01-01,1,2\n"), COLUMNS)


def test_columns_that_are_not_needed_may_hold_anything(tmp_path):
    text = 'note,value,time\n"a\nb, c",1,2024-01-01\n,2,2024-01-02\n'
    assert read_table(write(tmp_path / "a.csv", text), COLUMNS).numbers.tolist() == [[1], [2]]


def test_reads_a_byte_order_mark_and_windows_line_ends(tmp_path):
    text = "\ufefftime,value\r\n2024-01-01,1\r\n\r\n2024-01-02,2\r\n"
    assert read_table(write(tmp_path / "a.csv", text), COLUMNS).numbers.tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "cannot be read: Empty CSV file"),
        ("a.csv", b"time,value\n2024-01-01\n", "cannot be read: .*Expected 2 columns, got 1"),
        ("a.csv", b"time,value\n2024-01-01,\xff\n", "cannot be read: .*UTF8"),
        ("a.csv.gz", b"time,value\n", "cannot be read: .*incorrect header"),
        ("a.csv.gz", gzip.compress(b"time,value\n" + b"2024-01-01,1\n" * 9)[:-12], "cannot be read: .*Truncated"),
        ("a.parquet", b"no parquet", "cannot be read: .*Parquet"),
    ],
)
def test_refuses_a_broken_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name, COLUMNS)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("header", [b"", b"time,value\n", b'time,value\n2024-01-01,"'])
def test_refuses_one_gigantic_line_in_bounded_memory(tmp_path, name, header):
    content = header + b"1" * (64 << 20)
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    with pytest.raises(DataError, match="a row is longer than 1 MiB"):
        read_table(tmp_path / name, COLUMNS)
    assert pa.default_memory_pool().max_memory() < 32 << 20


def parquet(tmp_path, times, values):
    pq.write_table(pa.table({"time": times, "value": values}), tmp_path / "a.parquet")
    return read_table(tmp_path / "a.parquet", COLUMNS)


STAMPS = pd.date_range("2024-01-01", periods=3, freq="1D")


@pytest.mark.parametrize(
    "times",
    [
        pa.array(STAMPS.as_unit("s"), pa.timestamp("s")),
        pa.array(STAMPS, pa.timestamp("ns")),
        pa.array(STAMPS.tz_localize("UTC").tz_convert("Asia/Tokyo"), pa.timestamp("us", "Asia/Tokyo")),
        pa.array(STAMPS.date, pa.date32()),
        pa.array(STAMPS.strftime("%Y-%m-%d"), pa.string()),
        pa.array(STAMPS.strftime("%Y-%m-%d"), pa.string()).dictionary_encode(),
    ],
    ids=lambda times: str(times.type),
)
def test_reads_the_time_types_of_parquet(tmp_path, times):
    table = parquet(tmp_path, times, pa.array([1.0, None, 3.0]))
    assert iso(table.times) == ["2024-01-01 00:00:00", "2024-01-02 00:00:00", "2024-01-03 00:00:00"]
    np.testing.assert_array_equal(table.numbers, [[1], [np.nan], [3]])


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, None, 3], pa.int64()),
        pa.array([1, None, 3], pa.uint8()),
        pa.array([1, None, 3], pa.float32()),
        pa.array([Decimal(1), None, Decimal(3)], pa.decimal128(9, 2)),
        pa.array(["1", None, "3"]),
        pa.array(["1", None, "3"]).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_reads_the_number_types_of_parquet(tmp_path, values):
    np.testing.assert_array_equal(parquet(tmp_path, pa.array(STAMPS), values).numbers, [[1], [np.nan], [3]])


def test_a_parquet_column_of_nulls_alone_is_missing(tmp_path):
    assert np.isnan(parquet(tmp_path, pa.array(STAMPS), pa.nulls(3)).numbers).all()


@pytest.mark.parametrize("values", [pa.array([True, False, True]), pa.array([[1], [2], [3]])])
def test_refuses_other_types_of_parquet(tmp_path, values):
    with pytest.raises(DataError, match=r"column 'value' has the type .*; expected numbers"):
        parquet(tmp_path, pa.array(STAMPS), values)


def test_refuses_numbers_as_times(tmp_path):
    with pytest.raises(DataError, match=r"column 'time' has the type int64; expected ISO .*to_datetime"):
        parquet(tmp_path, pa.array([1, 2, 3]), pa.array([1, 2, 3]))


def test_refuses_a_missing_time_in_parquet(tmp_path):
    times = pa.array([STAMPS[0], None, STAMPS[2]], pa.timestamp("us"))
    with pytest.raises(DataError, match="row 2: no time in column 'time'"):
        parquet(tmp_path, times, pa.array([1, 2, 3]))


def test_keeps_only_the_rows_that_a_text_column_selects(tmp_path):
    path = write(tmp_path / "a.csv", "place,time,value\nx,2024-01-01,1\ny,2024-01-01,2\nx,2024-01-02,3\n")
    assert read_table(path, Columns("time", ("value",), ("place", "x"))).numbers.tolist() == [[1], [3]]
