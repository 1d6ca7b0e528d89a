"""The memory and the cores of this machine, as far as this process may use them. Reads /proc and /sys alone."""

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from memfit.errors import DoesNotFitError

NO_LIMIT = 2**62
"""What stands for the absence of a memory limit, in bytes."""
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),  # beyond it a process is slowed down to a crawl
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Memory:
    """What a device has, and what of it is free now."""

    total_bytes: int
    free_bytes: int


def host_memory() -> Memory:
    """Measure the RAM that this process may use: the smaller of the machine's and the container's limit."""
    machine = machine_memory()
    limit, used = cgroup_memory()
    return Memory(min(machine.total_bytes, limit), min(machine.free_bytes, limit - used))


def machine_memory() -> Memory:
    """Measure the machine's RAM, whatever a container's limit is."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return Memory(values["MemTotal"], values["MemAvailable"])


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[int, int]:
    """Find the tightest memory limit of this process's groups, and what of it is taken, in bytes.

    v1, v2 and both at once, from the own group up to the root. A group above with less left counts as well: what its
    other groups hold is taken here too. Swap counts nowhere.
    """
    lines = own.read_text(encoding="utf-8").splitlines() if own.exists() else []
    folders = [root, root / "memory"]
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        path = Path(name.lstrip("/"))
        for base in (root / "memory",) if controllers else (root, root / "unified"):
            folders += [base / part for part in (path, *path.parents)]
    limit, free = NO_LIMIT, NO_LIMIT
    for folder in dict.fromkeys(folders):
        for limit_name, used_name in _LIMITS:
            with contextlib.suppress(OSError, ValueError):  # absent, or the word "max": no limit here
                allowed = int((folder / limit_name).read_text(encoding="ascii"))
                used = int((folder / used_name).read_text(encoding="ascii"))
                limit = min(limit, allowed)
                free = min(free, allowed - max(used - _reclaimable(folder), 0))
    return limit, limit - max(min(free, limit), 0)


def _reclaimable(folder: Path) -> int:
    """Read how much of a group's usage is file cache that the kernel gives back before it kills (v2, v1)."""
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = dict(line.split(" ", 1) for line in lines)
        return int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
    return 0


def check_host_memory(batch_bytes: int, *, what: str, prefetched: int = 0, pinned: int = 0) -> None:
    """Refuse a global batch that the host's free memory does not hold; swap does not count.

    batch_bytes: of one global batch on the host. prefetched: further batches that are made ahead. pinned: copies of
    a batch in page-locked memory. Raises: DoesNotFitError.
    """
    needed, memory = batch_bytes * (1 + prefetched + pinned), host_memory()
    if needed > memory.free_bytes:
        copies = f", {prefetched} made ahead and {pinned} pinned copies" if prefetched or pinned else ""
        raise DoesNotFitError(
            f"{what}: expected the host's free memory to hold a global batch{copies}, {needed / 2**20:.0f} MiB in all; "
            f"got {memory.free_bytes / 2**20:.0f} MiB free of {memory.total_bytes / 2**20:.0f} MiB. End what else runs "
            "here, raise the container's limit, or lower the global batch size."
        )


def oom_kills() -> int:
    """Count the processes that the kernel killed for want of memory since it started, on this machine."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def num_cores() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def processor_title(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor, or its architecture where the kernel gives no name."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return f"{platform.machine()} CPU"
