"""Child processes: what they return, how they die, and that nothing of them is left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from memfit import errors, process
from memfit.process import is_out_of_memory, run_child
from memfit.template import preloaded


@pytest.fixture(params=["spawned", "forked"])
def start(request):
    return request.param


@pytest.fixture(autouse=True)
def targets(importable, start):
    """Every test of children is run twice: with some that are started afresh, and with some that a template forks."""
    name = importable(Path(__file__).with_name("process_targets.py"))
    with preloaded("json") if start == "forked" else nullcontext():
        yield name


@pytest.fixture
def log(tmp_path):
    return tmp_path / "logs" / "child.log"


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Tell whether a process ends within some seconds; one that nobody reaped counts as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_returns_the_value_whatever_the_child_prints(log):
    payload = {"text": 'ä\n"', "numbers": [1, 2.5, None, True]}
    outcome = run_child("process_targets:echo", payload, log=log)
    assert outcome.status == "ok"
    value = outcome.unwrap("echo")
    assert value["got"] == payload
    assert value["pid"] != os.getpid()
    assert value["group"] == value["pid"]
    assert outcome.seconds > 0
    assert b"garbage on stdout" in log.read_bytes()


def test_passes_large_events_on_in_order(log):
    seen = []
    outcome = run_child("process_targets:events", {"count": 30, "padding": 70_000}, log=log, on_event=seen.append)
    assert outcome.value == 30
    assert [event["number"] for event in seen] == list(range(30))
    assert all(len(event["padding"]) == 70_000 for event in seen)
    assert {event["event"] for event in seen} == {"tick"}


def test_sends_a_payload_larger_than_a_pipe(log):
    payload = {"text": "x" * 300_000}
    assert run_child("process_targets:echo", payload, log=log).unwrap("echo")["got"] == payload


@pytest.mark.parametrize("name", ["ConfigError", "DataError", "DoesNotFitError", "CheckpointError", "Resumable"])
def test_raises_the_childs_own_error_again(log, name):
    outcome = run_child("process_targets:fail", {"error": name, "message": "expected 1, got 2"}, log=log)
    with pytest.raises(getattr(errors, name)) as raised:
        outcome.unwrap("the step")
    assert type(raised.value) is getattr(errors, name)
    assert str(raised.value) == "expected 1, got 2"
    assert outcome.status == ("resumable" if name == "Resumable" else "failed")


def test_other_errors_name_the_step_the_error_and_the_log(log):
    outcome = run_child("process_targets:fail", {"error": "KeyError", "message": "lost"}, log=log)
    assert outcome.phase == "failing"
    with pytest.raises(errors.ChildError, match=r"the step: failed: KeyError: 'lost'") as raised:
        outcome.unwrap("the step")
    assert str(log) in str(raised.value)
    assert "a last word in the log" in log.read_text(encoding="utf-8")
    assert "Traceback" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["torch_out_of_memory", "fail"])
def test_memory_that_ran_out_is_told_apart(log, target):
    outcome = run_child(f"process_targets:{target}", {"error": "MemoryError", "message": "no"}, log=log)
    assert outcome.status == "oom"
    with pytest.raises(errors.ChildOutOfMemoryError, match="the probe: ran out of its memory budget"):
        outcome.unwrap("the probe")


@pytest.mark.parametrize("status", [0, 3])
def test_a_child_that_leaves_without_an_outcome_failed(log, status):
    outcome = run_child("process_targets:leave", {"status": status}, log=log)
    assert outcome.status == "failed"
    assert f"exit status {status}" in outcome.message
    assert "leaving early" in outcome.message


@pytest.mark.parametrize(
    ("target", "said"),
    [("nowhere:at_all", "nowhere"), ("process_targets:absent", "absent"), ("process_targets:unspeakable", "set")],
)
def test_a_target_that_cannot_be_run_or_told_failed(log, target, said):
    outcome = run_child(target, {}, log=log)
    assert outcome.status == "failed"
    assert said in outcome.message


@pytest.mark.parametrize(("name", "status"), [("SIGKILL", "oom"), ("SIGABRT", "oom"), ("SIGHUP", "failed")])
def test_death_by_a_signal_is_a_measurement_not_a_crash(log, name, status):
    outcome = run_child("process_targets:kill_itself", {"signal": name}, log=log)
    assert (outcome.status, outcome.phase) == (status, "dying")
    assert name in outcome.message


@pytest.mark.parametrize("target", ["deaf", "until_stopped"])
def test_a_deadline_ends_the_child_and_its_children(log, target):
    pids = []
    started = time.monotonic()
    outcome = run_child(
        f"process_targets:{target}",
        {},
        log=log,
        on_event=lambda event: pids.extend(event["pids"]),
        deadline_seconds=3.0,
        grace_seconds=0.3,
    )
    assert outcome.status == "timeout"
    assert "3 s" in outcome.message
    assert time.monotonic() - started < 20
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_a_child_that_hangs_writes_its_stacks_and_is_ended(log):
    outcome = run_child("process_targets:hang", {}, log=log, silence_seconds=1.5)
    assert (outcome.status, outcome.phase) == ("hung", "waiting")
    assert "said nothing for" in outcome.message
    assert "in hang" in log.read_text(encoding="utf-8")
    assert outcome.seconds < 20
    with pytest.raises(errors.ChildError, match="hung"):
        outcome.unwrap("training")


def test_a_child_that_keeps_talking_is_left_alone(log):
    assert run_child("process_targets:talk", {}, log=log, silence_seconds=2.0).value == "done"


def test_a_child_that_leaves_a_process_behind_returns_at_once(log):
    started = time.monotonic()
    outcome = run_child("process_targets:hold_the_pipe", {}, log=log)
    assert outcome.value == "done"
    assert time.monotonic() - started < 20


def test_sigterm_in_the_child_asks_its_target_to_stop(log):
    pids = []

    def stop(event):
        pids.extend(event["pids"])
        os.kill(event["pids"][0], signal.SIGTERM)

    outcome = run_child("process_targets:until_stopped", {}, log=log, on_event=stop)
    assert outcome.status == "resumable"
    with pytest.raises(errors.Resumable, match="checkpoint at step 7"):
        outcome.unwrap("training")
    assert gone(pids[1])


def test_an_interrupt_in_the_parent_ends_the_child_and_is_raised_again(log):
    pids = []

    def interrupt(event):
        pids.extend(event["pids"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child("process_targets:until_stopped", {}, log=log, on_event=interrupt)
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


@pytest.fixture
def interruptible():
    """Let SIGINT raise, also where pytest was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_during_the_grace_still_ends_the_child(log):
    pids = []

    def interrupt(event):
        pids.extend(event["pids"])
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_child("process_targets:deaf", {}, log=log, on_event=interrupt, grace_seconds=60)
    assert time.monotonic() - started < 30
    assert all(gone(pid) for pid in pids)


PARENT = """
import json, sys
from contextlib import nullcontext
from pathlib import Path
from memfit.process import run_child
from memfit.template import preloaded
show = lambda event: print(json.dumps(event["pids"]), flush=True)
with preloaded("json") if sys.argv[2] == "forked" else nullcontext():
    run_child("process_targets:deaf", {}, log=Path(sys.argv[1]), on_event=show)
"""


def test_a_child_dies_with_a_parent_that_was_killed(log, start):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(log), start], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child, grandchild = json.loads(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        assert gone(child)
    finally:
        os.kill(grandchild, signal.SIGKILL)  # nobody is left to end it


def test_the_stop_flag_is_down_where_nobody_asked():
    assert not process.stop_requested()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("could not create a memory object"),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not execute a primitive"),
        type("OutOfMemoryError", (RuntimeError,), {})("x"),
    ],
)
def test_knows_the_words_for_memory_that_ran_out(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), OSError(2, "gone")])
def test_other_errors_are_not_about_memory(error):
    assert not is_out_of_memory(error)
