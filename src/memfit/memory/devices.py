"""The devices that a training can be planned for: a catalog of cards, the user's own ones, and what is here.

Importing this module imports no torch; only looking at a real card does.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from memfit.errors import ConfigError
from memfit.memory.device_settings import ATTENTION_KERNELS, PRECISIONS, read_settings
from memfit.memory.host import host_memory, num_cores, processor_title

MIB = 2**20
PATTERN = r"^[A-Za-z][A-Za-z0-9 _:.-]{1,63}$"
"""What a device's name looks like; whether there is such a device, `find_device` knows."""
_HERE = r"cpu|cuda(:[0-9]+)?"
_UNSUPPORTED = r"(mps|rocm|hip|xpu|tpu|xla|npu|hpu)(:[0-9]+)?"


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a plan needs to know of a device, be it here or not."""

    name: str
    """What users type: t4, rtx-3060, cpu, cuda:0."""
    title: str
    """What people call it: NVIDIA T4."""
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    """What the driver reports as total to CUDA; newer driver branches report 0.1 to 0.2 GiB less on some cards."""
    compute_capability: tuple[int, int] | None
    """(8, 6) for sm_86; None for a CPU."""
    precisions: tuple[str, ...]
    """Of fp32, bf16 and fp16, those that the hardware has: bf16 from sm_80 on, where torch would emulate it before."""
    attention_kernels: tuple[str, ...]
    """Kernels of scaled_dot_product_attention, by preference: flash (sm_80 and newer), efficient (sm_50), math."""
    context_bytes: int
    """What a process takes before its first tensor: the CUDA context, as nvidia-smi shows it; on a CPU the import
    baseline. Approximate: it depends on driver and CUDA version, and grows with the multiprocessors."""
    context_source: str
    """Where `context_bytes` comes from."""
    multiprocessors: int | None = None
    """Streaming multiprocessors; on a CPU the cores that this process may use; None where not known."""
    tflops: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Peak TFLOP/s by precision, dense, without sparsity; empty where not known. fp32 is without TF32, which torch uses
    for convolutions from sm_80 on, and for matrix products only if asked to; bf16 and fp16 accumulate in fp32."""
    bandwidth_gbs: float | None = None
    """Peak memory bandwidth in 10**9 bytes/s; None where not known."""
    notes: str = ""
    """What else a user should know."""

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> "Device":
        """Make a card from a user's settings.

        `name`, `memory` (bytes or '24GiB') and `compute_capability` ('8.6') are required; `title`, `multiprocessors`,
        `context`, `precisions`, `attention_kernels`, `tflops`, `bandwidth_gbs` and `notes` are optional: what is left
        out follows from the compute capability, or is guessed on the high side (`context`). Raises: ConfigError for an
        unknown or a missing key and for a bad value.
        """
        given = read_settings(settings)
        if "context_bytes" in given:
            given["context_source"] = "the config"
        return _card(**{"title": given["name"], **given})


