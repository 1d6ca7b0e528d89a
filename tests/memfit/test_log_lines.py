"""Lines that a container platform indexes: from memfit's own events, and from Python's logging."""

import io
import json
import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest

from memfit.errors import ConfigError, DoesNotFitError
from memfit.log_lines import JsonFormatter, LogFormat, log_format, log_line
from memfit.output import LineView


@pytest.fixture
def lines():
    """A view, and the lines that it wrote as `view.lines`."""
    written = []
    view = LineView(lambda level, message, facts: written.append(json.loads(log_line(level, message, facts))))
    view.lines = written
    return view


def test_a_line_begins_with_when_how_grave_and_what():
    line = json.loads(log_line("info", "done", {"event": "step_end"}, created=0.25))
    assert line == {"time": "1970-01-01T00:00:00.250Z", "level": "info", "message": "done", "event": "step_end"}
    now = datetime.fromisoformat(json.loads(log_line("info", "done", {}))["time"])
    assert abs((datetime.now(UTC) - now).total_seconds()) < 5


def test_what_json_cannot_hold_stays_one_strict_line():
    facts = {"loss": float("nan"), "rate": [float("inf"), 1], "path": Path("/a"), "text": "two\nlines\u2028"}
    line = log_line("info", "x\ny", facts)
    assert len(line.splitlines()) == 1
    read = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert (read["loss"], read["rate"], read["path"]) == (None, [None, 1], "/a")
    assert read["text"] == facts["text"]


def test_a_line_says_what_the_terminal_would_with_the_event_s_own_fields(lines):
    lines.run = {"run_id": "7", "name": "tiny"}
    lines({"event": "step_start", "step": "train:broad", "index": 3, "count": 7})
    lines({"event": "warning", "message": "[b] a checkpoint is torn"})
    lines({"event": "step_end", "name": "train:broad", "status": "ran", "from_run": None, "seconds": 2.0})
    assert [(line["message"], line["level"], line["event"]) for line in lines.lines] == [
        ("[3/7] train:broad", "info", "step_start"),
        ("[b] a checkpoint is torn", "warning", "warning"),
        ("done in 2.0 s", "info", "step_end"),
    ]
    assert all((line["run_id"], line["name"], line["step"]) == ("7", "tiny", "train:broad") for line in lines.lines)
    assert lines.lines[0]["fields"] == {"index": 3, "count": 7}
    assert lines.lines[2]["fields"] == {"status": "ran", "from_run": None, "seconds": 2.0}


def test_what_a_person_would_not_see_makes_no_line(lines):
    lines({"event": "step", "step": 1, "losses": {"total": 1.0}})
    lines({"event": "of_another_version"})
    assert lines.lines == []


def test_what_fills_pages_stays_in_the_run_s_files(lines):
    plan = {"micro_batch_size": 4, "accumulation_steps": 2, "precision": "fp32", "probes": [{}] * 99, "timeline": {}}
    lines({"event": "stage_start", "parameters": 9, "num_train": 8, "epochs": 1, "steps_per_epoch": 1, "plan": plan})
    (line,) = lines.lines
    assert line["fields"]["plan"] == {"micro_batch_size": 4, "accumulation_steps": 2, "precision": "fp32"}


@pytest.mark.parametrize(("said", "wanted"), [("", "text"), ("text", "text"), ("json", "json")])
def test_the_environment_chooses(monkeypatch, said, wanted):
    monkeypatch.setenv("MEMFIT_LOG_FORMAT", said)
    assert log_format() == LogFormat(wanted)


def test_a_word_that_is_neither_is_refused(monkeypatch):
    monkeypatch.setenv("MEMFIT_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="MEMFIT_LOG_FORMAT: expected text or json, got 'xml'"):
        log_format()


@pytest.fixture
def formatted():
    """A logger that writes with the formatter as `logging.config` makes it, and what reads its lines."""
    written = io.StringIO()
    handler, logger = logging.StreamHandler(written), logging.getLogger("of.this.test")
    handler.setFormatter(JsonFormatter("default", None, "%"))
    logger.addHandler(handler)
    yield logger, lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    logger.removeHandler(handler)


def test_log_records_become_such_lines_with_what_prefect_and_memfit_know(formatted):
    logger, lines = formatted
    facts = {"event": "epoch", "run_id": "7", "fields": {"epoch": 2}}
    logger.warning("peak %d MiB", 9, extra={"flow_run_id": "f", "task_run_name": "train", "memfit": facts})
    (line,) = lines()
    assert (line["level"], line["message"], line["logger"]) == ("warning", "peak 9 MiB", "of.this.test")
    assert (line["flow_run_id"], line["task_run_name"]) == ("f", "train")
    assert {name: line[name] for name in facts} == facts
    assert line["time"].endswith("Z")


def test_an_exception_in_a_log_is_told_as_a_failed_command_tells_it(formatted):
    logger, lines = formatted
    try:
        raise DoesNotFitError("too large")
    except DoesNotFitError:
        logger.exception("it ended")
    (line,) = lines()
    assert (line["level"], line["event"], line["message"]) == ("error", "error", "it ended")
    assert (line["fields"]["kind"], line["fields"]["exit_status"]) == ("DoesNotFitError", 4)
    assert "DoesNotFitError: too large" in line["fields"]["traceback"]
