"""Child processes that die with their parent, speak JSON lines, and never outlive a deadline.

A child is started as `python -m memfit.process`, or forked from a template that has imported its libraries already; the
parent sends it the job and reads events from a pipe of their own, so that whatever the child's libraries print goes to
a log file and disturbs nothing.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memfit import errors, template
from memfit.template import Forked

Emit = Callable[[dict[str, Any]], None]
Child = subprocess.Popen[bytes] | Forked
_PR_SET_PDEATHSIG = 1
# Idle OpenMP threads that spin take the cores from whoever else computes on them: on two busy cores, small layers ran
# 20 to 50 times slower than with threads that sleep.
_CHILD_DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONFAULTHANDLER": "1"}
_COMMAND = (sys.executable, "-m", "memfit.process")
_STACKS_SECONDS = 2.0
"""What a child that hangs gets to write its stacks."""
_stop = threading.Event()


@dataclass
class Outcome:
    """How a child ended: `status` is ok, oom, failed, timeout, hung or resumable."""

    status: str
    value: Any = None
    """What the target returned, if it did."""
    message: str = ""
    error: str = ""
    """Name of the exception type, if there was one."""
    phase: str | None = None
    """What the child said it was doing last."""
    log: Path | None = None
    seconds: float = 0.0

    def unwrap(self, what: str) -> Any:
        """Return the value, or raise the error that the child died of.

        Raises: the child's own MemfitError; ChildOutOfMemoryError; Resumable; ChildError otherwise.
        """
        if self.status == "ok":
            return self.value
        kind = getattr(errors, self.error, None)
        if isinstance(kind, type) and issubclass(kind, errors.MemfitError):
            raise kind(self.message)
        if self.status == "oom":
            phase = f" in phase {self.phase!r}" if self.phase else ""
            raise errors.ChildOutOfMemoryError(
                f"{what}: ran out of its memory budget{phase}: {self.message}. Raise the budget, or ask for less."
            )
        raise errors.ChildError(f"{what}: {self.status}: {self.message}. Its log: {self.log}")


@dataclass
class _Report:
    outcome: Outcome | None = None
    phase: str | None = None
    buffer: bytes = b""
    last_event: float = field(default_factory=time.monotonic)
    silent: bool = False
    """Nothing was heard for longer than allowed."""


def run_child(
    target: str,
    payload: dict[str, Any],
    *,
    log: Path,
    on_event: Emit | None = None,
    deadline_seconds: float | None = None,
    silence_seconds: float | None = None,
    grace_seconds: float = 60.0,
) -> Outcome:
    """Run `module:function` with a JSON payload in a child process of its own process group.

    `on_event` sees every event except the closing one. When the deadline passes, or the caller is interrupted, the
    child gets SIGTERM, `grace_seconds` to write a checkpoint, then SIGKILL; an interrupt is then raised again. One that
    says nothing for `silence_seconds` hangs: it writes its threads' stacks into its log, and is killed.
    """
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    report, closed = _Report(), False
    job = {"target": target, "payload": payload}
    with log.open("ab") as log_file:
        child = _start(job, writer, log_file.fileno())
        try:
            os.close(writer)
            closed = _listen(child, reader, report, on_event, deadline_seconds, silence_seconds)
        finally:
            grace = _STACKS_SECONDS if report.silent else grace_seconds
            _end(child, lambda: closed or _stop_and_listen(child, reader, report, on_event, grace))
            os.close(reader)
    outcome = _outcome(child.returncode, report, not closed, deadline_seconds, log)
    outcome.seconds, outcome.log = time.monotonic() - started, log
    return outcome


def start_template(log: Path) -> None:
    """Start this thread's template of children now, if there is one, while the caller gets ready to use it."""
    if (shared := template.current()) is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as log_file:
            shared.start([*_COMMAND, "template"], _environment(), log_file.fileno())


def _environment() -> dict[str, str]:
    return {**_CHILD_DEFAULTS, **os.environ}


def _start(job: dict[str, Any], events: int, log: int) -> Child:
    if (shared := template.current()) is not None:
        shared.start([*_COMMAND, "template"], _environment(), log)
        told = json.dumps({**job, "environment": _environment(), "directory": str(Path.cwd())}).encode()
        return shared.fork(told, events, log)
    child = subprocess.Popen(
        [*_COMMAND, "child", str(events)],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        pass_fds=[events],
        start_new_session=True,
        env=_environment(),
    )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; its exit status says how
        child.stdin.write(json.dumps({**job, "parent": os.getpid()}).encode())
        child.stdin.close()
    return child


def _listen(
    child: Child,
    reader: int,
    report: _Report,
    on_event: Emit | None,
    deadline_seconds: float | None,
    silence_seconds: float | None = None,
) -> bool:
    """Pass events on until the pipe closes; return False when the deadline or too long a silence came first."""
    end = None if deadline_seconds is None else time.monotonic() + deadline_seconds
    while True:
        if silence_seconds is not None and time.monotonic() - report.last_event > silence_seconds:
            report.silent = True
            return False
        left = 1.0 if end is None else min(1.0, end - time.monotonic())
        if left <= 0:
            return False
        ready, _, _ = select.select([reader], [], [], left)
        if ready and not _receive(reader, report, on_event):
            return True
        if not ready and (report.outcome is not None or child.poll() is not None):
            return True  # a grandchild may hold the pipe open


