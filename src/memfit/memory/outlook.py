"""The child's side of planning by simulation alone: forecasts, what cannot fit at all, and what would help."""

import importlib
import pickle
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from memfit.memory.devices import find_device, read_devices
from memfit.memory.enforcement import now_bytes
from memfit.memory.forecast import Forecast, Prediction
from memfit.memory.plan import EVALUATION_FACTOR, HEADROOM, Candidate, Probe
from memfit.memory.search import HOPELESS, grid, mildest, ranking, savings
from memfit.memory.simulate import CannotSimulateError
from memfit.process import Emit
from memfit.step import TrainingProgram

_EXACT_TRIES = 8


def load_program(description: dict[str, Any]) -> TrainingProgram:
    """Build the program that `{"factory": "module:function", "arguments": {...}}` or `{"pickle": path}` describes."""
    if "pickle" in description:
        loaded = pickle.loads(Path(description["pickle"]).read_bytes())  # noqa: S301  (written by the parent just now)
        assert isinstance(loaded, TrainingProgram)
        return loaded
    module, name = description["factory"].split(":")
    program = getattr(importlib.import_module(module), name)(description["arguments"])
    assert isinstance(program, TrainingProgram)
    return program


def forecaster(program: TrainingProgram, payload: dict[str, Any]) -> Forecast:
    """Make the oracle of a program on the payload's device; on this CPU, what this process imported counts."""
    device = find_device(payload["device"], read_devices(payload["user_devices"]))
    if device.kind == "cpu":
        device = replace(device, context_bytes=max(device.context_bytes, now_bytes("cpu")))
    return Forecast(program, device, evaluation_factor=EVALUATION_FACTOR, clip=payload["clip"])


def most_saving(candidate: Candidate, usable: Collection[str]) -> Candidate:
    """Turn on every exact lever that changes anything."""
    return replace(candidate, **list(savings([candidate.checkpointing], usable))[-1])


def hopeless(forecast: Forecast, smallest: Sequence[Candidate], limit: int, size: int) -> list[Probe] | None:
    """Predict the smallest candidates; return None if one may fit, if only with luck, or cannot be simulated."""
    probes = []
    for candidate in smallest:
        if candidate.precision not in forecast.device.precisions:
            continue
        try:
            prediction = forecast.of(candidate)
        except CannotSimulateError:
            return None
        if prediction.peak_bytes <= limit * (1 + HOPELESS):
            return None
        probes.append(_predicted(candidate, prediction, limit, size))
    return probes or None


def outlook(payload: dict[str, Any], _emit: Emit) -> list[dict[str, Any]]:
    """Tell of each program, before its data is there, whether its smallest candidates are far beyond the budget.

    Returns for each {"probes", "relief"}, both empty where one may fit or nothing can be simulated; the first that
    cannot fit is the last.
    """
    limit, found = int(payload["budget_bytes"] * (1 - HEADROOM)), []
    for each in payload["programs"]:
        forecast = forecaster(load_program(each["program"]), {**payload, **each})
        smallest = [Candidate(**candidate) for candidate in each["smallest"]]
        refused = hopeless(forecast, smallest, limit, each["global_batch_size"])  # and learn which levers are usable
        if refused is not None:
            smallest = [most_saving(candidate, forecast.usable) for candidate in smallest]
            refused = hopeless(forecast, smallest, limit, each["global_batch_size"])
        refused = refused or []
        found.append({"probes": [asdict(probe) for probe in refused], "relief": relief(forecast, refused)})
        if refused:
            break
    return found


