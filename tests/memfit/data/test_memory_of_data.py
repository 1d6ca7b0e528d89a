"""Peak memory grows with the rows of the source at most, never with windows x rows or features x rows."""

import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from memfit.data.prepare import prepare_series
from memfit.data.prepared import PreparedSeries


@pytest.fixture(scope="module")
def write_rows(tmp_path_factory):
    def write(num_rows):
        times = pd.date_range("2000-01-01", periods=num_rows, freq="1min")
        path = tmp_path_factory.mktemp("rows") / "a.parquet"
        pd.DataFrame({"time": times, "value": np.random.default_rng(0).normal(size=num_rows)}).to_parquet(path)
        return path

    return write


def peak_bytes(work):
    tracemalloc.start()
    try:
        result = work()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_preparing_and_loading_stay_far_below_windows_times_rows(tmp_path, make_spec, write_rows):
    peaks = {}
    for num_rows, context in ((25_000, 10), (25_000, 1000), (100_000, 1000)):
        spec = make_spec(write_rows(num_rows), context=context, features={})
        path, prepared = peak_bytes(lambda spec=spec: prepare_series(spec, tmp_path, code_version="1"))

        def load(path=path):
            series = PreparedSeries(path)
            for start in range(0, 2000, 100):
                series.batch(series.rows("train")[start : start + 100])

        peaks[num_rows, context] = prepared, peak_bytes(load)[1]
    assert peaks[25_000, 1000][0] < 1.05 * peaks[25_000, 10][0]
    assert peaks[100_000, 1000][0] - peaks[25_000, 1000][0] < 75_000 * 121 * 4 / 2
    assert peaks[100_000, 1000][0] < 60 << 20  # windows x rows would be 400 MB, features x rows 48 MB
    assert peaks[100_000, 1000][1] < 4 << 20
    assert peaks[100_000, 1000][1] < 1.2 * peaks[25_000, 1000][1]


def mapped_bytes():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssFile")) * 1024


def test_shuffled_batches_do_not_make_the_whole_file_resident(tmp_path, make_spec, write_rows):
    spec = make_spec(write_rows(150_000), context=200, features={})
    series = PreparedSeries(prepare_series(spec, tmp_path, code_version="1"))
    rows = np.random.default_rng(0).permutation(series.rows("train"))
    before = mapped_bytes()
    for start in range(0, 64_000, 64):
        series.batch(rows[start : start + 64])
    assert series.features.nbytes > 60 << 20
    assert mapped_bytes() - before < 20 << 20
