"""The top of the page: what ran, how it ended, and how good the result is."""

import math
from dataclasses import dataclass

from memfit.report.blocks import Cell
from memfit.report.measures import improvement, measure
from memfit.report.run_files import Run, mapping, objects
from memfit.report.units import (
    bytes_text,
    count_text,
    finite,
    number_text,
    seconds_text,
    setting_text,
    share_text,
    time_text,
)

LEVEL = 0.005
"""Differences below half a percent are called level."""


@dataclass(frozen=True)
class Tile:
    """One figure that matters, with what it is to be compared with."""

    label: str
    value: str
    aside: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Headline:
    """The page's header."""

    name: str
    run_id: str
    status: Cell
    when: str
    sentence: str
    tone: str
    tiles: tuple[Tile, ...]
    problems: tuple[str, ...]


def headline(run: Run) -> Headline:
    """Say in one sentence what came out, also when the model lost."""
    sentence, tone = verdict(run)
    created = run.info.get("created")
    tiles = tuple(tile for tile in (_score(run), _memory(run), _training(run), _model(run), _step(run)) if tile)
    when = f"started {time_text(created)}" if created else ""
    problems = [*run.problems, *_broken_lines(run)]
    return Headline(run.name, run.run_id, _status(run), when, sentence, tone, tiles, tuple(problems))


def verdict(run: Run) -> tuple[str, str]:
    """Return the result in one sentence and its tone: the deciding score beside that of the best simple baseline."""
    about = measure(_deciding(run))
    score = finite(mapping(run.evaluation, "metrics").get(_deciding(run)))
    if score is None:
        why = f"it has no {about.label}" if run.evaluation else "this run has not been evaluated"
        return f"No result yet: {why}.", "pending"
    ours = f"{about.label} {about.write(score)} {run.unit if about.kind == 'unit' else ''}".strip()
    rows = finite(run.evaluation.get("num_rows"))
    where = f" on {count_text(rows)} test rows" if rows is not None else ""
    rival = _best_baseline(run)
    if rival is None:
        return f"{ours}{where}; no baseline to compare with.", "pending"
    name, value = rival
    gain = improvement(_deciding(run), score, value)
    theirs = f"{ours}{where}; {name} has {about.write(value)}"
    if abs(gain) < LEVEL:
        return f"{theirs}: level with it, so the model adds nothing to the simplest guess.", "warn"
    if gain > 0:
        return f"{theirs}: {_percent(gain)} better.", "good"
    worse = f"{_percent(gain)} worse, so " if math.isfinite(gain) else ""
    return f"{theirs}: {worse}the model loses to the simplest guess.", "bad"


def _percent(gain: float) -> str:
    return f"{abs(gain) * 100:.1f} %" if abs(gain) < 0.1 else f"{abs(gain) * 100:.0f} %"


def _best_baseline(run: Run) -> tuple[str, float] | None:
    """Return the baseline with the best deciding score: to win against a weaker one says little."""
    deciding, known = _deciding(run), {}
    for name, scores in mapping(run.evaluation, "baselines").items():
        if isinstance(scores, dict) and (value := finite(scores.get(deciding))) is not None:
            known[name] = value
    if not known or not measure(deciding).better:
        return None
    best = (min if measure(deciding).better == "lower" else max)(known, key=lambda name: known[name])
    return best.replace("_", " "), known[best]


def _deciding(run: Run) -> str:
    """Name the score that decides, as the workload says."""
    return str(run.evaluation.get("headline") or "mae")


def _status(run: Run) -> Cell:
    steps = objects(run.info.get("steps"))
    running = [str(step.get("name")) for step in steps if step.get("status") == "running"]
    done = [step.get("status") for step in steps]
    if run.info.get("finished"):
        reused = done.count("reused")
        return Cell("finished", f"{len(done) - reused} steps ran, {reused} reused", "good")
    if running and running != ["report"]:
        return Cell(f"unfinished: at {running[-1]}", "the step that was under way when this page was written", "warn")
    if run.evaluation and run.card:
        return Cell("complete", "evaluated and exported", "good")
    return Cell("unfinished", "some steps have not run yet", "warn")


def _score(run: Run) -> Tile | None:
    risk = finite(mapping(run.evaluation, "metrics").get("loss_risk"))
    if risk is None:
        return None
    threshold = finite(run.evaluation.get("threshold"))
    above = f"of rows predicted above {setting_text(threshold)} {run.unit}".strip() if threshold is not None else ""
    return Tile(measure("loss_risk").label, share_text(risk), above)


def _memory(run: Run) -> Tile | None:
    """The highest peak of all stages, as a share of the budget it was held to."""
    peaks = []
    for plan in run.plans:
        stage = next((stage for stage in run.stages if stage.name == plan.get("stage")), None)
        seen = [finite(mapping(epoch, "memory").get("peak_bytes")) for epoch in (stage.epochs if stage else [])]
        known = [peak for peak in [*seen, finite(plan.get("measured_peak_bytes"))] if peak is not None]
        budget = finite(plan.get("budget_bytes"))
        if known and budget:
            peaks.append((max(known) / budget, max(known), budget))
    if not peaks:
        return None
    share, peak, budget = max(peaks)
    return Tile(
        "Peak memory", bytes_text(peak), f"{share * 100:.0f} % of {bytes_text(budget)}", "bad" if share > 1 else ""
    )


def _training(run: Run) -> Tile | None:
    known = [stage.seconds for stage in run.stages if stage.seconds is not None]
    if not known:
        return None
    epochs = sum(len(stage.epochs) for stage in run.stages)
    stages = f"{len(run.stages)} stages" if len(run.stages) > 1 else "1 stage"
    return Tile("Training", seconds_text(sum(known)), f"{stages}, {epochs} epochs")


def _model(run: Run) -> Tile | None:
    counts = [finite(stage.start.get("parameters")) for stage in run.stages]
    known = [count for count in counts if count is not None]
    if not known:
        return None
    size = f"{known[-1] / 1e6:.2f} M" if known[-1] >= 1e6 else count_text(known[-1])
    onnx = run.export_dir / "model.onnx"
    return Tile("Parameters", size, f"ONNX {bytes_text(onnx.stat().st_size)}" if onnx.is_file() else "")


def _step(run: Run) -> Tile | None:
    rates = [finite(plan.get("samples_per_second")) for plan in run.plans]
    known = [rate for rate in rates if rate is not None]
    device = next((str(plan["device"]) for plan in run.plans if plan.get("device")), "")
    return Tile("Throughput", f"{number_text(max(known))}/s", f"samples, {device}".strip(", ")) if known else None


def _broken_lines(run: Run) -> list[str]:
    return [
        f"{stage.num_unreadable} line{'s' * (stage.num_unreadable > 1)} of stage {stage.name}'s events could not be"
        " read and are left out."
        for stage in run.stages
        if stage.num_unreadable
    ]