def _receive(reader: int, report: _Report, on_event: Emit | None) -> bool:
    chunk = os.read(reader, 1 << 16)
    report.last_event = time.monotonic()
    report.buffer += chunk
    *lines, report.buffer = report.buffer.split(b"\n")
    for line in lines:
        event = json.loads(line)
        if event["event"] == "outcome":
            report.outcome = Outcome(**event["outcome"])
        elif event["event"] == "phase":
            report.phase = event["phase"]
        elif on_event is not None:
            on_event(event)
    return bool(chunk)


def _stop_and_listen(child: Child, reader: int, report: _Report, on_event: Emit | None, grace_seconds: float) -> bool:
    if report.silent:
        child.send_signal(signal.SIGUSR1)  # faulthandler's, see `_be_child`
    else:
        child.terminate()
    return _listen(child, reader, report, on_event, grace_seconds)


def _end(child: Child, is_leaving: Callable[[], bool]) -> None:
    """Make sure that the child and everything it started is gone, even if a second interrupt comes meanwhile."""
    try:
        if is_leaving():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
    finally:
        if child.poll() is None:
            child.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _outcome(returncode: Any, report: _Report, timed_out: bool, deadline_seconds: float | None, log: Path) -> Outcome:
    if report.silent:
        message = (
            f"said nothing for {time.monotonic() - report.last_event:.0f} s; the stacks of its threads are in {log}"
        )
        return Outcome("hung", message=message, phase=report.phase)
    if timed_out:
        return Outcome("timeout", message=f"no result within {deadline_seconds:.0f} s", phase=report.phase)
    if report.outcome is not None:
        report.outcome.phase = report.phase
        return report.outcome
    tail = log.read_bytes()[-2000:].decode(errors="replace").strip()
    if returncode < 0:
        name = signal.Signals(-returncode).name
        # Under a memory limit, libraries that cannot allocate abort, and the kernel's OOM killer sends SIGKILL.
        status = "oom" if -returncode in (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS) else "failed"
        return Outcome(status, message=f"died of {name}", error=name, phase=report.phase)
    return Outcome("failed", message=f"exit status {returncode}: {tail[-500:]}", phase=report.phase)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out, on a device or on the host.

    On a CPU torch raises a plain RuntimeError; oneDNN and the C++ runtime have words of their own for it. An import
    that runs out may end as a SystemError.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == 12
    if isinstance(error, SystemError):
        return "without setting an exception" in str(error) or "without exception set" in str(error)
    words = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "could not create a memory",
             "could not create a primitive", "could not execute a primitive", "Cannot allocate memory",
             "CUBLAS_STATUS_ALLOC_FAILED", "can't start new thread")  # fmt: skip
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def lift_memory_limit() -> None:
    """Let this process allocate again: where memory ran out, saying so takes some."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def stop_requested() -> bool:
    """Tell a child's target whether it was asked to stop at the next safe point."""
    return _stop.is_set()


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when the thread that started it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


@contextlib.contextmanager
def _events(pipe: int) -> Iterator[Emit]:
    with os.fdopen(pipe, "w", buffering=1, encoding="utf-8") as stream:
        yield lambda event: print(json.dumps(event), file=stream, flush=True)


def _request_stop(_signal: int, _frame: Any) -> None:
    if _stop.is_set():
        os._exit(errors.Resumable.exit_status)
    _stop.set()


def _perform(target: str, payload: dict[str, Any], emit: Emit) -> Outcome:
    module, name = target.split(":")
    try:
        gc.disable()  # libraries make much that stays: collecting while they are read takes a quarter of a second
        work = getattr(importlib.import_module(module), name)
        gc.enable()
        return Outcome("ok", value=work(payload, emit))
    except errors.Resumable as stopped:
        return Outcome("resumable", message=str(stopped), error="Resumable")
    except errors.MemfitError as error:
        return Outcome("failed", message=str(error), error=type(error).__name__)
    except Exception as error:  # noqa: BLE001  (the boundary: whatever it was goes to the parent and to the log)
        lift_memory_limit()
        traceback.print_exc()
        status = "oom" if is_out_of_memory(error) else "failed"
        return Outcome(status, message=f"{type(error).__name__}: {error}"[:2000], error=type(error).__name__)


def _be_child(job: dict[str, Any], events: int) -> int:
    """Run the job, report the outcome, and return the exit status."""
    die_with_parent(job["parent"])
    signal.signal(signal.SIGTERM, _request_stop)
    signal.signal(signal.SIGINT, _request_stop)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # works where Python code no longer runs
    with _events(events) as emit:
        outcome = _perform(job["target"], job["payload"], emit)
        fields = {key: value for key, value in vars(outcome).items() if key not in ("log", "seconds")}
        emit({"event": "outcome", "outcome": fields})
    return 0 if outcome.status == "ok" else 1


def _be_template(connection: int, modules: Sequence[str]) -> int:
    die_with_parent(os.getppid())
    own = os.getpid()

    def work(job: bytes, events: int) -> int:
        told = json.loads(job)
        os.environ.clear()
        os.environ.update(told["environment"])
        os.chdir(told["directory"])
        return _be_child({**told, "parent": own}, events)

    with socket.socket(fileno=connection) as parent:
        return template.serve(parent, modules, work)


def main(role: str, number: str, *modules: str) -> int:
    """Be a child, with its job on the standard input, or the template of children; `number`: the file to the parent."""
    if role == "template":
        return _be_template(int(number), modules)
    return _be_child(json.load(sys.stdin), int(number))


if __name__ == "__main__":
    # Run the module's one importable instance, not this `__main__` copy: both would hold a stop flag of their own.
    status = importlib.import_module("memfit.process").main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is said and written: taking the interpreter apart would cost a second