def _card(*, name: str, title: str, memory_bytes: int, compute_capability: tuple[int, int], **further: Any) -> Device:
    """Fill in what follows from the compute capability and the number of multiprocessors.

    Sources: CUDA C++ Programming Guide, features by compute capability; torch's
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    modern = compute_capability >= (8, 0)
    multiprocessors = further.get("multiprocessors")
    derived = {
        "precisions": PRECISIONS if modern else ("fp32", "fp16"),
        "attention_kernels": ATTENTION_KERNELS if modern else ("efficient", "math"),
        "context_bytes": (32 + 4 * multiprocessors if multiprocessors else 512) * MIB,
        "context_source": "guess: 4 MiB a multiprocessor and 32 MiB, or 512 MiB; most cards of the catalog have less",
    }
    return Device(
        name=name,
        title=title,
        kind="cuda",
        memory_bytes=memory_bytes,
        compute_capability=compute_capability,
        **{**derived, **further},
    )


def _listed(
    name: str,
    title: str,
    memory_bytes: int,
    capability: tuple[int, int],
    multiprocessors: int,
    rates: tuple[float, float],
    bandwidth_gbs: float,
    context: tuple[int, str],
    notes: str = "",
) -> Device:
    half = ("bf16", "fp16") if capability >= (8, 0) else ("fp16",)
    return _card(
        name=name,
        title=title,
        memory_bytes=memory_bytes,
        compute_capability=capability,
        multiprocessors=multiprocessors,
        tflops={"fp32": rates[0], **dict.fromkeys(half, rates[1])},
        bandwidth_gbs=bandwidth_gbs,
        context_bytes=context[0] * MIB,
        context_source=context[1],
        notes=notes,
    )


_SXM = "Rates of the SXM module; the PCIe card is slower."
_OLD = "Needs a torch build for CUDA 12.6: builds for CUDA 13 begin at sm_75."
_OOM = "lowest in-use less reserved bytes of published torch OOM reports of this card; about 10 MiB off"
_TITAN_V = "bare context of a Titan V, the same chip (pytorch issue 28394); OOM reports of V100 stay below 390 MiB"
_A100 = "in use on an otherwise empty A100 40GB in a published OOM report; about 15 MiB off"
_H100 = "another process's bare context in a published OOM report of an H100; an H200 loading weights had 525 MiB"
_GUESS = "guess: 3.3 MiB a multiprocessor, between RTX 3060's 3.7 and RTX 4090's 3.0"

# Rates, bandwidth and multiprocessors: NVIDIA's datasheets of T4, P100 (PCIe), V100 (SXM2), A10, A100 (SXM4), L4, H100
# and H200 (SXM), dense where a sheet shows sparse ones; the whitepapers of GA102 (RTX 3090) and AD102 (RTX 4090); for
# RTX 3060 and 4060 multiprocessors x 512 FMA x boost clock, halved for fp32 accumulation as in those whitepapers.
# Memory: RTX 3060, 4060 and A100-40 as measured in xMem's published runs; the others as deviceQuery or torch print them
# in public logs, to the MiB for A10 and H200.
CATALOG: tuple[Device, ...] = (
    # name, title, bytes, capability, multiprocessors, (fp32, half) TFLOP/s, GB/s, (context in MiB, source), notes
    _listed("t4", "NVIDIA T4", 15828320256, (7, 5), 40, (8.1, 65.0), 320.0, (115, _OOM),
          "Newer drivers report 14.56 GiB in place of 14.74."),
    _listed("p100", "NVIDIA P100 16GB", 17071734784, (6, 0), 56, (9.3, 18.7), 732.0,
          (300, "guess: below the 317 MiB, NCCL included, of a published OOM report"), f"No tensor cores. {_OLD}"),
    _listed("v100-16", "NVIDIA V100 16GB", 16945512448, (7, 0), 80, (15.7, 125.0), 900.0, (320, _TITAN_V), _OLD),
    _listed("v100-32", "NVIDIA V100 32GB", 34089730048, (7, 0), 80, (15.7, 125.0), 900.0, (320, _TITAN_V), _OLD),
    _listed("rtx-3060", "NVIDIA GeForce RTX 3060 12GB", 12622168064, (8, 6), 28, (12.7, 25.5), 360.0,
          (104, _OOM), "Newer drivers report 11.63 GiB in place of 11.76."),
    _listed("rtx-3090", "NVIDIA GeForce RTX 3090", 25438126080, (8, 6), 82, (35.6, 71.0), 936.0, (256, _OOM)),
    _listed("rtx-4060", "NVIDIA GeForce RTX 4060", 8318222336, (8, 9), 24, (15.1, 30.2), 272.0, (80, _GUESS)),
    _listed("rtx-4090", "NVIDIA GeForce RTX 4090", 25386352640, (8, 9), 128, (82.6, 165.2), 1008.0, (384, _OOM)),
    _listed("l4", "NVIDIA L4", 23659151360, (8, 9), 58, (30.3, 121.0), 300.0, (208, _OOM)),
    _listed("a10", "NVIDIA A10", 22589 * MIB, (8, 6), 72, (31.2, 125.0), 600.0, (240, _GUESS)),
    _listed("a100-40", "NVIDIA A100 40GB", 42474471424, (8, 0), 108, (19.5, 312.0), 1555.0, (480, _A100), _SXM),
    _listed("a100-80", "NVIDIA A100 80GB", 84987740160, (8, 0), 108, (19.5, 312.0), 2039.0, (480, _A100), _SXM),
    _listed("h100", "NVIDIA H100 80GB", 85029158912, (9, 0), 132, (67.0, 989.0), 3350.0, (520, _H100), _SXM),
    _listed("h200", "NVIDIA H200 141GB", 143156 * MIB, (9, 0), 132, (67.0, 989.0), 4800.0, (520, _H100), _SXM),
)  # fmt: skip
"""Cards to plan for, none of which need be here."""


def is_here(device: str) -> bool:
    """Tell whether the text names a device of this machine (cpu, cuda, cuda:n), as opposed to one of the catalog."""
    return re.fullmatch(_HERE, device.strip().lower()) is not None


def find_device(text: str, user_devices: Sequence[Device] = ()) -> Device:
    """Find a device by what a user writes: 't4', 'RTX 3060', 'cpu', 'cuda:1'. Of equal names the user's own wins.

    For 'cuda' torch is imported and the card's properties are read. Raises: ConfigError for an unknown device, with the
    nearest valid one; for a kind that memfit does not plan for; and for a CUDA device that is not here.
    """
    written = text.strip().lower()
    if is_here(written):
        return _cpu() if written == "cpu" else _real_card(written)
    if re.fullmatch(_UNSUPPORTED, written):
        raise ConfigError(
            f"device: expected a CUDA device or 'cpu', got {text!r:.80}: memfit plans for CUDA and CPU only. Use "
            f"cpu, cuda where there is an NVIDIA card, or plan for one of the catalog: {_names(CATALOG)}."
        )
    devices = (*CATALOG, *user_devices)  # the later wins, and a name wins over a title
    known = {_key(device.title): device for device in devices} | {_key(device.name): device for device in devices}
    if (found := known.get(_key(written))) is not None:
        return found
    longer = [key for key in known if key.startswith(_key(written) or " ")]
    near = longer or difflib.get_close_matches(_key(written), known, n=1, cutoff=0.0)
    raise ConfigError(
        f"device: {text!r:.80} is not known; the nearest valid one is {known[near[0]].name!r}. Write cpu, cuda, cuda:n "
        f"or one of {_names((*user_devices, *CATALOG))}; or describe the card in the config."
    )


def read_devices(settings: Iterable[Mapping[str, Any]]) -> list[Device]:
    """Make cards from a user's settings, one after the other."""
    return [Device.from_mapping(each) for each in settings]


