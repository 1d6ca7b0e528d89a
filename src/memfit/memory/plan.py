"""A Plan: how one stage's training fits into its budget, and the evidence."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from memfit.errors import RunStateError


@dataclass(frozen=True)
class Candidate:
    """One way to lay out a step. The global batch is fixed; `micro_batch_size` is its largest part."""

    micro_batch_size: int
    accumulation_steps: int
    precision: str = "fp32"
    checkpointing: str = "none"
    variant: str | None = None


@dataclass(frozen=True)
class Probe:
    """One candidate, really run under the enforced budget. Figures are None where nothing was measured."""

    micro_batch_size: int
    accumulation_steps: int
    precision: str
    checkpointing: str
    variant: str | None
    outcome: str
    """fits, over_budget, oom, timeout or failed."""
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

    def at(self, candidate: Candidate, global_batch_size: int) -> "Probe":
        """Return what this probe says of a layout that differs in its accumulation steps alone."""
        if self.micro_seconds is None or self.update_seconds is None:
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
    """How one stage fits. Bytes are process bytes: what the budget is compared with."""

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
    predicted_peak_bytes: int | None = None
    upper_peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able document."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Plan":
        """Read a plan back; unknown or missing keys raise RunStateError."""
        known = {field.name for field in fields(cls)}
        if set(document) != known:
            odd = sorted(set(document) ^ known)
            raise RunStateError(f"plan: expected the keys of this memfit version, differing in {odd}. Plan again.")
        probes = tuple(Probe(**probe) for probe in document["probes"])
        return cls(**{**document, "probes": probes, "levers": tuple(document["levers"])})
