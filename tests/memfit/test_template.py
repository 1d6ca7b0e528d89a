"""Children that are forked from a process that has imported their libraries."""

import os
import signal
import time
from pathlib import Path

import pytest

from memfit import template
from memfit.errors import ChildError
from memfit.process import run_child, start_template
from memfit.template import preloaded

MIB = 2**20


@pytest.fixture(autouse=True)
def targets(importable):
    return importable(Path(__file__).with_name("process_targets.py"))


@pytest.fixture
def log(tmp_path):
    return tmp_path / "logs" / "child.log"


def look(log, module="colorsys"):
    return run_child("process_targets:look", {"module": module}, log=log).unwrap("looking")


def test_children_of_one_block_find_the_modules_imported_and_nothing_of_each_other(log):
    with preloaded("colorsys"):
        first, second = look(log), look(log)
    alone = look(log)
    assert first["imported"]
    assert second["imported"]
    assert not alone["imported"]
    assert first["parent"] == second["parent"] != os.getpid()
    assert alone["parent"] == os.getpid()
    assert first["pid"] != second["pid"]
    assert first["calls"] == second["calls"] == 1


def test_a_block_within_a_block_uses_the_outer_one_and_both_end(log):
    with preloaded("colorsys"):
        outer = look(log)
        with preloaded("graphlib"):
            inner = look(log)
        again = look(log)
    assert outer["parent"] == inner["parent"] == again["parent"]
    assert template.current() is None
    with pytest.raises(ProcessLookupError):
        os.kill(outer["parent"], 0)


def test_children_have_the_environment_and_the_directory_of_their_moment(log, tmp_path, monkeypatch):
    with preloaded("colorsys"):
        look(log)
        monkeypatch.setenv("MEMFIT_LATER", "yes")
        monkeypatch.chdir(tmp_path)
        found = look(log)
    assert found["later"] == "yes"
    assert found["directory"] == str(tmp_path)


def test_random_numbers_differ_between_children(log):
    with preloaded("random"):
        assert look(log)["random"] != look(log)["random"]


def test_a_template_that_starts_early_is_the_one_that_is_used(log):
    with preloaded("colorsys"):
        start_template(log)
        found = template.current()
        assert found is not None
        early = found._process.pid
        assert look(log)["parent"] == early


def test_a_module_that_cannot_be_imported_is_named_and_the_log_says_why(log):
    with preloaded("no_such_module_at_all"), pytest.raises(ChildError, match="no_such_module_at_all"):
        look(log)
    assert "ModuleNotFoundError" in log.read_text(encoding="utf-8")


def test_a_template_that_is_killed_takes_its_child_along_and_that_is_a_measurement(log):
    with preloaded("json"):
        outcome = run_child(
            "process_targets:until_stopped", {}, log=log, on_event=lambda event: kill_parent_of(event["pids"][0])
        )
    assert outcome.status == "oom"
    assert "SIGKILL" in outcome.message


def kill_parent_of(pid):
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    os.kill(int(stat[1]), signal.SIGKILL)
    time.sleep(0.2)


def test_a_fork_measures_the_memory_of_a_process_that_imported_for_itself(log):
    """Without its files mapped again, a fork began 60 MiB lower, and budgets that held for it did not hold later."""
    target = "process_targets:small_step"
    spawned = run_child(target, {}, log=log).unwrap("a step")
    with preloaded("torch._dynamo", "memfit.memory.probe"):
        forked = run_child(target, {}, log=log).unwrap("a step")
    for name in ("start", "end"):
        assert forked[name] == pytest.approx(spawned[name], abs=12 * MIB)
