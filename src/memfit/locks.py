"""Locks that name their owner and end with it: of a run's directory, and of a CUDA device of this machine."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memfit.errors import RunStateError

SHARED_FOLDER = "/tmp/memfit-locks"  # noqa: S108  (of all users, whatever their TMPDIR: they share the devices)
DRIVER_SECONDS = 60.0
"""What the driver gets to name a device."""
# In a process of its own: a driver that was touched does not survive a fork, and torch takes seconds to import.
_ASK_DRIVER = """
import ctypes, sys, uuid
driver = ctypes.CDLL("libcuda.so.1")
read = getattr(driver, "cuDeviceGetUuid_v2", None) or driver.cuDeviceGetUuid
device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), int(sys.argv[1])) or read(raw, device)
sys.exit(f"CUDA error {failed}") if failed else print(f"GPU-{uuid.UUID(bytes=bytes(raw))}")
"""


@contextmanager
def locked(path: Path, what: str, run_dir: Path, cure: str, *, mode: int = 0o644) -> Iterator[None]:
    """Own what a lock file stands for while the block runs. The kernel frees the lock of an owner that dies, at once.

    The file says who owns it: pid, host, run_dir, since (UTC). `what` and `cure` begin and end the refusal.
    Raises: RunStateError that names the owner and says whether it is alive, or why the file cannot be opened.
    """
    descriptor = _open(path, mode)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _describe(os.pread(descriptor, 1 << 14, 0))
            raise RunStateError(f"{what}: in use by {owner}. {cure}") from None
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "run_dir": str(run_dir.resolve()), "since": since}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


@contextmanager
def device_locked(device: str, run_dir: Path) -> Iterator[None]:
    """Own a device while the block runs: cuda or cuda:n; cpu is shared, and takes no lock.

    Locks lie in $MEMFIT_LOCKS or /tmp/memfit-locks; containers that share a card must share this folder.
    Raises: RunStateError that names the owner.
    """
    if device == "cpu":
        yield
        return
    card = physical_device(device)
    cure = "Wait for it, stop it, or take another --device."
    with locked(_shared_folder() / f"{card}.lock", f"{device} ({card})", run_dir, cure, mode=0o666):
        yield


def physical_device(device: str) -> str:
    """Name the card behind cuda or cuda:n: its UUID where the driver answers, else what `visible_device` says."""
    command = [sys.executable, "-I", "-c", _ASK_DRIVER, str(_index(device))]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return visible_device(device)
    return asked.stdout.strip() if asked.returncode == 0 else visible_device(device)


def visible_device(device: str) -> str:
    """Map cuda or cuda:n through CUDA_VISIBLE_DEVICES: cuda-2, or the UUID that stands there."""
    entries = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    index = _index(device)
    seen = entries[index] if index < len(entries) else str(index)
    return f"cuda-{seen}" if seen.isdigit() else seen.replace("/", "-")


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _open(path: Path, mode: int) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # kernels refuse O_CREAT for another user's file in a folder that everybody may write
            return os.open(path, flags)
        except FileNotFoundError:
            descriptor = os.open(path, flags | os.O_CREAT, mode)
            os.fchmod(descriptor, mode)  # whatever the umask
            return descriptor
    except OSError as error:
        raise RunStateError(f"{path}: expected a lock file, got: {error}. Take another folder.") from error


def _shared_folder() -> Path:
    folder = Path(os.environ.get("MEMFIT_LOCKS") or SHARED_FOLDER)
    try:
        folder.mkdir(parents=True)
        folder.chmod(0o1777)  # anybody makes locks, nobody removes another user's
    except FileExistsError:
        pass
    except OSError as error:
        raise RunStateError(
            f"{folder}: expected a folder for locks, got: {error}. Set MEMFIT_LOCKS to one that all users can write."
        ) from error
    return folder


def _describe(content: bytes) -> str:
    try:
        owner = json.loads(content)
        pid, host, run_dir, since = (owner[key] for key in ("pid", "host", "run_dir", "since"))
    except (ValueError, TypeError, KeyError):  # it is being written just now
        return "another process"
    return f"process {pid} on {host} ({_liveness(pid, host)}), run directory {run_dir}, since {since}"


def _liveness(pid: int, host: str) -> str:
    if host != socket.gethostname():
        return "of another machine or container"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "dead, but a process that it forked is alive"
    except PermissionError:  # another user's
        return "alive"
    return "alive"
