"""A Plan: how one stage's training fits into its budget, and the evidence."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from memfit.errors import RunStateError

MIB = 2**20
HEADROOM = 0.03
"""Share of the budget that a plan leaves free: a long run fragments a little more than a probe."""
EVALUATION_FACTOR = 4
"""Evaluation keeps no activations, so its batches may be this many micro-batches large."""


@dataclass(frozen=True)
class Candidate:
    """One way to lay out a step. The global batch is fixed; `micro_batch_size` is its largest part."""

    micro_batch_size: int
    accumulation_steps: int
    precision: str = "fp32"
    checkpointing: str = "none"
    variant: str | None = None
    seq_len: int | None = None
    chunked_loss: bool = False
    """Whether `memfit.linear_cross_entropy` works in chunks of rows."""
    foreach: bool = True
    """Whether the optimizer may update many tensors at once; its temporaries are then as large as all of them."""

    @property
    def ladder(self) -> tuple[Any, ...]:
        """What it shares with the candidates that differ in their micro-batch alone."""
        return self.precision, self.checkpointing, self.variant, self.seq_len, self.chunked_loss, self.foreach


def evaluation_batch_size(candidate: Candidate, global_batch_size: int) -> int:
    """Choose the batch that evaluation runs with, and that the probe measures."""
    return max(candidate.micro_batch_size, min(global_batch_size, EVALUATION_FACTOR * candidate.micro_batch_size))


@dataclass(frozen=True)
class Probe:
    """One candidate, really run under the enforced budget. Figures are None where nothing was measured."""

    micro_batch_size: int
    accumulation_steps: int
    precision: str
    checkpointing: str
    variant: str | None
    outcome: str
    """fits, over_budget, oom, timeout; not run: predicted (to fit), or over_budget without a measured peak."""
    peak_bytes: int | None = None
    step_seconds: float | None = None
    samples_per_second: float | None = None
    micro_seconds: float | None = None
    """Of one micro-step: forward and backward."""
    update_seconds: float | None = None
    """Of one update; a step takes accumulation_steps x micro_seconds + update_seconds."""
    phase: str | None = None
    """What the child was doing when it ended, where it did not fit."""
    verifying: bool = False
    """True for the fresh child that confirmed the chosen candidate."""
    message: str = ""
    seq_len: int | None = None
    chunked_loss: bool = False
    foreach: bool = True
    predicted_bytes: int | None = None
    """Peak of the process by simulation."""
    upper_bytes: int | None = None
    """Upper bound of the same."""

    @property
    def candidate(self) -> Candidate:
        """The layout that was run."""
        return Candidate(**{each.name: getattr(self, each.name) for each in fields(Candidate)})

    def at(self, candidate: Candidate, global_batch_size: int) -> "Probe":
        """Return what this probe says of a layout that differs in its accumulation steps alone."""
        if not self.micro_seconds or self.update_seconds is None:  # unknown, or zero: the device's rates are
            return replace(self, accumulation_steps=candidate.accumulation_steps)
        seconds = self.micro_seconds * candidate.accumulation_steps + self.update_seconds
        return replace(
            self,
            accumulation_steps=candidate.accumulation_steps,
            step_seconds=seconds,
            samples_per_second=global_batch_size / seconds,
        )


@dataclass(frozen=True)
class Plan:
    """How one stage fits. Bytes are process bytes: what the budget is compared with.

    `verified`: it was run under the enforced budget. Otherwise all figures are predictions, and there is none measured.
    """

    stage: str
    device: str
    budget_bytes: int
    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    precision: str
    checkpointing: str
    variant: str | None
    measured_peak_bytes: int | None
    eval_batch_size: int
    step_seconds: float | None
    samples_per_second: float | None
    verified: bool
    levers: tuple[dict[str, Any], ...]
    probes: tuple[Probe, ...]
    fingerprint: str
    reason: str
    num_devices: int = 1
    seq_len: int | None = None
    chunked_loss: bool = False
    foreach: bool = True
    predicted_peak_bytes: int | None = None
    upper_peak_bytes: int | None = None
    timeline: dict[str, list[Any]] = field(default_factory=dict)
    """Predicted live memory over one step: "phase" and, by category, MiB at each moment; empty if not simulated."""
    in_flight: tuple[dict[str, Any], ...] = ()
    """What training changed of the layout, in order: step, reason, phase, message, and the levers as they are since."""

    def explain(self) -> str:
        """Say in words what was chosen, why, and what else was considered."""
        held = "measured" if self.verified else "predicted, not run"
        peak = self.measured_peak_bytes if self.verified else self.predicted_peak_bytes
        lines = [
            f"{self.global_batch_size} samples in {self.accumulation_steps} micro-batches of at most "
            f"{self.micro_batch_size}, {self.precision}, checkpointing {self.checkpointing}"
            + (f", variant {self.variant}" if self.variant else "")
            + (f", seq_len {self.seq_len}" if self.seq_len else "")
            + (", loss in chunks" if self.chunked_loss else "")
            + ("" if self.foreach else ", tensors updated one by one")
            + f" on {self.device}: {(peak or 0) / MIB:,.0f} MiB of {self.budget_bytes / MIB:,.0f} MiB ({held}).",
            self.reason,
            *(f"Lever {lever['name']} = {lever['value']} ({lever['class']})." for lever in self.levers),
            *(f"In flight: {describe_change(change)}." for change in self.in_flight),
            "Considered:",
            *(f"  {describe(probe)}" for probe in self.probes),
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able document."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Plan":
        """Read a plan back; unknown or missing keys raise RunStateError."""
        known = {each.name for each in fields(cls)}
        if set(document) != known:
            odd = sorted(set(document) ^ known)
            raise RunStateError(f"plan: expected the keys of this memfit version, differing in {odd}. Plan again.")
        probes = tuple(Probe(**probe) for probe in document["probes"])
        lists = {name: tuple(document[name]) for name in ("levers", "in_flight")}
        return cls(**{**document, **lists, "probes": probes})


def describe_change(change: Mapping[str, Any]) -> str:
    """Write a change of the layout in flight as one line."""
    if change["reason"] == "grown":
        why = f"{change['message']}: the former size is tried once more"
    elif change["reason"] in ("allocator_retries", "budget_shrunk"):
        why = change["message"]
    else:
        why = f"memory ran out in {change['phase']}"
    where = f"step {change['step']}, {why}" if "step" in change else why
    if "eval_batch_size" in change:
        return f"{where}; evaluation goes on with batches of {change['eval_batch_size']}"
    return (
        f"{where}; goes on with {change['accumulation_steps']} micro-batches of at most "
        f"{change['micro_batch_size']}, checkpointing {change['checkpointing']}"
    )


def describe(probe: Probe) -> str:
    """Write a probe as one line: layout, outcome, bytes and speed."""
    peak = probe.peak_bytes or probe.predicted_bytes
    parts = [
        f"micro {probe.micro_batch_size} x {probe.accumulation_steps}, {probe.precision}, {probe.checkpointing}",
        *([f"seq_len {probe.seq_len}"] if probe.seq_len else []),
        *(["loss in chunks"] if probe.chunked_loss else []),
        *([] if probe.foreach else ["tensors updated one by one"]),
        ({"fits": "confirmed", "predicted": "chosen, predicted"} if probe.verifying else {}).get(
            probe.outcome, probe.outcome.replace("_", " ")
        ),
        *([f"{peak / MIB:,.0f} MiB"] if peak else []),
        *([f"{probe.samples_per_second:,.3g} samples/s"] if probe.samples_per_second else []),
        *([f"in phase {probe.phase!r}"] if probe.phase else []),
    ]
    return ", ".join(parts)
