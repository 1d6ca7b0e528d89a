"""The parent's side of planning: which ladders are climbed in children, and which plan is confirmed."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from memfit.errors import ChildError, ConfigError, DoesNotFitError
from memfit.memory.answers import CHEAP_LEVERS, answer, does_not_fit
from memfit.memory.devices import is_here
from memfit.memory.plan import HEADROOM, Candidate, Plan, Probe
from memfit.memory.request import OnProbe, PlanRequest, Search
from memfit.memory.search import candidates, confirm, memory_bound, savings, worth_recomputing
from memfit.process import run_child
from memfit.template import preloaded

Timeline = dict[str, list[Any]]
Found = tuple[Probe, Timeline]


def planning(device: str) -> AbstractContextManager[None]:
    """Let the children of all plans that are made within the block share one import of torch.

    Optimizers import torch's compiler with their first step. A GPU's children import for themselves: see `preloaded`.
    """
    uses_gpu = device != "cpu" and is_here(device)
    return nullcontext() if uses_gpu else preloaded("torch._dynamo", "memfit.memory.probe")


def plan_stage(request: PlanRequest, on_probe: OnProbe = lambda _probe: None) -> Plan:
    """Find the fastest layout that fits, exact levers first, and confirm it in a fresh child.

    For a device that is not here, or with `estimate_only`, nothing is run: the plan is predicted and not verified.
    Raises: DoesNotFitError with what would fit; ChildError when a probe fails for another reason.
    """
    search = Search(request, on_probe)
    by_forecast = request.estimate_only or not is_here(request.device)
    with planning(request.device):
        for seq_len in request.seq_lens:
            found = _found_by_forecast(search, seq_len) if by_forecast else _found_by_probes(search, seq_len)
            if found is not None:
                return answer(search, *found)
        raise DoesNotFitError(does_not_fit(search))


def _found_by_probes(search: Search, seq_len: int | None) -> Found | None:
    found = _climb(search, seq_len)
    if found and all(probe.outcome == "unsupported" for probe in found):
        raise ConfigError(f"precisions: {found[-1].message}. Allow another in plan.precisions.")
    timelines: list[Timeline] = []

    def measure(candidate: Candidate) -> Probe:
        ran = _run(search, [candidate], True)
        timelines.append(ran.timeline)
        return ran.probes[-1]

    for probe in confirm(found, measure, fewest_cuts=search.cuts_matter):
        search.tried.append(probe)
        if probe.outcome == "fits":
            return probe, timelines[-1]
    return None


def _no_precision(request: PlanRequest, has: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"precisions: expected one that {request.device} has, of {list(has)}, got {list(request.precisions)}. "
        "Allow another in plan.precisions."
    )


def _found_by_forecast(search: Search, seq_len: int | None) -> Found | None:
    """Rank predictions, in a child: simulating changes torch for the whole process."""
    request, tried = search.request, search.tried

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "probe":
            tried.append(Probe(**event["probe"]))
            search.on_probe(tried[-1])

    first = {"checkpointing": request.checkpointings[0]}
    ladders = [
        [asdict(each) for each in _ladder(request, precision, seq_len, first)] for precision in request.precisions
    ]
    known = [asdict(probe) for probe in request.known if not probe.verifying]
    payload = {
        **request.payload(),
        "ladders": ladders,
        "checkpointings": list(request.checkpointings),
        "known": known,
        "fewest_cuts": search.cuts_matter,
    }
    outcome = run_child(
        "memfit.memory.outlook:forecast",
        payload,
        log=request.log,
        on_event=listen,
        deadline_seconds=request.deadline_seconds,
        grace_seconds=0.0,
    )
    answer = outcome.unwrap(f"the forecast of stage {request.stage!r}")
    if not set(request.precisions) & set(answer["precisions"]):
        raise _no_precision(request, answer["precisions"])
    search.relief = answer["relief"]
    chosen = [probe for probe in tried if probe.verifying and probe.outcome == "predicted"]
    return (chosen[-1], answer["timeline"]) if chosen else None


def _ladder(request: PlanRequest, precision: str, seq_len: int | None, saving: Mapping[str, Any]) -> list[Candidate]:
    return candidates(
        request.device_batch_size,
        precision=precision,
        variant=request.variant,
        seq_len=seq_len,
        min_micro_batch_size=request.min_micro_batch_size,
        **saving,
    )


def _smallest(request: PlanRequest, seq_len: int | None) -> list[dict[str, Any]]:
    """List the smallest layout of every precision and checkpointing that is allowed."""
    return [
        asdict(_ladder(request, precision, seq_len, {"checkpointing": checkpointing})[0])
        for precision in request.precisions
        for checkpointing in request.checkpointings
    ]


def _climb(search: Search, seq_len: int | None) -> list[Probe]:
    """Probe every allowed precision; save memory by further exact levers only where memory was what ended the climb."""
    request, found = search.request, list[Probe]()
    limit = int(request.budget_bytes * (1 - HEADROOM))
    search.relief = []
    usable = {name for probe in request.known for name, default in CHEAP_LEVERS if getattr(probe, name) != default}
    for precision in request.precisions:
        before: tuple[list[Probe], list[Candidate], list[int]] | None = None
        for saving in savings(request.checkpointings, usable):
            ladder, predicted = _ladder(request, precision, seq_len, saving), list[int]()
            probes = _known(request, ladder)
            if not probes and before is not None and not _worth_saving(*before, saving, limit):
                break
            if not probes:
                ran = _run(search, ladder, False, _smallest(request, seq_len))
                if ran.single_sample_fails:  # batch statistics of one sample, perhaps: if not, two fail as well
                    search.request = replace(request, min_micro_batch_size=min(2, request.device_batch_size))
                    return _climb(search, seq_len)
                probes, predicted = _with_smaller(search, ladder, ran), ran.predicted
                usable |= set(ran.usable)
                search.relief = ran.relief
            search.tried.extend(probes)
            found.extend(probes)
            before = probes, ladder, predicted
            if search.relief:  # nothing fits, by far
                return found
    return found


def _with_smaller(search: Search, ladder: Sequence[Candidate], ran: "Climb") -> list[Probe]:
    """Climb the rungs below the one that a climb began at, where even that one did not fit."""
    probes = ran.probes
    while not ran.relief and probes and all(probe.outcome in ("oom", "over_budget") for probe in probes):
        below = [rung for rung in ladder if rung.micro_batch_size < probes[-1].micro_batch_size]
        if not below:
            break
        ran = _run(search, below, False)
        probes = [*probes, *ran.probes]
    return probes


def _worth_saving(
    probes: Sequence[Probe],
    ladder: Sequence[Candidate],
    predicted: Sequence[int],
    saving: Mapping[str, Any],
    limit: int,
) -> bool:
    """Tell whether memory ended a climb, and a lever that costs as much as this one could win its cost back."""
    recomputes = saving["checkpointing"] != ladder[0].checkpointing
    return memory_bound(probes, ladder, predicted, limit) and (not recomputes or worth_recomputing(probes, ladder))


def _known(request: PlanRequest, ladder: Sequence[Candidate]) -> list[Probe]:
    """Take over an earlier climb of this ladder: only the number of accumulation steps differs.

    A climb over other rungs, or over a single one of this ladder's, says too little: none of it is taken.
    """
    climbed = {
        probe.micro_batch_size: probe
        for probe in request.known
        if not probe.verifying and probe.candidate.ladder == ladder[0].ladder
    }
    smallest, largest = min(climbed, default=0), max(climbed, default=0)
    rungs = [candidate for candidate in ladder if smallest <= candidate.micro_batch_size <= largest]
    enough = len(rungs) > 1 or smallest == ladder[0].micro_batch_size
    if not climbed or not enough or not all(candidate.micro_batch_size in climbed for candidate in rungs):
        return []
    return [climbed[candidate.micro_batch_size].at(candidate, request.global_batch_size) for candidate in rungs]


@dataclass
class Climb:
    """What a child found out of a ladder."""

    probes: list[Probe] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    """Bytes of every rung, by simulation; empty where the program cannot be simulated."""
    usable: list[str] = field(default_factory=list)
    """Which of the levers chunked_loss and foreach change anything."""
    relief: list[dict[str, Any]] = field(default_factory=list)
    single_sample_fails: str = ""
    """The error, other than of memory, of the smallest rung, where that is a single sample."""
    timeline: Timeline = field(default_factory=dict)


def _run(
    search: Search, ladder: Sequence[Candidate], verifying: bool, smallest: Sequence[dict[str, Any]] = ()
) -> Climb:
    """Climb one ladder in one child. A child that dies is a measurement of the candidate that it was at."""
    request, climb, at = search.request, Climb(), [ladder[0]]

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "predicted":
            climb.predicted, climb.usable = event["bytes"], event["usable"]
        elif event["event"] == "trying":
            at[0] = Candidate(**event["candidate"])
        elif event["event"] == "probe":
            climb.probes.append(replace(Probe(**event["probe"]), verifying=verifying))
            search.on_probe(climb.probes[-1])
        elif event["event"] == "batch_norm":
            search.batch_norm = True
        elif event["event"] == "timed":
            timed = Probe(**event["probe"])
            climb.probes = [timed if timed.candidate == probe.candidate else probe for probe in climb.probes]

    payload = {
        **request.payload(),
        "candidates": [asdict(candidate) for candidate in ladder],
        "smallest": list(smallest),
        "verifying": verifying,
        "fewest_cuts": search.cuts_matter,
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
        search.on_probe(climb.probes[-1])
    elif outcome.status != "ok":
        outcome.unwrap(f"the probe of stage {request.stage!r}")
        raise ChildError(f"the probe of stage {request.stage!r} stopped early: {outcome.message}")
    else:
        climb.timeline, climb.relief = outcome.value["timeline"], outcome.value.get("relief", [])
        climb.single_sample_fails = outcome.value.get("single_sample_fails", "")
    return climb


def check_feasible(requests: Sequence[PlanRequest]) -> None:
    """Refuse programs whose smallest layouts are predicted to be far beyond the budget, in one child and unrun.

    The programs may be of made-up data of the right shapes. What cannot be simulated passes. Raises: DoesNotFitError.
    """
    first = requests[0]
    programs = [
        {
            "program": request.program,
            "global_batch_size": request.global_batch_size,
            "clip": request.clip,
            "smallest": _smallest(request, request.seq_lens[-1]),
        }
        for request in requests
    ]
    outcome = run_child(
        "memfit.memory.outlook:outlook",
        {**first.payload(), "programs": programs},
        log=first.log,
        deadline_seconds=first.deadline_seconds,
        grace_seconds=0.0,
    )
    for request, found in zip(requests, outcome.unwrap("the outlook"), strict=False):
        if found["probes"]:
            probes = [Probe(**probe) for probe in found["probes"]]
            raise DoesNotFitError(does_not_fit(Search(request, tried=probes, relief=found["relief"])))
