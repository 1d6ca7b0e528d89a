"""Memory budgets: parsing what users write, measuring what there is, enforcing it in a child."""

import contextlib
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from memfit.errors import ConfigError

UNITS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
PATTERN = r"auto|\d+(\.\d+)?\s*(%|[KMGT]i?B|B)"
MARGIN_BYTES = 512 * 2**20
"""What `auto` leaves to everything else on the machine."""
_FORMS = "'14GiB', '512MiB', '80%' or 'auto'"


@dataclass(frozen=True)
class Memory:
    """What a device has, and what of it is free now."""

    total_bytes: int
    free_bytes: int


def parse_bytes(text: str) -> int:
    """Parse an amount with its unit, such as '14GiB'."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)", text.strip())
    if match is None:
        raise ConfigError(f"budget: expected {_FORMS}, got {text!r}. Write a number and a unit.")
    amount = int(float(match[1]) * UNITS[match[2]])
    if amount <= 0:
        raise ConfigError(f"budget: expected more than 0 bytes, got {text!r}. Raise it.")
    return amount


def resolve_budget(text: str, device: str) -> int:
    """Turn '14GiB', '80%' (of the device's total) or 'auto' (free now, less a margin) into bytes."""
    text = text.strip()
    if text == "auto":
        return max(device_memory(device).free_bytes - MARGIN_BYTES, MARGIN_BYTES)
    if text.endswith("%"):
        share = re.fullmatch(r"\d+(\.\d+)?", text[:-1].strip())
        if share is None or not 0 < float(share[0]) <= 100:
            raise ConfigError(f"budget: expected a share above 0 % and up to 100 %, got {text!r}. Or write {_FORMS}.")
        return int(device_memory(device).total_bytes * float(share[0]) / 100)
    return parse_bytes(text)


def resolve_in_child(payload: dict[str, str], _emit: object) -> int:
    """Resolve a budget in a child process, so that the parent never touches the device."""
    return resolve_budget(payload["budget"], payload["device"])


def device_memory(device: str) -> Memory:
    """Measure a device. A CPU's memory is the smaller of the machine's and the container's limit."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    machine = _meminfo()
    limit, used = _cgroup()
    return Memory(min(machine.total_bytes, limit), min(machine.free_bytes, limit - used))


def check_device(device: str) -> str:
    """Return the device if it is here; raise ConfigError otherwise (never fall back to another one)."""
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: expected 'cpu', 'cuda' or 'cuda:n', got {device!r}.") from error
    if parsed.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected 'cpu', 'cuda' or 'cuda:n', got {device!r}. Other kinds are not supported.")
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


def _meminfo() -> Memory:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return Memory(values["MemTotal"], values["MemAvailable"])


def _cgroup(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[int, int]:
    """Find the tightest memory limit of this process's groups (v1 and v2), and what is used under it."""
    folders = [root, root / "memory"]
    for line in own.read_text(encoding="utf-8").splitlines():
        _, controllers, name = line.split(":", 2)
        base = root if not controllers else root / "memory"
        if not controllers or "memory" in controllers.split(","):
            path = Path(name.lstrip("/"))
            folders += [base / part for part in (path, *path.parents)]
    found = [(2**62, 0)]
    for folder in dict.fromkeys(folders):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(OSError, ValueError):  # absent, or the word "max": no limit here
                limit = int((folder / limit_name).read_text(encoding="ascii"))
                used = int((folder / used_name).read_text(encoding="ascii"))
                found.append((limit, max(used - _reclaimable(folder), 0)))
    return min(found)


def _reclaimable(folder: Path) -> int:
    """Read how much of a group's usage is file cache that the kernel gives back before it kills (v2, v1)."""
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = dict(line.split(" ", 1) for line in lines)
        return int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
    return 0