def forecast(payload: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Predict ladders on a device that need not be here; emit rungs and the best layout of all."""
    oracle = forecaster(load_program(payload["program"]), payload)
    oracle.take_over(Probe(**probe) for probe in payload["known"])
    limit, size = int(payload["budget_bytes"] * (1 - HEADROOM)), payload["global_batch_size"]
    fewest_cuts = payload.get("fewest_cuts", False)
    probes, smallest = [], []
    precisions = oracle.device.precisions
    for plain in payload["ladders"]:
        for saving in savings(payload["checkpointings"], oracle.usable) if plain[0]["precision"] in precisions else ():
            ladder = [replace(Candidate(**candidate), **saving) for candidate in plain]
            layouts = grid(ladder)
            found = [
                _predicted(candidate, prediction, limit, size)
                for candidate, prediction in zip(layouts, oracle.line(ladder, layouts), strict=True)
            ]
            for probe in found:
                if probe.candidate in ladder:
                    emit({"event": "probe", "probe": asdict(probe)})
            probes += found
            smallest.append(found[0])
            if found[-1].outcome == "predicted":  # the whole batch at once: nothing is left to save
                break
    exact: dict[Candidate, Probe] = {}

    def look_closer(candidate: Candidate) -> Probe:
        exact[candidate] = _predicted(candidate, oracle.of(candidate), limit, size)
        emit({"event": "probe", "probe": asdict(exact[candidate])})
        return exact[candidate]

    for _ in range(_EXACT_TRIES):  # until what ranks first does so by a simulation of its own
        best = next(
            iter(ranking((exact.get(probe.candidate, probe) for probe in probes), fewest_cuts=fewest_cuts)), None
        )
        if best is None or best.candidate in exact:
            break
        look_closer(best.candidate)
    fitting = ranking(exact.values(), fewest_cuts=fewest_cuts) or [
        probe for probe in map(look_closer, [each.candidate for each in smallest]) if probe.outcome == "predicted"
    ]
    if not fitting:
        return {"timeline": {}, "relief": relief(oracle, list(exact.values())), "precisions": precisions}
    emit({"event": "probe", "probe": asdict(replace(fitting[0], verifying=True))})
    return {"timeline": oracle.timeline(fitting[0].candidate), "relief": [], "precisions": precisions}


def _predicted(candidate: Candidate, prediction: Prediction, limit: int, size: int) -> Probe:
    probe = Probe(
        **asdict(candidate),
        outcome="predicted" if prediction.upper_bytes <= limit else "over_budget",
        predicted_bytes=prediction.peak_bytes,
        upper_bytes=prediction.upper_bytes,
        micro_seconds=prediction.micro_seconds,
        update_seconds=prediction.update_seconds,
        phase=None if prediction.upper_bytes <= limit else prediction.phase,
    )
    return probe.at(candidate, size)


def relief_in_child(payload: dict[str, Any], _emit: Emit) -> list[dict[str, Any]]:
    """Estimate what would make the mildest of some failed probes fit, where it was a measurement that failed."""
    return relief(forecaster(load_program(payload["program"]), payload), [Probe(**payload["probe"])])


def relief(oracle: Forecast, failed: Sequence[Probe]) -> list[dict[str, Any]]:
    """Estimate what else would make the smallest layout fit: as it is, then one change at a time, the mildest first."""
    smallest = mildest(failed)
    if smallest is None:
        return []
    program, candidate = oracle.program, smallest.candidate
    changes: list[tuple[str, Candidate]] = [("", candidate)]
    if program.blocks and candidate.checkpointing == "none":
        changes.append(("plan.checkpointing 'blocks'", replace(candidate, checkpointing="blocks")))
    lighter = [name for name in oracle.device.precisions if name != "fp32" and candidate.precision == "fp32"]
    changes += [(f"plan.precisions {name!r}", replace(candidate, precision=name)) for name in lighter[:1]]
    if candidate.seq_len:
        changes.append((f"seq_len {candidate.seq_len // 2}", replace(candidate, seq_len=candidate.seq_len // 2)))
    others = [name for name in program.variants if name != candidate.variant]
    changes += [(f"the variant {name!r}", replace(candidate, variant=name)) for name in others]
    try:
        found = [(name, oracle.of(changed)) for name, changed in changes]
    except CannotSimulateError:
        return []
    return [{"change": name, "upper_bytes": each.upper_bytes, "phase": each.phase} for name, each in found]
