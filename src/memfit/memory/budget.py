"""Memory budgets: what a user's words come to on a device, and what is free there.

For a CPU torch is not needed: whoever starts children does not import it.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

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
    if device != "cpu":
        import torch

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
    if device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def check_device(device: str) -> str:
    """Return the device if it is here; raise ConfigError otherwise (never fall back to another one)."""
    if device == "cpu":
        return device
    import torch

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
