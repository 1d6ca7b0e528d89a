"""Memory budgets: what a user's words come to on a device, what is free there, and enforcing it in a child."""

import contextlib
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from memfit.errors import ConfigError
from memfit.memory.devices import Device, find_device, is_here
from memfit.memory.host import Memory, host_memory
from memfit.memory.units import parse_bytes, parse_share

MARGIN_BYTES = 512 * 2**20
"""What `auto` leaves to everything else on the device, unless told otherwise; and the least that it gives."""


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


def enforce_budget(budget_bytes: int, device: str) -> None:
    """Make allocations beyond the budget fail in this process.

    CUDA: a fraction of the card for the caching allocator, the context taken off first. CPU: RLIMIT_DATA, less the
    resident pages of mapped files, which that limit does not count. Call it after the imports.
    """
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        context = total - free - torch.cuda.memory_reserved(device)
        fraction = max(budget_bytes - max(context, 0), 1) / total
        torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0), device)
        return
    limit = max(budget_bytes - process_status()["RssFile"], 1)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == -1 else min(limit, hard), hard))


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
