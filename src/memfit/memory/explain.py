"""Run a user's own training script in a child process and explain what held the memory when it ran out.

The child (`explain_child`) becomes the script, with its arguments, standard streams and exit status, and reports on a
pipe of its own. Nothing here imports torch.
"""

import json
import os
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memfit import errors
from memfit.errors import ConfigError
from memfit.memory.advice import advise

TOP_MODULES = 15
_DEADLY = ("SIGKILL", "SIGABRT", "SIGSEGV", "SIGBUS")
JOB_VARIABLE = "MEMFIT_EXPLAIN"

Report = dict[str, Any]


def explain_script(
    script: Path, args: Sequence[str] = (), *, budget: str | None = None, device: str = "cpu", own_stdout: bool = False
) -> Report:
    """Run a script to its end; return what it held at most, or when memory ran out.

    budget: '2GiB', '80%' of the device or 'auto', enforced before the script runs; None: whatever there is.
    own_stdout: the caller's stdout is its own; what the script prints there goes to stderr.

    Returns: JSON-able; `status` is ended, oom, killed (memory ran out, as a signal says) or failed, `exit_status` what
    to end with. Bytes are of the device that ran out. Raises: ConfigError for what is no Python script, or no budget.
    """
    _check_script(script)
    job = {"script": str(script), "args": list(args), "budget": budget, "device": device, "parent": os.getpid()}
    reader, writer = os.pipe()
    try:
        child = _spawn(job, writer, own_stdout)
        with _signals_passed_to(child):
            os.close(writer)
            events = _listen(child, reader)
            status = child.wait()
    finally:
        os.close(reader)
    if "error" in events:
        raise getattr(errors, events["error"]["kind"])(events["error"]["message"])
    return _conclude(job, events, status)


def _check_script(script: Path) -> None:
    wanted = f"script: expected a file of Python, got {str(script)!r}"
    if not script.is_file():
        what = "a directory. Name the script in it" if script.is_dir() else "which is not there. Check the path"
        raise ConfigError(f"{wanted}, {what}.")
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(script.read_bytes(), str(script), "exec", dont_inherit=True)
    except OSError as error:
        raise ConfigError(f"{wanted}, which cannot be read: {error.strerror}. Check its permissions.") from error
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{wanted}, which does not compile: {error}. Try: python {script}") from error


def _spawn(job: dict[str, Any], writer: int, own_stdout: bool) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "memfit.memory.explain_child"],
        stdout=2 if own_stdout else None,
        pass_fds=[writer],
        env={**os.environ, JOB_VARIABLE: json.dumps({**job, "descriptor": writer})},
    )


@contextmanager
def _signals_passed_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let the script decide what SIGINT and SIGTERM mean; a terminal sends SIGINT to it without our help."""

    def pass_on(number: int, _frame: Any) -> None:
        if number != signal.SIGINT or not _in_foreground():
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.kill()
            child.wait()


def _in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _listen(child: subprocess.Popen[bytes], reader: int) -> dict[str, Any]:
    """Keep the last event of each kind until the child is gone."""
    events: dict[str, Any] = {}
    buffer = b""
    while True:
        ready, _, _ = select.select([reader], [], [], 0.2)
        if not ready and child.poll() is not None:
            return events  # a grandchild may hold the pipe open
        chunk = os.read(reader, 1 << 16) if ready else b""
        *lines, buffer = (buffer + chunk).split(b"\n")
        events |= {event["event"]: event for event in map(json.loads, lines)}
        if ready and not chunk:
            return events


def _conclude(job: dict[str, Any], events: dict[str, Any], status: int) -> Report:
    own = status if status >= 0 else 128 - status
    report: Report = {"script": job["script"], "args": job["args"], "status": "failed" if own else "ended"}
    report |= {"exit_status": own, "budget_bytes": None, "times_out_of_memory": 0, "source": None, "message": ""}
    report |= {"request_bytes": None, "full_forward": None}
    for kind in ("limits", "peak", "ended"):
        report |= events.get(kind, {})
    name = signal.Signals(-status).name if status < 0 else None
    if "oom" in events:
        report |= {**events["oom"], "status": "oom", "exit_status": errors.ChildOutOfMemoryError.exit_status}
    elif name in _DEADLY and "categories" in report and (name == "SIGKILL" or job["budget"]):
        report |= {"status": "killed", "exit_status": errors.ChildOutOfMemoryError.exit_status}
        report["message"] = (
            f"died of {name}, as processes do where memory ends without an exception; this was held at the last peak "
            "that was seen, and the request that failed is not known"
        )
    report["advice"] = advise(report) if report["status"] in ("oom", "killed") else []
    report["modules"] = report.get("modules", [])[:TOP_MODULES]
    for name in ("event", "blocks", "full_forward"):
        report.pop(name, None)
    return report
