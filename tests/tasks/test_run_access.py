import logging

from memfit.output import LineView
from tasks.run_access import log_writer


def test_log_lines_are_the_terminal_s_without_markup(caplog):
    caplog.set_level(logging.INFO)
    view = LineView(log_writer(logging.getLogger("run")))
    view({"event": "step_start", "step": "train:broad", "index": 3, "count": 7})
    view({"event": "step_end", "name": "train:broad", "status": "reused", "from_run": "run-7", "seconds": 0.0})
    assert caplog.messages == ["[3/7] train:broad", "reused from run-7: inputs, config and code are the same"]


def test_steps_of_a_training_are_not_logged_one_by_one(caplog):
    caplog.set_level(logging.INFO)
    view = LineView(log_writer(logging.getLogger("run")))
    view({"event": "step", "step": 1, "losses": {"total": 1.0}})
    assert caplog.messages == []
