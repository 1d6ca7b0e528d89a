"""Alignments in the report: read one sample at a time, reduced, and drawn small."""

import tracemalloc

import numpy as np
import pytest

from memfit.files import read_json, write_json
from memfit.report.alignments import MAX_ROWS, MAX_STEPS, Alignment, read_alignment
from memfit.report.prediction_charts import mean_alignment, sample_alignments
from memfit.report.run_files import read_run

HOUR = 3_600_000_000_000


def weights_of(n, horizon, window):
    weights = np.random.default_rng(0).random((n, horizon, window), np.float32)
    return weights / weights.sum(-1, keepdims=True)


def test_the_mean_and_a_few_samples_are_read(tmp_path):
    weights = weights_of(10, 4, 6)
    np.savez_compressed(tmp_path / "predictions.npz", truth=np.zeros(10), alignment=weights)
    found = read_alignment(tmp_path / "predictions.npz")
    np.testing.assert_allclose(found.mean, weights.mean(0), rtol=1e-6)
    assert (found.count, found.horizon, found.window, list(found.samples)) == (10, 4, 6, [1, 5, 8])
    np.testing.assert_array_equal(found.samples[5], weights[5])


def test_one_sample_is_shown_once(tmp_path):
    np.savez(tmp_path / "predictions.npz", alignment=weights_of(1, 2, 3))
    assert list(read_alignment(tmp_path / "predictions.npz").samples) == [0]


def test_large_alignments_are_reduced_to_means_of_neighbours(tmp_path):
    weights = weights_of(2, 2 * MAX_STEPS, 3 * MAX_ROWS)
    np.savez(tmp_path / "predictions.npz", alignment=weights)
    expected = weights.mean(0).reshape(MAX_STEPS, 2, MAX_ROWS, 3).mean((1, 3))
    np.testing.assert_allclose(read_alignment(tmp_path / "predictions.npz").mean, expected, rtol=1e-5)


def test_reading_takes_the_memory_of_a_few_samples(tmp_path):
    path, weights = tmp_path / "predictions.npz", weights_of(400, 96, 100)
    np.savez(path, truth=np.zeros(400), alignment=weights)
    size = weights.nbytes
    del weights
    tracemalloc.start()
    assert list(read_run(tmp_path).predictions) == ["truth"]
    assert read_alignment(path).count == 400
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 8


@pytest.mark.parametrize("alignment", [np.zeros((3, 4), np.float32), np.zeros((3, 4, 5)), np.zeros((0, 4, 5), "f4")])
def test_other_arrays_of_that_name_are_a_problem_of_the_run(tmp_path, alignment):
    np.savez(tmp_path / "predictions.npz", truth=np.zeros(3), alignment=alignment)
    run = read_run(tmp_path)
    assert run.alignment is None
    assert ["alignment: expected float32" in problem for problem in run.problems] == [True]
    assert list(run.predictions) == ["truth"]


def test_a_map_is_small_and_says_what_it_shows():
    alignment = Alignment(weights_of(1, 24, 72)[0], {2: weights_of(1, 24, 72)[0]}, 40, 24, 72)
    figure = mean_alignment(alignment)
    (single,) = sample_alignments(alignment, HOUR * np.arange(5))
    assert figure.title == "Mean of 40 test samples"
    assert single.title == "1970-01-01 02:00"
    assert "would be 0.0139 each" in figure.caption
    assert "data:image/png;base64," in figure.svg
    assert max(map(len, (figure.svg, figure.narrow, single.svg))) < 20_000


def test_the_page_shows_where_attention_looks(run_dir, page_of, fast_plots):
    count = 30
    arrays = dict.fromkeys(("truth", "value", "persistence"), np.arange(count, dtype=np.float32))
    times = HOUR * np.arange(count)
    np.savez(run_dir / "predictions.npz", times=times, **arrays, alignment=weights_of(count, 4, 6))
    evaluation = read_json(run_dir / "evaluation.json")
    write_json(run_dir / "evaluation.json", {**evaluation, "threshold": None})
    shown = page_of(run_dir).texts["predictions"]
    for text in ("Attention", "Mean of 30 test samples", "1970-01-01 05:00", "1970-01-02 01:00"):
        assert text in shown
