"""Keeping a child process within its budget: limits, peaks, and what to say when memory runs out."""

import contextlib
import os
import resource
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from memfit.errors import ChildOutOfMemoryError, DoesNotFitError
from memfit.process import Emit, is_out_of_memory, lift_memory_limit
from memfit.step import Batch, num_samples, tensors_of

LATER_BYTES = 16 * 2**20
"""What a limit on the CPU keeps for code of libraries that is read after it is set: 10 to 16 MiB were measured."""


def enforce_budget(budget_bytes: int, device: str) -> int:
    """Make allocations beyond the budget fail in this process. Call it after the imports.

    CUDA: a fraction of the card for the caching allocator, the context taken off first. CPU: RLIMIT_DATA, which counts
    pages that were never touched, and none of mapped files; both are allowed for as they stand now. Returns what the
    limit leaves out of the budget: on a CPU VmData and this are what the budget holds, in bytes.
    """
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        context = max(total - free - torch.cuda.memory_reserved(device), 0)
        fraction = max(budget_bytes - context, 1) / total
        torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0), device)
        return context
    left_out = _uncounted_bytes()
    limit = max(budget_bytes - left_out, 1)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == -1 else min(limit, hard), hard))
    return left_out


def _uncounted_bytes() -> int:
    """Measure what RLIMIT_DATA leaves out of this process's resident memory, less what it counts too much.

    Counted too much are the stacks of threads and the buffers that BLAS reserves when it is imported: 32 MiB a core
    with OpenBLAS. Other untouched pages, such as a user's array of zeros, stay counted: they may be touched yet.
    """
    weight = torch.zeros(256, 256, requires_grad=True)
    (torch.ones(256, 256) @ weight).relu().sum().backward()  # starts torch's threads, and reads its code
    status = process_status()
    files = status["VmRSS"] - status["RssAnon"]
    reserved, threads = _AT_IMPORT
    stacks = (_num_threads() - threads) * _stack_bytes()
    return files + LATER_BYTES - min(_untouched(status), reserved + max(stacks, 0))


def _untouched(status: dict[str, int]) -> int:
    return max(status["VmData"] - status["RssAnon"], 0)


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _stack_bytes() -> int:
    """Read how large a new thread's stack is."""
    limit = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return 2 * 2**20 if limit == resource.RLIM_INFINITY else limit


@dataclass
class Phases:
    """Says what a child is at: to its parent, and in its errors."""

    step: str
    """What the child is for, such as "export"."""
    emit: Emit
    now: str = "start"

    def __call__(self, phase: str) -> None:
        """Begin a phase."""
        self.now = phase
        self.emit({"event": "phase", "phase": phase})


@contextlib.contextmanager
def within_budget(budget_bytes: int, device: str, phases: Phases, cure: str) -> Iterator[None]:
    """Enforce a budget on this process, and say what ran out and what to do about it.

    Raises: DoesNotFitError where the process holds the budget already; ChildOutOfMemoryError where it runs out.
    """
    held = peak_bytes(device) if torch.device(device).type == "cuda" else now_bytes(device)
    if held >= budget_bytes:
        raise DoesNotFitError(
            f"{phases.step}: expected a budget above the {held / 2**20:.0f} MiB that the process holds before any "
            f"work, got {budget_bytes / 2**20:.0f} MiB. {cure}"
        )
    enforce_budget(budget_bytes, device)
    try:
        yield
    except Exception as error:
        lift_memory_limit()
        cause = _shortage(error)
        if cause is None:
            raise
        said = f"{type(cause).__name__} {cause!s:.300}".strip()
        raise ChildOutOfMemoryError(
            f"{phases.step}: expected to stay within {budget_bytes / 2**20:.0f} MiB on {device}, ran out in phase "
            f"{phases.now!r}: {said}. {cure}"
        ) from error


def _shortage(error: BaseException | None) -> BaseException | None:
    """Find what says that memory ran out: an exception, or what it was raised from; onnxruntime has own words.

    onnxscript, while it is imported, reads its own source, and takes a file that cannot be read for none.
    """
    words = ("bad_alloc", "Failed to allocate memory", "does not work on dynamically compiled function")
    while error is not None and not isinstance(error, DoesNotFitError):  # that has said all there is to say
        if is_out_of_memory(error) or any(said in str(error) for said in words):
            return error
        error = error.__cause__
    return None


def host_bytes(batch: Batch) -> int:
    """Count what a batch has of its own on the host, in bytes: shared memory once, views onto something larger not."""
    held, used = dict[int, int](), Counter[int]()
    for tensor in tensors_of(batch):
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            used[storage.data_ptr()] += tensor.nbytes
    return sum(size for address, size in held.items() if size <= used[address])


def rest_of_batch(batch: Batch, size: int) -> torch.Tensor:
    """Take as much memory as a batch of `size` samples has more than this one: a loop holds it all on the host."""
    here = num_samples(batch)
    return torch.ones(host_bytes(batch) * max(size - here, 0) // here, dtype=torch.uint8)


def peak_bytes(device: str) -> int:
    """Read the peak of this process: allocator peak plus context on CUDA, resident memory on a CPU."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        context = max(total - free - torch.cuda.memory_reserved(device), 0)
        return torch.cuda.max_memory_reserved(device) + context
    return process_status()["VmHWM"]


def now_bytes(device: str) -> int:
    """Read what this process holds now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_reserved(device)
    return process_status()["VmRSS"]


def reset_peak(device: str) -> None:
    """Start a new peak measurement."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # without the right to reset it, the peak stays an upper bound
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def process_status() -> dict[str, int]:
    """Read this process's memory lines of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(amount) * 1024 for name, amount, _ in pairs}


def _reserved_now() -> tuple[int, int]:
    with contextlib.suppress(OSError, KeyError):  # no Linux: no budgets on a CPU either
        return _untouched(process_status()), _num_threads()
    return 0, 0


_AT_IMPORT = _reserved_now()
"""(bytes that are mapped and untouched, threads) once torch and numpy are imported, in a fork of such a process too."""


def _note_reserved() -> None:
    global _AT_IMPORT
    _AT_IMPORT = _reserved_now()


os.register_at_fork(after_in_child=_note_reserved)
