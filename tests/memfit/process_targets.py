"""What the children of test_process.py run; copied to where they can import it."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from memfit import errors
from memfit.process import stop_requested

_calls = []


def echo(payload, emit):
    print("garbage on stdout {not json", flush=True)
    os.write(1, b'\xff\xfe{"event": "outcome"}\n')
    return {"got": payload, "pid": os.getpid(), "group": os.getpgrp()}


def events(payload, emit):
    emit({"event": "phase", "phase": "counting"})
    for number in range(payload["count"]):
        emit({"event": "tick", "number": number, "padding": "ä" * payload["padding"]})
    return payload["count"]


def fail(payload, emit):
    emit({"event": "phase", "phase": "failing"})
    print("a last word in the log", file=sys.stderr)
    known = {"KeyError": KeyError, "MemoryError": MemoryError}
    kind = known[payload["error"]] if payload["error"] in known else getattr(errors, payload["error"])
    raise kind(payload["message"])


def torch_out_of_memory(payload, emit):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


def leave(payload, emit):
    print("leaving early", file=sys.stderr, flush=True)
    sys.exit(payload["status"])


def kill_itself(payload, emit):
    emit({"event": "phase", "phase": "dying"})
    number = getattr(signal, payload["signal"])
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)  # nohup hands down a hang-up that is ignored
    os.kill(os.getpid(), number)
    time.sleep(60)


def unspeakable(payload, emit):
    return {1, 2}


def until_stopped(payload, emit):
    """Wait for the stop flag; leave behind the pids of this process and of a grandchild."""
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    emit({"event": "pids", "pids": [os.getpid(), grandchild.pid]})
    while not stop_requested():
        time.sleep(0.01)
    raise errors.Resumable("stopped with a checkpoint at step 7")


def deaf(payload, emit):
    """Ignore every request to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    emit({"event": "pids", "pids": [os.getpid(), grandchild.pid]})
    time.sleep(120)


def hold_the_pipe(payload, emit):
    """Fork a grandchild that inherits the event pipe, and return at once."""
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    return "done"


def look(payload, emit):
    """Say what this process is like."""
    imported = payload["module"] in sys.modules
    _calls.append(1)
    return {
        "imported": imported,
        "pid": os.getpid(),
        "parent": os.getppid(),
        "calls": len(_calls),
        "later": os.environ.get("MEMFIT_LATER"),
        "directory": str(Path.cwd()),
        "random": random.random(),
    }


def small_step(payload, emit):
    """Train a little, and report resident bytes before and after."""
    import torch._dynamo

    import memfit.memory.probe  # noqa: F401
    from memfit.memory.enforcement import process_status

    start = process_status()["VmRSS"]
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.randn(64, 256)).square().mean().backward()
        optimizer.step()
    return {"start": start, "end": process_status()["VmHWM"]}


def hang(payload, emit):
    """Say something, and then nothing more."""
    emit({"event": "phase", "phase": "waiting"})
    while True:
        time.sleep(60)


def talk(payload, emit):
    """Take longer than the silence that is allowed, and say so in between."""
    for _ in range(6):
        time.sleep(0.6)
        emit({"event": "tick"})
    return "done"
