"""Predict what a step takes on a device that need not be here: simulate, replay, sum up."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from memfit.memory.allocator import CachingAllocator, SimulatedOutOfMemoryError, replay
from memfit.memory.devices import Device, find_device
from memfit.memory.heap import resident_peaks
from memfit.memory.simulate import Step, simulate
from memfit.memory.trace import Trace
from memfit.step import TrainingProgram

CATEGORIES = (
    "parameters", "buffers", "gradients", "optimizer_state", "batch", "activations", "temporaries", "workspaces"
)  # fmt: skip
"""What holds memory, in the order in which it is drawn."""
UPPER_MARGIN = 0.077
"""How far above its estimate a measured peak may lie in 19 of 20 cases."""
_TIMELINE_POINTS = 160


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Predicted memory of one layout of a step. All figures are bytes."""

    device: str
    peak_bytes: int
    """Allocator segments, without the base context: how far NVML's "used" rises over a run."""
    upper_bytes: int
    """An upper bound of the same; plans are fitted with it."""
    process_bytes: int
    """`peak_bytes` and the context (on a CPU: the import baseline): what nvidia-smi or top shows."""
    live_bytes: int
    """Most bytes that tensors hold at once, before any rounding."""
    breakdown: Mapping[str, int]
    """What the peak consists of; sums to `peak_bytes`."""
    timeline: tuple[tuple[str, Mapping[str, int]], ...]
    """(phase, live bytes by category) over the last step, for the plot."""
    fits: bool
    """Whether the device's memory is enough, the allocator's release of cached segments included."""
    notes: tuple[str, ...] = ()
    """What had to be assumed."""
    culprits: tuple[tuple[str, int], ...] = ()
    """(module, bytes) that hold most at the peak."""


def estimate(
    program: TrainingProgram,
    *,
    micro_batch_size: int,
    accumulation_steps: int = 1,
    precision: str = "fp32",
    checkpointing: str = "none",
    seq_len: int | None = None,
    variant: str | None = None,
    phase: str = "train",
    device: str | Device = "cpu",
    step: Step | None = None,
    resumed: bool | None = None,
    chunked_loss: bool = False,
    foreach: bool = True,
) -> Estimate:
    """Estimate the memory of a step, or of an evaluation batch (phase "evaluate"), on a device.

    `step(model, optimizer, batch)` is a user's own loop body, in place of memfit's step; it starts without optimizer
    state unless `resumed`. Raises: ConfigError for an unknown device; CannotSimulateError where the program needs
    real values.
    """
    target = find_device(device) if isinstance(device, str) else device
    trace = simulate(
        program,
        target,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        precision=precision,
        checkpointing=checkpointing,
        seq_len=seq_len,
        variant=variant,
        phase=phase,
        step=step,
        resumed=step is None if resumed is None else resumed,
        num_steps=2 if step is None else 3,
        chunked_loss=chunked_loss,
        foreach=foreach,
    )
    return from_trace(trace, target)


def from_trace(trace: Trace, device: Device) -> Estimate:
    """Replay a trace through the device's allocator and sum up."""
    capacity = device.memory_bytes - device.context_bytes
    if device.kind == "cpu":
        trace = replace(trace, possible=set())  # what its kernels take is known
        peak, upper = resident_peaks(trace.events, trace.sizes())
        fits = peak <= capacity
    else:
        fits, peak = _segments(trace.events, trace.sizes(), capacity)
        upper = max(peak, _segments(trace.events, trace.sizes(upper=True), capacity)[1]) if trace.possible else peak
    peak_index, live = trace.peak()
    return Estimate(
        device=device.name,
        peak_bytes=peak,
        upper_bytes=int(upper * (1 + UPPER_MARGIN)),
        process_bytes=peak + device.context_bytes,
        live_bytes=live,
        breakdown={**live_by_category(trace, peak_index), "fragmentation": peak - live},
        timeline=timeline(trace),
        fits=fits,
        notes=tuple(trace.notes),
        culprits=culprits(trace, peak_index),
    )


def _segments(events: Sequence[int], sizes: Sequence[int], capacity: int) -> tuple[bool, int]:
    """Replay within the device's memory; where that fails, without a limit. Returns whether it fits, and the peak."""
    try:
        return True, replay(events, sizes, CachingAllocator(capacity=capacity)).peak_reserved
    except SimulatedOutOfMemoryError:
        return False, replay(events, sizes, CachingAllocator()).peak_reserved


def _alive(trace: Trace, index: int) -> set[int]:
    alive: set[int] = set()
    for event in trace.events[: index + 1]:
        if event >= 0:
            alive.add(event)
        else:
            alive.discard(~event)
    return alive


def live_by_category(trace: Trace, index: int) -> dict[str, int]:
    """Sum what lives after an event, by category."""
    held, sizes = Counter(dict.fromkeys(CATEGORIES, 0)), trace.sizes()
    for number in _alive(trace, index):
        held[trace.storages[number].category] += sizes[number]
    return dict(held)


def culprits(trace: Trace, index: int, count: int = 12) -> tuple[tuple[str, int], ...]:
    """List the modules whose storages hold most after an event."""
    held: Counter[str] = Counter()
    for number in _alive(trace, index):
        storage = trace.storages[number]
        held[f"{storage.module or 'model'} ({storage.category})"] += storage.num_bytes
    return tuple(held.most_common(count))


def timeline(trace: Trace) -> tuple[tuple[str, Mapping[str, int]], ...]:
    """Follow live bytes by category over the last step, at about 160 moments that keep the extremes."""
    begin, sizes = max((index for index, phase in trace.marks if phase == "begin"), default=0), trace.sizes()
    stride = max(1, (len(trace.events) - begin) // _TIMELINE_POINTS)
    phases = dict(trace.marks)
    held, points, phase = Counter(dict.fromkeys(CATEGORIES, 0)), [], ""
    highest: tuple[int, str, dict[str, int]] | None = None
    for index, event in enumerate(trace.events):
        number = event if event >= 0 else ~event
        held[trace.storages[number].category] += sizes[number] if event >= 0 else -sizes[number]
        phase = phases.get(index, phase)
        if index < begin:
            continue
        total = sum(held.values())
        if highest is None or total > highest[0]:
            highest = (total, phase, dict(held))
        if (index - begin) % stride == stride - 1 or index == len(trace.events) - 1:
            points.append((highest[1], highest[2]))
            highest = None
    return tuple(points)
