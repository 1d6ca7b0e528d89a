"""A process that imports libraries once, and from which children are then forked: each is ready at once.

Importing torch costs a child two to three seconds. Where several children follow one another, `preloaded` pays that
once. The template computes nothing and starts no thread, so that a fork of it is as good as a fresh process.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from memfit.errors import ChildError

_NUMBER = struct.Struct("q")
_PAGE = 4096 if sys.platform != "linux" else os.sysconf("SC_PAGESIZE")
_MADV_POPULATE_READ = 22
_here = threading.local()


@contextlib.contextmanager
def preloaded(*modules: str) -> Iterator[None]:
    """Fork the children that this thread starts within the block from one process that has imported `modules`.

    The process starts with the first child and ends with the block. In a block within a block the outer one counts.
    Not for children that use a GPU: a CUDA driver that was touched does not survive a fork.
    """
    if sys.platform != "linux" or current() is not None:
        yield
        return
    _here.template = Template(modules)
    try:
        yield
    finally:
        _here.template.close()
        _here.template = None


def current() -> "Template | None":
    """Find the template of this thread."""
    return getattr(_here, "template", None)


@dataclass
class Forked:
    """A child of the template, to be watched and ended like a `subprocess.Popen`."""

    pid: int
    _connection: socket.socket
    returncode: int | None = None

    def poll(self) -> int | None:
        """Return how it ended, if it has: its exit status, or the signal's number below zero."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended. Raises: subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("child", timeout or 0.0)
            ended = _read_number(self._connection)
            self.returncode = -signal.SIGKILL if ended is None else ended  # it dies with the template
        return self.returncode

    def terminate(self) -> None:
        """Ask it to stop."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it has not ended."""
        if self.poll() is None:  # until the next child starts, its number is not given to another process
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass
class Template:
    """The parent's handle on the process that children are forked from."""

    modules: Sequence[str]
    _process: "subprocess.Popen[bytes] | None" = None
    _connection: socket.socket = field(init=False)

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: int) -> None:
        """Start the process, if it has not started yet: it imports while its parent goes on."""
        if self._process is not None:
            return
        self._connection, far = socket.socketpair()
        with far:
            self._process = subprocess.Popen(
                [*command, str(far.fileno()), *self.modules],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[far.fileno()],
                start_new_session=True,
                env=environment,
            )

    def fork(self, job: bytes, events: int, log: int) -> Forked:
        """Start a child that handles `job`, once the process has imported everything.

        Raises: ChildError when the process has ended.
        """
        assert self._process is not None
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(self._connection, [_NUMBER.pack(len(job))], [events, log])
            self._connection.sendall(job)
        pid = _read_number(self._connection)
        if pid is None:
            raise ChildError(
                f"expected a process that imports {', '.join(self.modules)} and forks children, got one that ended "
                f"with {self._process.wait()}. Its log says why."
            )
        return Forked(pid, self._connection)

    def close(self) -> None:
        """End the template, and with it whatever it has forked."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._process = None


def serve(connection: socket.socket, modules: Sequence[str], work: Callable[[bytes, int], int]) -> int:
    """Be the template: import the modules, then fork a child for each job, one after the other.

    `work(job, events)` is the child's part; it returns the exit status.
    """
    gc.disable()  # collecting what stays, while it is made, costs a quarter of a second
    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    pages = _resident_file_pages()
    ended: int | None = None
    while (header := _read_header(connection)) is not None:
        if ended is not None:
            os.waitpid(ended, 0)  # not before: its number stays taken while its parent may still signal it
        size, events, log = header
        job = _read(connection, size)
        with warnings.catch_warnings(action="ignore"):  # of BLAS's threads, which it ends and starts by itself
            pid = os.fork()
        if pid == 0:
            connection.close()
            _leave(partial(_be_child, partial(work, job, events), pages, log))
        with contextlib.suppress(OSError):  # the child may have done it already
            os.setpgid(pid, pid)
        os.close(events)
        os.close(log)
        connection.sendall(_NUMBER.pack(pid))
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert end is not None
        connection.sendall(_NUMBER.pack(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status))
        ended = pid
    return 0


def _be_child(work: Callable[[], int], pages: Sequence[tuple[int, int]], log: int) -> int:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    _map_again(pages)
    return work()


def _leave(work: Callable[[], int]) -> None:
    """End this process with the work's status, whatever happens: a fork must not go on as the template."""
    status: Any = 1
    try:
        status = work()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # noqa: BLE001  (as the interpreter would at its end)
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def _resident_file_pages() -> list[tuple[int, int]]:
    """List the ranges of files that this process has in memory, as (address, bytes).

    A fork begins without most of them. They belong to what a process with these libraries takes: a child that maps
    them again measures the same memory as one that imported the libraries itself.
    """
    ranges = []
    with contextlib.suppress(OSError), Path("/proc/self/pagemap").open("rb") as pagemap:
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            area, access, _offset, _device, inode, *_name = line.split(maxsplit=5)
            if inode == "0" or not access.startswith("r"):
                continue
            start, end = (int(edge, 16) for edge in area.split("-"))
            pagemap.seek(start // _PAGE * 8)
            highest = pagemap.read((end - start) // _PAGE * 8)[7::8]  # bit 63 of an entry: the page is in memory
            ranges += [
                (start + run.start() * _PAGE, (run.end() - run.start()) * _PAGE)
                for run in re.finditer(rb"[\x80-\xff]+", highest)
            ]
    return ranges


def _map_again(ranges: Sequence[tuple[int, int]]) -> None:
    madvise = ctypes.CDLL(None).madvise
    for address, length in ranges:  # where the kernel knows no such advice, the child measures less
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_POPULATE_READ)


def _read_header(connection: socket.socket) -> tuple[int, int, int] | None:
    """Read a job's length, and its files for events and the log; None when the parent has ended the connection."""
    header, files, _flags, _address = socket.recv_fds(connection, _NUMBER.size, 2, socket.MSG_WAITALL)
    if len(header) < _NUMBER.size:
        return None
    events, log = files
    return _NUMBER.unpack(header)[0], events, log


def _read_number(connection: socket.socket) -> int | None:
    try:
        return int(_NUMBER.unpack(_read(connection, _NUMBER.size))[0])
    except OSError:
        return None


def _read(connection: socket.socket, size: int) -> bytes:
    """Read exactly `size` bytes. Raises: ConnectionError when the other side ends first."""
    parts, left = [], size
    while left:
        part = connection.recv(min(left, 1 << 20))
        if not part:
            raise ConnectionError(f"{left} of {size} bytes are missing")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
