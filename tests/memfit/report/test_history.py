import json
import tracemalloc

from memfit.report.history import MAX_POINTS, StageHistory, ThinnedSeries, read_history


def step(number, loss=1.0, **more):
    return {"event": "step", "step": number, "epoch": 1, "losses": {"total": loss}, "lr": 0.1, **more}


def epoch(number, last_step, **more):
    return {"event": "epoch", "epoch": number, "step": last_step, "train": {"total": 1.0}, "seconds": 2.0, **more}


def history_of(*events):
    history = StageHistory("one")
    for event in events:
        history.take(event)
    return history


def test_thins_to_a_bounded_number_of_points_and_keeps_every_spike():
    series = ThinnedSeries()
    for number in range(100_000):
        series.add(number, 50.0 if number == 77_777 else -9.0 if number == 5 else 1.0)
    assert len(series.buckets) <= MAX_POINTS
    assert sum(bucket.count for bucket in series.buckets) == 100_000
    assert max(series.highs) == 50.0
    assert min(series.lows) == -9.0
    assert series.steps == sorted(series.steps)


def test_keeps_a_short_series_as_it_is():
    series = ThinnedSeries()
    for number in range(MAX_POINTS):
        series.add(number, number / 2)
    assert series.stride == 1
    assert series.means == [number / 2 for number in range(MAX_POINTS)]


def test_thinned_means_are_those_of_the_values_they_stand_for():
    series = ThinnedSeries()
    for number in range(5 * MAX_POINTS):
        series.add(number, float(number))
    first = series.buckets[0]
    assert first.total / first.count == sum(range(first.count)) / first.count
    assert {bucket.count for bucket in series.buckets[:-1]} == {series.stride}


def test_counts_values_that_are_not_finite_and_leaves_them_out():
    series = ThinnedSeries()
    for value in (1.0, None, float("nan"), float("inf"), 2.0):
        series.add(1, value)
    assert series.num_undefined == 3
    assert series.means == [1.0, 2.0]


def test_a_resumed_stage_forgets_what_it_did_again():
    history = history_of(
        step(1, 5.0),
        step(2, 6.0),
        epoch(1, 2),
        step(3, 99.0),
        epoch(2, 3),
        {"event": "resume", "step": 2, "epoch": 1, "from": "last"},
        step(3, 7.0),
        epoch(2, 3),
    )
    assert history.steps["loss"].means == [5.0, 6.0, 7.0]
    assert [one["epoch"] for one in history.epochs] == [1, 2]
    assert history.num_steps == 3
    assert len(history.resumes) == 1


def test_the_best_epoch_is_the_last_marked_one_until_the_stage_names_it():
    history = history_of(epoch(1, 1, best=True), epoch(2, 2, best=True), epoch(3, 3, best=False))
    assert history.best_index == 1
    history.take({"event": "stage_end", "best_epoch": 1, "seconds": 9.0})
    assert history.best_index == 0


def test_an_unfinished_stage_has_the_duration_of_its_epochs():
    history = history_of(epoch(1, 1), epoch(2, 2))
    assert history.seconds == 4.0
    history.take({"event": "stage_end", "seconds": 9.0})
    assert history.seconds == 9.0


def test_a_torn_last_line_is_counted_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps(step(1)) + "\n\n" + json.dumps([1]) + '\n{"event": "step", "st')
    history = read_history(path, "one")
    assert history.num_unreadable == 2
    assert history.num_steps == 1


def test_reading_a_long_log_takes_bounded_memory(tmp_path):
    path = tmp_path / "events.jsonl"
    line = json.dumps(step(0, gradient_norm=1.0, seconds=0.1)) + "\n"
    path.write_text(line * 30_000)
    tracemalloc.start()
    read_history(path, "one")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2


def test_skipped_updates_are_kept_but_for_those_that_were_run_again():
    history = StageHistory("coarse")
    for step in (3, 8):
        history.take({"event": "spike", "step": step})
    history.take({"event": "resume", "step": 5})
    assert [spike["step"] for spike in history.spikes] == [3]
