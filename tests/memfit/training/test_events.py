import json

import pytest

from memfit.training.events import EventLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / "stage" / "events.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_writes_a_line_per_event_and_passes_it_on(path):
    passed = []
    log = EventLog(path, passed.append)
    log.write("step", step=1, losses={"total": 0.5})
    log.write("epoch", epoch=1)
    log.close()
    assert (
        lines(path)
        == passed
        == [
            {"event": "step", "step": 1, "losses": {"total": 0.5}},
            {"event": "epoch", "epoch": 1},
        ]
    )


def test_an_event_is_in_the_file_as_soon_as_it_is_written(path):
    log = EventLog(path, lambda _event: None)
    log.write("step", step=1)
    assert len(lines(path)) == 1
    log.close()


def test_numbers_that_json_lacks_become_null(path):
    passed = []
    log = EventLog(path, passed.append)
    log.write("epoch", value=float("nan"), nested={"deep": {"x": float("-inf")}}, fine=1.5)
    log.close()
    assert passed == lines(path) == [{"event": "epoch", "value": None, "nested": {"deep": {"x": None}}, "fine": 1.5}]


def test_is_cut_back_to_a_checkpoint_torn_line_included(path):
    log = EventLog(path, lambda _event: None)
    log.write("step", step=1)
    kept = log.sync()
    log.write("step", step=2)
    log.close()
    with path.open("a") as torn:
        torn.write('{"event": "st')
    again = EventLog(path, lambda _event: None, keep_bytes=kept)
    again.write("step", step=22)
    again.close()
    assert [event["step"] for event in lines(path)] == [1, 22]


def test_a_new_attempt_starts_a_new_log_and_a_lost_tail_is_no_hole(path):
    log = EventLog(path, lambda _event: None)
    log.write("step", step=1)
    log.close()
    beyond = EventLog(path, lambda _event: None, keep_bytes=10**6)
    beyond.write("step", step=2)
    beyond.close()
    assert [event["step"] for event in lines(path)] == [1, 2]
    fresh = EventLog(path, lambda _event: None)
    fresh.write("step", step=3)
    fresh.close()
    assert [event["step"] for event in lines(path)] == [3]
