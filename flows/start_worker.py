"""Start a Prefect worker that, when it is stopped, lets its flow runs write their checkpoints first.

python -m flows.start_worker --pool memfit-process
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from memfit.process import die_with_parent

GRACE_SECONDS = 120.0
"""What flow runs get for their step, their checkpoint, and what they have to tell the server."""
CLOSING_SECONDS = 20.0
"""What the worker gets after them."""
_MARK = b"PREFECT__FLOW_RUN_ID="


def run(arguments: list[str]) -> int:
    """Run `prefect worker start` with these arguments until it ends or this process is told to; return its status.

    A worker of a process pool kills its flow runs as soon as it is told to stop. So it is held still, its flow runs get
    a SIGTERM, and when they have ended, so does it.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    command = [sys.executable, "-m", "prefect", "worker", "start", *arguments]
    worker = subprocess.Popen(
        command,
        start_new_session=True,  # Ctrl-C of a terminal is for this process alone
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )
    while worker.poll() is None and not stop.wait(0.5):
        pass
    if worker.poll() is None:
        _stop(worker)
    return worker.wait()


def _stop(worker: subprocess.Popen[bytes]) -> None:
    worker.send_signal(signal.SIGSTOP)  # it takes no new run
    runs = flow_runs(worker.pid)
    for pid in runs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(map(_lives, runs)) and time.monotonic() < deadline:
        time.sleep(0.1)
    worker.terminate()
    worker.send_signal(signal.SIGCONT)
    try:
        worker.wait(CLOSING_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()


def flow_runs(worker: int) -> list[int]:
    """List the processes that a worker has started for flow runs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if _parent(entry) == worker and _MARK in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def _parent(entry: Path) -> int:
    return int(_status(entry)[1])


def _lives(pid: int) -> bool:
    try:
        return _status(Path("/proc") / str(pid))[0] != "Z"
    except OSError:
        return False


def _status(entry: Path) -> list[str]:
    """Return what follows the name in a process's stat: its state, its parent, and more."""
    return (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
