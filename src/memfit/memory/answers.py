"""What the planner says: a plan with its reasons, or why nothing fits and what would."""

from dataclasses import asdict
from typing import Any

from memfit.memory.plan import HEADROOM, Candidate, Plan, Probe, evaluation_batch_size
from memfit.memory.request import PlanRequest, Search
from memfit.memory.search import mildest, ranking
from memfit.process import run_child

MIB = 2**20
CHEAP_LEVERS = (("chunked_loss", False), ("foreach", True))
"""Exact levers that recompute nothing, with what they are unless they are used."""

_BATCH_NORM = (
    " The model has batch normalization, whose statistics are those of a micro-batch: declare min_micro_batch_size if "
    "they need more samples."
)


def answer(search: Search, chosen: Probe, timeline: dict[str, list[Any]]) -> Plan:
    """Write the chosen probe down as a plan, with everything that was tried and the reason."""
    request = search.request
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
        eval_batch_size=evaluation_batch_size(chosen.candidate, request.device_batch_size),
        num_devices=request.num_devices,
        step_seconds=chosen.step_seconds,
        samples_per_second=chosen.samples_per_second,
        verified=verified,
        levers=_levers(search, chosen.candidate),
        probes=tuple(search.tried),
        fingerprint=request.fingerprint,
        reason=_reason(search, chosen),
        timeline=timeline,
    )


def _levers(search: Search, chosen: Candidate) -> tuple[dict[str, Any], ...]:
    request = search.request
    used = [
        ("accumulation_steps", "numerics" if search.cuts_matter else "exact", chosen.accumulation_steps, 1),
        ("checkpointing", "exact", chosen.checkpointing, "none"),
        *((name, "exact", getattr(chosen, name), default) for name, default in CHEAP_LEVERS),
        ("precision", "numerics", chosen.precision, "fp32"),
        ("seq_len", "lossy", chosen.seq_len, request.seq_lens[0]),
        ("variant", "lossy", chosen.variant, request.wanted_variant),
    ]
    return tuple(
        {"name": name, "class": kind, "value": value} for name, kind, value, default in used if value != default
    )


def _reason(search: Search, chosen: Probe) -> str:
    request = search.request
    considered = [probe for probe in search.tried if not probe.verifying]
    fitting = len(ranking(considered))
    cut = search.batch_norm and chosen.accumulation_steps > 1
    peak = chosen.peak_bytes or chosen.predicted_bytes or 0
    evidence = (
        f"{_share_of(peak, request.budget_bytes)}; confirmed in a fresh process with evaluation and a checkpoint write."
        if chosen.outcome == "fits"
        else f"{_share_of(peak, request.budget_bytes)}, at most {(chosen.upper_bytes or 0) / MIB:.0f} MiB; predicted, "
        f"nothing was run on {request.device}."
    )
    first = "Fewest cuts, then fastest" if search.cuts_matter else "Fastest"
    return (
        f"{first} of {fitting} layouts that fit, {len(considered)} considered: "
        f"{chosen.samples_per_second or 0.0:.1f} samples/s at {evidence}{_BATCH_NORM * cut}"
    )


def _share_of(peak_bytes: int, budget_bytes: int) -> str:
    return f"{peak_bytes / MIB:.0f} MiB, {peak_bytes / budget_bytes:.0%} of the budget"


def does_not_fit(search: Search) -> str:
    """Name the smallest layout, what it needs beyond the budget, and the mildest change that is predicted to fit."""
    request = search.request
    latest = {
        probe.candidate: probe for probe in search.tried
    }  # the exact figure, where there is a rough one before it
    smallest = mildest(reversed(latest.values())) or search.tried[-1]
    limit = request.budget_bytes * (1 - HEADROOM)
    needs = smallest.peak_bytes or smallest.upper_bytes
    phase = f" (in phase {smallest.phase!r})" if smallest.phase else ""
    how = "" if smallest.peak_bytes else "by estimate "
    got = (
        f"{how}needs {needs / MIB:.0f} MiB{phase}, {(needs - limit) / MIB:.0f} MiB too much"
        if needs and needs > limit
        else f"ended with {smallest.outcome}{phase}"
    )
    return (
        f"stage {request.stage!r}: nothing that the config allows fits into {request.budget_bytes / MIB:.0f} MiB "
        f"(of which {HEADROOM:.0%} stays free). The smallest that was tried, micro_batch_size "
        f"{smallest.micro_batch_size}, {smallest.precision}, checkpointing {smallest.checkpointing}, variant "
        f"{smallest.variant}, {got}. {_relief(search, smallest, limit)}"
    )


def what_would_fit(request: PlanRequest, plan: Plan) -> str:
    """Advise on a plan that ran out of memory at every layout that training could change it to."""
    levers = [change for change in plan.in_flight if "micro_batch_size" in change]
    names = ("micro_batch_size", "accumulation_steps", "checkpointing")
    reached = {name: levers[-1][name] if levers else getattr(plan, name) for name in names}
    smallest = Probe(**reached, precision=plan.precision, variant=plan.variant, outcome="oom")
    return _relief(Search(request), smallest, request.budget_bytes * (1 - HEADROOM))


def _relief(search: Search, smallest: Probe, limit: float) -> str:
    request, found = search.request, search.relief
    if not found:
        payload = {**request.payload(), "probe": asdict(smallest)}
        target = "memfit.memory.outlook:relief_in_child"
        outcome = run_child(target, payload, log=request.log, deadline_seconds=60.0, grace_seconds=0.0)
        found = outcome.value if outcome.status == "ok" else []
    if not found or found[0]["upper_bytes"] <= limit:  # the estimate knows nothing of the cause
        return "Raise the budget, or allow more: plan.precisions, plan.checkpointing, plan.variants."
    asis, *changes = found
    enough = [change for change in changes if change["upper_bytes"] <= limit]
    budget = asis["upper_bytes"] / (1 - HEADROOM)
    more = (budget - request.budget_bytes) / MIB
    raised = f"raise the budget to {budget / MIB:.0f} MiB, {more:.0f} MiB more"
    if not enough:
        return f"By estimate no single change is enough: {raised}."
    return (
        f"By estimate {enough[0]['change']} would fit ({enough[0]['upper_bytes'] / MIB:.0f} MiB at most); or {raised}."
    )
