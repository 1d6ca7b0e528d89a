import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memfit.data import limits, trial
from memfit.data.gaps import close_gaps
from memfit.data.limits import MIB, Room, check_expansion
from memfit.data.parquet import check_metadata
from memfit.data.source import RawSeries, find_files, hash_files, read_series
from memfit.data.spec import FeatureSpec, GapPolicy
from memfit.data.tables import Columns, hash_table, read_table, stated
from memfit.errors import DataError
from memfit.files import sha256_file
from memfit.memory.host import Memory
from memfit.process import Outcome

COLUMNS = Columns("time", ("value",))


@pytest.fixture
def host(monkeypatch):
    """Say how many GiB of this machine are free."""

    def have(gib: int) -> None:
        monkeypatch.setattr(limits, "host_memory", lambda: Memory(64 << 30, gib << 30))

    return have


def test_fifty_million_rows_of_twenty_columns_have_room(host):
    host(32)
    Room(21).take(50_000_000, "a.csv")
    host(8)
    with pytest.raises(DataError, match=r"at most 25,565,281 rows of 21 columns .* 8,192 MiB of free memory"):
        Room(21).take(50_000_000, "a.csv")


def test_rows_are_counted_over_all_files(host, monkeypatch, make_frame, make_spec, write_csv):
    host(8)
    frame = make_frame(60)
    spec = make_spec(write_csv(frame[:30], "a.csv"), write_csv(frame[30:], "b.csv"))
    files = hash_files(find_files(spec.source))
    monkeypatch.setattr(limits, "MAX_VALUES", 120)
    assert len(read_series(spec, files).values) == 60
    monkeypatch.setattr(limits, "MAX_VALUES", 119)
    with pytest.raises(DataError, match=r"b\.csv: expected at most 59 rows of 2 columns in all .*Read fewer files"):
        read_series(spec, files)


def test_rows_that_fill_gaps_need_room_too(host, monkeypatch):
    host(8)
    times = np.array([0, 1, 2, 1000]) * 3_600_000_000_000
    raw = RawSeries(times, np.arange(4.0), np.empty((4, 0)))
    policy = GapPolicy(policy="forward_fill", limit=1000)
    assert len(close_gaps(raw, ["value"], "1h", policy).values) == 1001
    monkeypatch.setattr(limits, "MAX_VALUES", 2000)
    with pytest.raises(DataError, match="a clock of 1h, gaps filled: expected at most 1,000 rows"):
        close_gaps(raw, ["value"], "1h", policy)


def test_a_file_may_expand_so_far_and_no_further(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(b"x" * 2 * MIB)
    check_expansion(path, 256 * MIB, 100)
    check_expansion(path, 400 * MIB, 200)
    with pytest.raises(DataError, match="expand to 419,430,401 or more; expected at most 200 times as many"):
        check_expansion(path, 400 * MIB + 1, 200)
    path.write_bytes(b"x")
    check_expansion(path, 256 * MIB, 1)


def test_a_regular_series_beside_columns_that_stand_still_does_not_expand_too_far(tmp_path):
    rows, path = 2_000_000, tmp_path / "a.parquet"
    times = pa.array(np.arange(rows) * 60_000_000_000, pa.timestamp("ns"))
    values = np.random.default_rng(0).integers(0, 2, rows).astype(np.float32)
    still = {f"c{index}": np.zeros(rows) for index in range(20)}
    encodings = {"use_dictionary": ["value", *still], "column_encoding": {"time": "DELTA_BINARY_PACKED"}}
    pq.write_table(pa.table({"time": times, "value": values, **still}), path, compression="zstd", **encodings)
    names = ["time", "value", *still]
    assert 8 * rows * len(names) > limits.HARMLESS_BYTES
    assert check_metadata(path, pq.read_metadata(path), names).rows == rows


def test_what_a_file_states_is_that_of_the_wanted_columns(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"time": np.arange(1000), "value": np.arange(1000.0), "other": np.arange(1000.0)})
    pq.write_table(table, path, row_group_size=400, compression="none", use_dictionary=False)
    metadata = pq.read_metadata(path)
    chunks = [metadata.row_group(0).column(index) for index in (0, 1)]
    found = stated(path, COLUMNS)
    assert found.rows == 1000
    assert found.decoding_bytes == sum(chunk.total_uncompressed_size + chunk.total_compressed_size for chunk in chunks)


def test_hashes_are_those_of_the_bytes(tmp_path):
    for name in ("a.csv", "a.csv.gz"):
        path = tmp_path / name
        path.write_bytes((b"1" * 1000 + b"\n") * 3000)
        assert hash_table(path) == sha256_file(path)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"1" * 3 * MIB)
    assert hash_table(path) == sha256_file(path)


def test_reading_may_end_where_times_do_not_rise(tmp_path):
    path = tmp_path / "a.csv"
    times = pd.date_range("2024-01-01", periods=300_000, freq="1min").strftime("%Y-%m-%dT%H:%M")
    lines = [f"{time},{index}" for index, time in enumerate(times)]
    path.write_text("\n".join(["time,value", *lines]) + "\n")
    assert len(read_table(path, COLUMNS, until_unsorted=True).times) == 300_000
    lines[10] = lines[9]
    path.write_text("\n".join(["time,value", *lines]) + "\n")
    assert 11 < len(read_table(path, COLUMNS, until_unsorted=True).times) < 100_000
    assert len(read_table(path, COLUMNS).times) == 300_000


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome("oom", message="died of SIGKILL", error="SIGKILL"), "takes more than the 512 MiB .*died of SIGKILL"),
        (Outcome("failed", message="died of SIGILL", error="SIGILL"), "takes more than the 512 MiB"),
        (Outcome("timeout", message="no result within 60 s"), "takes more than the 60 s"),
    ],
)
def test_a_parquet_file_that_ends_its_child_is_named(tmp_path, monkeypatch, make_frame, outcome, said):
    path = tmp_path / "a.parquet"
    make_frame().to_parquet(path)
    outcome.phase = str(path)
    monkeypatch.setattr(trial, "run_child", lambda *_arguments, **_settings: outcome)
    with pytest.raises(DataError, match=rf"a\.parquet: decoding it {said}.*Check where it comes from"):
        trial.try_parquet([path], COLUMNS)


def test_files_of_other_kinds_need_no_child(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "run_child", None)
    trial.try_parquet([tmp_path / "a.csv", tmp_path / "b.csv.gz"], COLUMNS)


@pytest.mark.parametrize("num_extras", [0, 1, 7])
def test_features_are_counted_without_naming_them(num_extras):
    from memfit.data.features import feature_names

    spec = FeatureSpec()
    assert spec.count(num_extras) == len(feature_names(spec.to_dict(), [f"c{i}" for i in range(num_extras)]))
