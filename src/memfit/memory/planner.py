"""The parent's side of planning: which ladders are climbed in children, and which plan is confirmed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from memfit.errors import ChildError, ConfigError, DoesNotFitError
from memfit.memory.devices import find_device, is_here, read_devices
from memfit.memory.plan import Candidate, Plan, Probe
from memfit.memory.probe import HEADROOM, evaluation_batch_size
from memfit.memory.search import candidates, confirm, memory_bound, ranking, worth_recomputing
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


OnProbe = Callable[[Probe], None]
Timeline = dict[str, list[Any]]
Found = tuple[Probe, Timeline]


def plan_stage(request: PlanRequest, on_probe: OnProbe = lambda _probe: None) -> Plan:
    """Find the fastest layout that fits, exact levers first, and confirm it in a fresh child.

    For a device that is not here, or with `estimate_only`, nothing is run: the plan is predicted and not verified.
    Raises: DoesNotFitError with what would fit; ChildError when a probe fails for another reason.
    """
    tried: list[Probe] = []
    for seq_len in request.seq_lens:
        find = _found_by_forecast if request.estimate_only or not is_here(request.device) else _found_by_probes
        found = find(request, seq_len, tried, on_probe)
        if found is not None:
            return _plan(request, *found, tried)
    raise DoesNotFitError(_does_not_fit(request, tried))


def _found_by_probes(request: PlanRequest, seq_len: int | None, tried: list[Probe], on_probe: OnProbe) -> Found | None:
    found = _climb(request, seq_len, tried, on_probe)
    timelines: list[Timeline] = []

    def measure(candidate: Candidate) -> Probe:
        ran = _run(request, [candidate], True, on_probe)
        timelines.append(ran.timeline)
        return ran.probes[-1]

    for probe in confirm(found, measure):
        tried.append(probe)
        if probe.outcome == "fits":
            return probe, timelines[-1]
    return None


def _found_by_forecast(
    request: PlanRequest, seq_len: int | None, tried: list[Probe], on_probe: OnProbe
) -> Found | None:
    """Rank predictions, in a child: simulating changes torch for the whole process."""

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "probe":
            tried.append(Probe(**event["probe"]))
            on_probe(tried[-1])

    device = find_device(request.device, read_devices(request.user_devices))
    precisions = [name for name in request.precisions if name in device.precisions]
    ladders = [
        [asdict(candidate) for candidate in _ladder(request, precision, checkpointing, seq_len)]
        for precision in precisions
        for checkpointing in request.checkpointings
    ]
    if not precisions:
        raise ConfigError(
            f"precisions: expected one that {request.device} has, of {list(device.precisions)}, "
            f"got {list(request.precisions)}. Allow another in plan.precisions."
        )
    known = [asdict(probe) for probe in request.known if not probe.verifying]
    payload = {**_payload(request), "ladders": ladders, "known": known}
    outcome = run_child(
        "memfit.memory.probe:forecast",
        payload,
        log=request.log,
        on_event=listen,
        deadline_seconds=request.deadline_seconds,
        grace_seconds=0.0,
    )
    timeline = outcome.unwrap(f"the forecast of stage {request.stage!r}")["timeline"]
    chosen = [probe for probe in tried if probe.verifying and probe.outcome == "predicted"]
    return (chosen[-1], timeline) if chosen else None


def _ladder(request: PlanRequest, precision: str, checkpointing: str, seq_len: int | None) -> list[Candidate]:
    return candidates(
        request.global_batch_size,
        precision=precision,
        checkpointing=checkpointing,
        variant=request.variant,
        seq_len=seq_len,
        min_micro_batch_size=request.min_micro_batch_size,
    )


def _climb(request: PlanRequest, seq_len: int | None, tried: list[Probe], on_probe: OnProbe) -> list[Probe]:
    """Probe every allowed precision; recompute activations only where memory was what stopped the climb."""
    found: list[Probe] = []
    for precision in request.precisions:
        bound = True
        for checkpointing in request.checkpointings:
            ladder, predicted = _ladder(request, precision, checkpointing, seq_len), list[int]()
            probes = _known(request, ladder)
            if not (probes or bound):
                break
            if not probes:
                ran = _run(request, ladder, False, on_probe)
                probes, predicted = ran.probes, ran.predicted
            tried.extend(probes)
            found.extend(probes)
            limit = int(request.budget_bytes * (1 - HEADROOM))
            bound = memory_bound(probes, ladder, predicted, limit) and worth_recomputing(probes, ladder)
    return found


def _known(request: PlanRequest, ladder: Sequence[Candidate]) -> list[Probe]:
    """Take over an earlier climb of this ladder: only the number of accumulation steps differs.

    A climb over other rungs says too little of this ladder: none of it is taken.
    """
    climbed = {
        probe.micro_batch_size: probe
        for probe in request.known
        if not probe.verifying and probe.candidate.ladder == ladder[0].ladder
    }
    rungs = [candidate for candidate in ladder if candidate.micro_batch_size <= max(climbed, default=0)]
    if not all(candidate.micro_batch_size in climbed for candidate in rungs):
        return []
    return [climbed[candidate.micro_batch_size].at(candidate, request.global_batch_size) for candidate in rungs]


def _payload(request: PlanRequest) -> dict[str, Any]:
    return {
        "program": request.program,
        "budget_bytes": request.budget_bytes,
        "global_batch_size": request.global_batch_size,
        "device": request.device,
        "user_devices": [dict(device) for device in request.user_devices],
        "clip": request.clip,
    }


@dataclass
class Climb:
    """What a child found out of a ladder."""

    probes: list[Probe] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    """Bytes of every rung, by simulation; empty where the program cannot be simulated."""
    timeline: Timeline = field(default_factory=dict)


def _run(request: PlanRequest, ladder: Sequence[Candidate], verifying: bool, on_probe: OnProbe) -> Climb:
    """Climb one ladder in one child. A child that dies is a measurement of the candidate that it was at."""
    climb, at = Climb(), [ladder[0]]

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "predicted":
            climb.predicted = event["bytes"]
        elif event["event"] == "trying":
            at[0] = Candidate(**event["candidate"])
        elif event["event"] == "probe":
            climb.probes.append(replace(Probe(**event["probe"]), verifying=verifying))
            on_probe(climb.probes[-1])

    payload = {
        **_payload(request),
        "candidates": [asdict(candidate) for candidate in ladder],
        "verifying": verifying,
        "check": request.check and not verifying,
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
        died = Probe(**asdict(at[0]), outcome=outcome.status, phase=outcome.phase, message=outcome.message)
        climb.probes.append(replace(died, verifying=verifying))
        on_probe(climb.probes[-1])
    elif outcome.status != "ok":
        outcome.unwrap(f"the probe of stage {request.stage!r}")
        raise ChildError(f"the probe of stage {request.stage!r} stopped early: {outcome.message}")
    else:
        climb.timeline = outcome.value["timeline"]
    return climb


def _plan(request: PlanRequest, chosen: Probe, timeline: Timeline, tried: Sequence[Probe]) -> Plan:
    verified = chosen.outcome == "fits"
    return Plan(
        stage=request.stage,
        device=request.device,
        budget_bytes=request.budget_bytes,
        global_batch_size=request.global_batch_size,
        **asdict(chosen.candidate),
        predicted_peak_bytes=chosen.predicted_bytes,
        upper_peak_bytes=chosen.upper_bytes,
        measured_peak_bytes=chosen.peak_bytes,
        eval_batch_size=evaluation_batch_size(chosen.candidate, request.global_batch_size),
        step_seconds=chosen.step_seconds,
        samples_per_second=chosen.samples_per_second,
        verified=verified,
        levers=_levers(request, chosen.candidate),
        probes=tuple(tried),
        fingerprint=request.fingerprint,
        reason=_reason(request, chosen, tried),
        timeline=timeline,
    )


def _levers(request: PlanRequest, chosen: Candidate) -> tuple[dict[str, Any], ...]:
    used = [
        ("accumulation_steps", "exact", chosen.accumulation_steps, 1),
        ("checkpointing", "exact", chosen.checkpointing, "none"),
        ("precision", "numerics", chosen.precision, "fp32"),
        ("seq_len", "lossy", chosen.seq_len, request.seq_lens[0]),
        ("variant", "lossy", chosen.variant, request.wanted_variant),
    ]
    return tuple(
        {"name": name, "class": kind, "value": value} for name, kind, value, default in used if value != default
    )


def _reason(request: PlanRequest, chosen: Probe, tried: Sequence[Probe]) -> str:
    considered = [probe for probe in tried if not probe.verifying]
    fitting = len(ranking(considered))
    peak = chosen.peak_bytes or chosen.predicted_bytes or 0
    evidence = (
        f"{_share_of(peak, request.budget_bytes)}; confirmed in a fresh process with evaluation and a checkpoint write."
        if chosen.outcome == "fits"
        else f"{_share_of(peak, request.budget_bytes)}, at most {(chosen.upper_bytes or 0) / MIB:.0f} MiB; predicted, "
        f"nothing was run on {request.device}."
    )
    return (
        f"Fastest of {fitting} layouts that fit, {len(considered)} considered: "
        f"{chosen.samples_per_second or 0.0:.1f} samples/s at {evidence}"
    )


def _share_of(peak_bytes: int, budget_bytes: int) -> str:
    return f"{peak_bytes / MIB:.0f} MiB, {peak_bytes / budget_bytes:.0%} of the budget"


def _does_not_fit(request: PlanRequest, tried: Sequence[Probe]) -> str:
    """Name the smallest layout, what it needs beyond the budget, and the mildest change that is predicted to fit."""
    latest = {probe.candidate: probe for probe in tried}  # the exact figure, where there is a rough one before it
    failed = [probe for probe in reversed(latest.values()) if probe.outcome not in ("fits", "predicted")]
    smallest = min(failed, key=_mildness, default=tried[-1])
    limit = request.budget_bytes * (1 - HEADROOM)
    needs = smallest.peak_bytes or smallest.upper_bytes
    phase = f" (in phase {smallest.phase!r})" if smallest.phase else ""
    got = (
        f"needs {needs / MIB:.0f} MiB{phase}, {(needs - limit) / MIB:.0f} MiB too much"
        if needs and needs > limit
        else f"ended with {smallest.outcome}{phase}"
    )
    return (
        f"stage {request.stage!r}: nothing that the config allows fits into {request.budget_bytes / MIB:.0f} MiB "
        f"(of which {HEADROOM:.0%} stays free). The smallest that was tried, micro_batch_size "
        f"{smallest.micro_batch_size}, {smallest.precision}, checkpointing {smallest.checkpointing}, variant "
        f"{smallest.variant}, {got}. {_relief(request, smallest, limit)}"
    )


def _mildness(probe: Probe) -> tuple[int, int]:
    return probe.micro_batch_size, probe.peak_bytes or probe.predicted_bytes or 2**62


def _relief(request: PlanRequest, smallest: Probe, limit: float) -> str:
    payload = {**_payload(request), "candidate": asdict(smallest.candidate)}
    outcome = run_child(
        "memfit.memory.probe:relief", payload, log=request.log, deadline_seconds=60.0, grace_seconds=0.0
    )
    if outcome.status != "ok" or outcome.value[0]["upper_bytes"] <= limit:  # the estimate knows nothing of the cause
        return "Raise the budget, or allow more: plan.precisions, plan.checkpointing, plan.variants."
    asis, *changes = outcome.value
    enough = [change for change in changes if change["upper_bytes"] <= limit]
    budget = asis["upper_bytes"] / (1 - HEADROOM)
    more = (budget - request.budget_bytes) / MIB
    raised = f"raise the budget to {budget / MIB:.0f} MiB, {more:.0f} MiB more"
    if not enough:
        return f"By estimate no single change is enough: {raised}."
    return (
        f"By estimate {enough[0]['change']} would fit ({enough[0]['upper_bytes'] / MIB:.0f} MiB at most); or {raised}."
    )
