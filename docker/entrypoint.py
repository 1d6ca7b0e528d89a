"""What tini starts: makes the folders on the volume, becomes the command's parent, and ends after what it left.

A worker that is stopped leaves its flow runs, which write a checkpoint; a container ends with its first process, and
the kernel would kill them on the way.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDERS = ("HOME", "XDG_CACHE_HOME", "MEMFIT_RUNS", "MEMFIT_STORE", "MEMFIT_LOCKS")
CANNOT_CREATE = 73
"""Exit status of sysexits.h for a folder that cannot be made."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
MOST_SECONDS = 120.0
"""How long the container goes on after its command for what that left running."""
INITS = ("tini", "docker-init", "catatonit")


def make_folders() -> None:
    """Make what the environment names, or end with a message that says what to do."""
    for folder in (Path(os.environ[name]) for name in FOLDERS):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            sys.stderr.write(
                f"memfit: expected {folder} to be writable by user {os.getuid()}, and it is not. Mount a volume at "
                "/data that belongs to that user, or run with --user and the number of the user that it belongs to.\n"
            )
            sys.exit(CANNOT_CREATE)


def run(command: list[str]) -> int:
    """Run the command to its end, with the signals that this process gets; return its exit status."""
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        sys.stderr.write(f"memfit: expected a command, got {command[0]!r}: {error.strerror}.\n")
        return 127
    for number in FORWARDED:
        if number != signal.SIGINT or not sys.stdin.isatty():  # a terminal sends its own to all of its processes
            signal.signal(number, lambda received, _frame: child.send_signal(received))
        else:
            signal.signal(number, signal.SIG_IGN)
    status = child.wait()
    return status if status >= 0 else 128 - status


def wait_for_the_rest() -> None:
    """Wait for the other processes of this container, where it has a process table of its own."""
    if Path("/proc/1/comm").read_text(encoding="ascii").strip() not in INITS:
        return
    deadline = time.monotonic() + MOST_SECONDS
    while _others() and time.monotonic() < deadline:
        time.sleep(0.1)


def _others() -> list[int]:
    """List processes that live, besides this one and the init processes above it."""
    own = {1, os.getpid(), os.getppid()}
    numbers = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    return [number for number in numbers - own if _lives(number)]


def _lives(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def follow_log_format() -> None:
    """Make Prefect's lines JSON too, if memfit's are: it reads that before it comes to the flows."""
    if os.environ.get("MEMFIT_LOG_FORMAT") == "json":
        sys.path.insert(0, os.environ["MEMFIT_HOME"])
        from flows import JSON_LOGS

        for name, value in JSON_LOGS.items():
            os.environ.setdefault(name, value)


if __name__ == "__main__":
    make_folders()
    follow_log_format()
    ended = run(sys.argv[1:])
    wait_for_the_rest()
    sys.exit(ended)
