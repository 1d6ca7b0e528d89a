"""The parent's side of planning: which ladders are climbed in children, and which plan is confirmed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from memfit.errors import ChildError, DoesNotFitError
from memfit.memory.plan import Candidate, Plan, Probe
from memfit.memory.probe import HEADROOM, evaluation_batch_size
from memfit.memory.search import candidates, confirm, memory_bound, ranking
from memfit.process import run_child

MIB = 2**20


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
    min_micro_batch_size: int = 1
    deadline_seconds: float = 300.0
    known: Sequence[Probe] = ()
    """What ladders of the same program said for another global batch; those are not climbed again."""
    log: Path


OnProbe = Callable[[Probe], None]


def plan_stage(request: PlanRequest, on_probe: OnProbe = lambda _probe: None) -> Plan:
    """Find the fastest layout that fits, exact levers first, and confirm it in a fresh child.

    Raises: DoesNotFitError with the smallest layout that was tried; ChildError when a probe fails for another reason.
    """
    tried: list[Probe] = []
    found = _climb(request, tried, on_probe)
    for probe in confirm(found, lambda ladder, verifying: _run(request, ladder, verifying, on_probe)):
        tried.append(probe)
        if probe.outcome == "fits":
            return _plan(request, probe, tried)
    raise DoesNotFitError(_does_not_fit(request, tried))


def _climb(request: PlanRequest, tried: list[Probe], on_probe: OnProbe) -> list[Probe]:
    """Probe every allowed precision; recompute activations only where memory was what stopped the climb."""
    found: list[Probe] = []
    for precision in request.precisions:
        for checkpointing in request.checkpointings:
            ladder = candidates(
                request.global_batch_size,
                precision=precision,
                checkpointing=checkpointing,
                variant=request.variant,
                min_micro_batch_size=request.min_micro_batch_size,
            )
            probes = _known(request, ladder) or _run(request, ladder, False, on_probe)
            tried.extend(probes)
            found.extend(probes)
            if not memory_bound(probes, ladder, int(request.budget_bytes * (1 - HEADROOM))):
                break
    return found


def _known(request: PlanRequest, ladder: Sequence[Candidate]) -> list[Probe]:
    """Take over an earlier climb of this ladder: only the number of accumulation steps differs.

    A climb over other rungs says too little of this ladder: none of it is taken.
    """
    first = ladder[0]
    climbed = {
        probe.micro_batch_size: probe
        for probe in request.known
        if not probe.verifying
        and (probe.precision, probe.checkpointing, probe.variant)
        == (first.precision, first.checkpointing, first.variant)
    }
    rungs = [candidate for candidate in ladder if candidate.micro_batch_size <= max(climbed, default=0)]
    if not all(candidate.micro_batch_size in climbed for candidate in rungs):
        return []
    return [climbed[candidate.micro_batch_size].at(candidate, request.global_batch_size) for candidate in rungs]


def _run(request: PlanRequest, ladder: Sequence[Candidate], verifying: bool, on_probe: OnProbe) -> list[Probe]:
    """Climb one ladder in one child. A child that dies is a measurement of the candidate it was at."""
    probes: list[Probe] = []
    at = [ladder[0]]

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "trying":
            at[0] = Candidate(**event["candidate"])
        elif event["event"] == "probe":
            probes.append(replace(Probe(**event["probe"]), verifying=verifying))
            on_probe(probes[-1])

    payload = {
        "program": request.program,
        "candidates": [asdict(candidate) for candidate in ladder],
        "budget_bytes": request.budget_bytes,
        "global_batch_size": request.global_batch_size,
        "device": request.device,
        "clip": request.clip,
    }
    outcome = run_child(
        "memfit.memory.probe:run",
        payload,
        log=request.log,
        on_event=listen,
        deadline_seconds=request.deadline_seconds,
        grace_seconds=0.0,  # a probe has nothing to save
    )
    if outcome.status in ("oom", "timeout"):
        probes.append(
            Probe(
                **asdict(at[0]),
                outcome=outcome.status,
                phase=outcome.phase,
                message=outcome.message,
                verifying=verifying,
            )
        )
        on_probe(probes[-1])
    elif outcome.status != "ok":
        outcome.unwrap(f"the probe of stage {request.stage!r}")
        raise ChildError(f"the probe of stage {request.stage!r} stopped early: {outcome.message}")
    return probes


def _plan(request: PlanRequest, chosen: Probe, tried: Sequence[Probe]) -> Plan:
    candidate = Candidate(
        chosen.micro_batch_size, chosen.accumulation_steps, chosen.precision, chosen.checkpointing, chosen.variant
    )
    return Plan(
        stage=request.stage,
        device=request.device,
        budget_bytes=request.budget_bytes,
        global_batch_size=request.global_batch_size,
        **asdict(candidate),
        measured_peak_bytes=chosen.peak_bytes,
        eval_batch_size=evaluation_batch_size(candidate, request.global_batch_size),
        step_seconds=chosen.step_seconds,
        samples_per_second=chosen.samples_per_second,
        verified=True,
        levers=_levers(request, candidate),
        probes=tuple(tried),
        fingerprint=request.fingerprint,
        reason=_reason(request, chosen, tried),
    )


def _levers(request: PlanRequest, chosen: Candidate) -> tuple[dict[str, Any], ...]:
    used = [
        ("accumulation_steps", "exact", chosen.accumulation_steps, 1),
        ("checkpointing", "exact", chosen.checkpointing, "none"),
        ("precision", "numerics", chosen.precision, "fp32"),
        ("variant", "lossy", chosen.variant, request.wanted_variant),
    ]
    return tuple(
        {"name": name, "class": kind, "value": value} for name, kind, value, default in used if value != default
    )


def _reason(request: PlanRequest, chosen: Probe, tried: Sequence[Probe]) -> str:
    fitting = len(ranking([probe for probe in tried if not probe.verifying]))
    share = (chosen.peak_bytes or 0) / request.budget_bytes
    return (
        f"Fastest of {fitting} layouts that fit, {len([p for p in tried if not p.verifying])} tried: "
        f"{chosen.samples_per_second:.1f} samples/s at {(chosen.peak_bytes or 0) / MIB:.0f} MiB, "
        f"{share:.0%} of the budget; confirmed in a fresh process with evaluation and a checkpoint write."
    )


def _does_not_fit(request: PlanRequest, tried: Iterable[Probe]) -> str:
    last = list(tried)[-1]
    phase = f" (in phase {last.phase!r})" if last.phase else ""
    peak = f"reached {last.peak_bytes / MIB:.0f} MiB" if last.peak_bytes else f"ended with {last.outcome}{phase}"
    return (
        f"stage {request.stage!r}: nothing that the config allows fits into {request.budget_bytes / MIB:.0f} MiB "
        f"(of which {HEADROOM:.0%} stays free). The last try, micro_batch_size {last.micro_batch_size}, "
        f"{last.precision}, checkpointing {last.checkpointing}, variant {last.variant}, {peak}. "
        "Raise the budget, or allow more: plan.precisions, plan.checkpointing, plan.variants."
    )
