"""The memory and the cores of this machine, as far as this process may use them. Reads /proc and /sys alone."""

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

NO_LIMIT = 2**62
"""What stands for the absence of a memory limit, in bytes."""


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
    """Find the tightest memory limit of this process's groups (v1 and v2), and what is used under it, in bytes."""
    folders = [root, root / "memory"]
    for line in own.read_text(encoding="utf-8").splitlines():
        _, controllers, name = line.split(":", 2)
        base = root if not controllers else root / "memory"
        if not controllers or "memory" in controllers.split(","):
            path = Path(name.lstrip("/"))
            folders += [base / part for part in (path, *path.parents)]
    found = [(NO_LIMIT, 0)]
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
