"""What is asked of the planner for one stage, and what is known of it so far."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memfit.memory.plan import Probe

OnProbe = Callable[[Probe], None]


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is to be planned for one stage."""

    stage: str
    program: dict[str, Any]
    """{"factory": "module:function", "arguments": {...}}: what a child builds the TrainingProgram with."""
    global_batch_size: int
    budget_bytes: int
    device: str
    precisions: Sequence[str]
    checkpointings: Sequence[str]
    variant: str
    wanted_variant: str
    """What the config asks for; planning another one is a lossy lever."""
    fingerprint: str
    clip: float | None = None
    num_devices: int = 1
    """How many devices share the global batch; the plan is that of one of them."""
    min_micro_batch_size: int = 1
    deadline_seconds: float = 300.0
    seq_lens: Sequence[int | None] = (None,)
    """Sequence lengths that are allowed, in this order; all but the first are lossy. None: the program's own."""
    estimate_only: bool = False
    """Predict, and run nothing."""
    user_devices: Sequence[Mapping[str, Any]] = ()
    """Settings of cards that are not in the catalog."""
    check: bool = False
    """Check the loss first: for programs that nobody has tested."""
    known: Sequence[Probe] = ()
    """What ladders of the same program said for another global batch; those are not climbed again."""
    log: Path

    @property
    def device_batch_size(self) -> int:
        """The largest share of the global batch that one device has."""
        return -(-self.global_batch_size // self.num_devices)

    def payload(self) -> dict[str, Any]:
        """Return what every child of this request is told."""
        return {
            "program": self.program,
            "budget_bytes": self.budget_bytes,
            "global_batch_size": self.global_batch_size,
            "device_batch_size": self.device_batch_size,
            "device": self.device,
            "user_devices": [dict(device) for device in self.user_devices],
            "clip": self.clip,
        }


@dataclass
class Search:
    """What is known so far of one request."""

    request: PlanRequest
    on_probe: OnProbe = lambda _probe: None
    tried: list[Probe] = field(default_factory=list)
    relief: list[dict[str, Any]] = field(default_factory=list)
    """What a child found would make the smallest layout fit; empty where none was asked."""
    batch_norm: bool = False
    """Whether the model has layers with batch statistics, as far as a child has built it."""

    @property
    def cuts_matter(self) -> bool:
        """Whether the result depends on how a batch is cut: so it was found, or a smallest micro-batch declared."""
        return self.batch_norm or self.request.min_micro_batch_size > 1
