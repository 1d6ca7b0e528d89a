"""Memory budgets: what a user's words come to on a device, what is free there, and enforcing it in a child."""

import contextlib
import os
import re
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memfit.errors import ChildOutOfMemoryError, ConfigError, DoesNotFitError
from memfit.memory.devices import Device, find_device, is_here
from memfit.memory.host import Memory, host_memory
from memfit.memory.units import parse_bytes, parse_share
from memfit.process import Emit, is_out_of_memory
from memfit.step import Batch, num_samples, tensors_of

MARGIN_BYTES = 512 * 2**20
"""What `auto` leaves to everything else on the device, unless told otherwise; and the least that it gives."""
LATER_BYTES = 16 * 2**20
"""What a limit on the CPU keeps for code of libraries that is read after it is set: 10 to 16 MiB were measured."""


def resolve_budget(
    text: str, device: str, margin_bytes: int = MARGIN_BYTES, user_devices: Sequence[Device] = ()
) -> int:
    """Turn '14GiB', '80%' (of the device's total) or 'auto' (free now, less a margin) into bytes.

    A device of the catalog is taken as empty: `auto` is its total less the margin. Raises: ConfigError for text that is
    none of these, an unknown device, a negative margin, or more than a device of the catalog has.
    """
    if margin_bytes < 0:
        raise ConfigError(f"margin: expected 0 bytes or more, got {margin_bytes}. Raise it.")
    text = text.strip()
    if text == "auto":
        return max(_memory_of(device, user_devices).free_bytes - margin_bytes, MARGIN_BYTES)
    if text.endswith("%"):
        return max(int(parse_share(text) * _memory_of(device, user_devices).total_bytes), 1)
    budget = parse_bytes(text)
    if not is_here(device) and budget > (total := find_device(device, user_devices).memory_bytes):
        raise ConfigError(
            f"budget: expected at most the {total / 2**30:.2f} GiB of {device!r}, got {text!r:.80}. Lower it, or plan "
            "for a larger card."
        )
    return budget


def _memory_of(device: str, user_devices: Sequence[Device]) -> Memory:
    if is_here(device):
        return device_memory(device.strip().lower())
    total = find_device(device, user_devices).memory_bytes
    return Memory(total, total)


def resolve_in_child(payload: dict[str, Any], _emit: object) -> int:
    """Resolve a budget in a child process, so that the parent never touches the device."""
    return resolve_budget(payload["budget"], payload["device"], payload.get("margin_bytes", MARGIN_BYTES))


def device_memory(device: str) -> Memory:
    """Measure a device that is here.

    CUDA: what cudaMemGetInfo reports: as in NVML's figures, what other processes hold is not free. Asking makes a
    context in this process, which is not free either. CPU: the smaller of the machine's and the container's limit.
    """
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    return host_memory()


def other_processes(device: str) -> list[tuple[int, int]]:
    """List (process id, bytes) of what others hold on a CUDA device, by nvidia-smi.

    It explains why little is free, and nothing is planned with it: the list is empty on a CPU, without nvidia-smi, and
    where a container, MIG or WSL hides other processes.
    """
    command, card = shutil.which("nvidia-smi"), _card_uuid(device)
    if command is None or card is None:
        return []
    query = [command, "-i", card, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (re.fullmatch(r"\s*([0-9]+)\s*,\s*([0-9]+)\s*", line) for line in said.splitlines())
    found = [(int(row[1]), int(row[2]) * 2**20) for row in rows if row is not None]
    return [(pid, used) for pid, used in found if pid != os.getpid()]


def _card_uuid(device: str) -> str | None:
    """Identify a card for nvidia-smi, whose numbers ignore CUDA_VISIBLE_DEVICES."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def check_device(device: str) -> str:
    """Return the device if it is here; raise ConfigError otherwise (never fall back to another one)."""
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: expected 'cpu', 'cuda' or 'cuda:n', got {device!r}.") from error
    if parsed.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected 'cpu', 'cuda' or 'cuda:n', got {device!r}. Other kinds are not supported.")
    if parsed.type == "cuda" and torch.version.hip is not None:
        raise ConfigError(
            f"device: {device!r} is a ROCm device here, and memfit runs on CUDA and CPU. Use --device cpu."
        )
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {device!r} is not here: this torch sees {torch.cuda.device_count()} CUDA devices. "
            "Use --device cpu, or a torch build and a driver that see the card."
        )
    return device


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
        cause = _shortage(error)
        if cause is None:
            raise
        said = f"{type(cause).__name__} {cause!s:.300}".strip()
        raise ChildOutOfMemoryError(
            f"{phases.step}: expected to stay within {budget_bytes / 2**20:.0f} MiB on {device}, ran out in phase "
            f"{phases.now!r}: {said}. {cure}"
        ) from error


def _shortage(error: BaseException | None) -> BaseException | None:
    """Find what says that memory ran out: an exception, or what it was raised from; onnxruntime has own words."""
    while error is not None:
        if is_out_of_memory(error) or any(words in str(error) for words in ("bad_alloc", "Failed to allocate memory")):
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
"""(bytes that are mapped and untouched, threads) once torch and numpy are imported."""