def _names(devices: Iterable[Device]) -> str:
    return ", ".join(dict.fromkeys(device.name for device in devices))


def _key(text: str) -> str:
    """Reduce a name to what tells cards apart: no maker, no blanks or dashes, no 'GB' behind a number."""
    return re.sub(r"nvidia|tesla|geforce|(?<=[0-9])\s?gi?b\b|[^a-z0-9]", "", text.lower())


def _cpu() -> Device:
    return Device(
        name="cpu",
        title=processor_title(),
        kind="cpu",
        memory_bytes=host_memory().total_bytes,
        compute_capability=None,
        precisions=PRECISIONS,
        attention_kernels=("flash", "math"),
        context_bytes=224 * MIB,
        context_source="resident bytes after importing a CPU build of torch 2.13; up to 350 MiB with other builds",
        multiprocessors=num_cores(),
    )


def _real_card(device: str) -> Device:
    import torch  # seconds, and only needed here

    from memfit.memory.budget import check_device

    card = torch.cuda.get_device_properties(check_device(device))
    return describe_card(device, card.name, card.total_memory, (card.major, card.minor), card.multi_processor_count)


def describe_card(
    device: str, title: str, memory_bytes: int, capability: tuple[int, int], multiprocessors: int
) -> Device:
    """Describe a card that is here by what its driver says; rates and context are those of the catalog's like."""
    for like in CATALOG:
        same_chip = (like.compute_capability, like.multiprocessors) == (capability, multiprocessors)
        if same_chip and abs(like.memory_bytes / memory_bytes - 1) < 0.05:
            return replace(like, name=device, title=title, memory_bytes=memory_bytes)
    return _card(
        name=device,
        title=title,
        memory_bytes=memory_bytes,
        compute_capability=capability,
        multiprocessors=multiprocessors,
    )
