"""How the stages trained: losses, metrics, steps, and memory against the budget."""

import math
from dataclasses import replace
from typing import Any

from memfit.report.blocks import (
    Block,
    Cell,
    Column,
    Details,
    Figure,
    Gallery,
    Heading,
    Note,
    Row,
    Section,
    Table,
    measured,
    pending,
    text_cell,
)
from memfit.report.charts import EpochChart, Line, as_point, step_figure
from memfit.report.history import StageHistory
from memfit.report.measures import MEASURES, measure
from memfit.report.run_files import Run, mapping
from memfit.report.units import bytes_text, count_text, finite, number_text, seconds_text, setting_text, share_text

_REASONS = {
    "epochs": "all epochs done",
    "early_stopping": "early stopping: the monitor stopped improving",
    "max_steps": "step limit reached",
}
_FIRST_METRICS = (("mae",), ("above_accuracy", "below_accuracy"), ("loss_risk",))
MAX_METRICS = 4
"""Charts of metrics that are shown at once; the others are folded away."""
_STEP_CHARTS = (
    ("loss", "Step loss", "blue", False),
    ("gradient_norm", "Gradient norm", "violet", False),
    ("lr", "Learning rate", "green", True),
    ("seconds", "Seconds a step", "orange", True),
)


def training(run: Run) -> Section:
    """Show the stages in a table and the curves through all of them."""
    title = "Training"
    if not run.stages:
        return pending("training", title, "no stage has started")
    blocks: list[Block] = [_stage_table(run.stages)]
    blocks += [_resume_note(stage) for stage in run.stages if stage.resumes]
    blocks += [_spike_note(stage) for stage in run.stages if stage.spikes]
    blocks += _undefined_notes(run.stages)
    if not any(stage.epochs for stage in run.stages):
        blocks.append(Note("Not yet: no epoch has ended.", "pending"))
    metrics = _metrics(run)
    for heading, aside, figures in (
        ("Losses", "train and validation, by epoch", _losses(run.stages)),
        ("Validation metrics", "by epoch", metrics[:MAX_METRICS]),
        ("Steps", "one point per optimizer step, thinned where there are many", _steps(run.stages)),
    ):
        if figures:
            blocks += [Heading(heading, aside), Gallery(tuple(figures))]
    if metrics[MAX_METRICS:]:
        blocks.append(Details("Further validation metrics", (Gallery(tuple(metrics[MAX_METRICS:])),)))
    return Section("training", title, tuple(blocks))


def memory(run: Run) -> Section:
    """Show the process's memory of each epoch against its stage's budget and its plan."""
    title = "Memory against the budget"
    if not any(stage.epochs for stage in run.stages):
        return pending("memory", title, "no epoch has ended")
    plans = {str(plan.get("stage")): plan for plan in run.plans}
    figure = _memory_chart(run.stages, plans).figure(wide=True)
    rows = tuple(_memory_row(stage, plans.get(stage.name, {})) for stage in run.stages)
    names = ("Stage", "Budget", "Planned peak", "Highest peak seen", "Against the budget", "Against the plan")
    table = Table(tuple(Column(name, number=name != "Stage") for name in names), rows)
    return Section("memory", title, (figure, table) if figure else (table,))


def _memory_chart(stages: list[StageHistory], plans: dict[str, dict[str, Any]]) -> EpochChart:
    lines = [
        Line(
            "budget", "red", [_level(stage, finite(plans.get(stage.name, {}).get("budget_bytes"))) for stage in stages]
        ),
        Line("planned peak", "green", [_level(stage, _planned_peak(plans.get(stage.name, {}))) for stage in stages]),
        Line("now", "blue", [_memory(stage, "now_bytes") for stage in stages]),
        Line("peak", "orange", [_memory(stage, "peak_bytes") for stage in stages]),
    ]
    largest = max((point for line in lines for point in line.known), default=0)
    name, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    scaled = [
        replace(line, line=style, parts=[[point / size for point in part] for part in line.parts])
        for line, style in zip(lines, ("dashed", "dashed", "solid", "solid"), strict=True)
    ]
    caption = "Bytes of the whole process: what the budget is compared with."
    return EpochChart(
        "memory", "Memory per epoch", stages, scaled, label=name, caption=caption, from_zero=True, ring=False
    )


def _level(stage: StageHistory, value: float | None) -> list[float]:
    return [as_point(value)] * len(stage.epochs)


def _planned_peak(plan: dict[str, Any]) -> float | None:
    """The peak that the plan promised: as measured by its probes, else as predicted."""
    measured_peak = finite(plan.get("measured_peak_bytes"))
    return finite(plan.get("predicted_peak_bytes")) if measured_peak is None else measured_peak


def _memory(stage: StageHistory, key: str) -> list[float]:
    return [as_point(mapping(epoch, "memory").get(key)) for epoch in stage.epochs]


def _memory_row(stage: StageHistory, plan: dict[str, Any]) -> Row:
    budget, planned = finite(plan.get("budget_bytes")), _planned_peak(plan)
    known = [peak for peak in _memory(stage, "peak_bytes") if not math.isnan(peak)]
    peak = max(known) if known else None
    over = peak is not None and budget is not None and peak > budget
    against = Cell("–", "no peak or no budget") if peak is None or not budget else Cell(share_text(peak / budget))
    versus = (
        Cell("–", "no peak or no plan") if peak is None or not planned else Cell(f"{(peak / planned - 1) * 100:+.1f} %")
    )
    return Row(
        (
            Cell(stage.name),
            measured(budget, bytes_text, "no plan for this stage"),
            measured(planned, bytes_text),
            measured(peak, bytes_text),
            Cell(against.text, against.title, "bad" if over else ""),
            versus,
        )
    )


def _stage_table(stages: list[StageHistory]) -> Table:
    names = ("Stage", "Ended", "Epochs", "Steps", "Time", "Samples/s", "Best epoch", "Monitor", "Best value")
    texts = ("Stage", "Ended", "Monitor")
    return Table(tuple(Column(name, number=name not in texts) for name in names), tuple(map(_stage_row, stages)))


def _stage_row(stage: StageHistory) -> Row:
    planned = finite(stage.start.get("epochs"))
    epochs = count_text(len(stage.epochs)) + (f" of {count_text(planned)}" if planned is not None else "")
    reason = str(stage.end.get("reason") or "")
    ended = Cell(_REASONS.get(reason, reason)) if reason else Cell("not yet", "the stage has not ended", "warn")
    best = stage.epochs[stage.best_index] if stage.best_index is not None else {}
    last = stage.epochs[-1] if stage.epochs else {}
    monitor = stage.end.get("monitor")
    return Row(
        (
            Cell(stage.name),
            ended,
            Cell(epochs),
            Cell(count_text(stage.num_steps)),
            measured(stage.seconds, seconds_text),
            measured(last.get("samples_per_second"), number_text),
            measured(best.get("epoch"), count_text, "none yet"),
            text_cell(monitor, "written when the stage ends"),
            measured(stage.end.get("best_value"), number_text, "written when the stage ends"),
        )
    )


def _resume_note(stage: StageHistory) -> Note:
    steps = ", ".join(str(resume.get("step")) for resume in stage.resumes)
    return Note(f"Stage {stage.name} was resumed at step {steps}; steps that were run again are drawn once.")


def _spike_note(stage: StageHistory) -> Note:
    steps = ", ".join(str(spike.get("step")) for spike in stage.spikes[:20]) + (", …" if stage.spikes[20:] else "")
    return Note(f"Stage {stage.name} skipped {len(stage.spikes)} updates as spikes, at step {steps}.", "warn")


def _undefined_notes(stages: list[StageHistory]) -> list[Note]:
    return [
        Note(f"Stage {stage.name}: {stage.steps['loss'].num_undefined} steps had no finite total loss.", "bad")
        for stage in stages
        if stage.steps["loss"].num_undefined
    ]


def _losses(stages: list[StageHistory]) -> list[Figure]:
    """Draw the total and each term; a validation entry that has no training one is a metric, not a loss."""
    seen = [name for stage in stages for epoch in stage.epochs for name in mapping(epoch, "train")]
    terms = sorted(dict.fromkeys(seen), key=lambda name: name != "total")
    figures = []
    for index, term in enumerate(terms):
        lines = [
            Line(part, colour, [_values(stage, part, term) for stage in stages])
            for part, colour in (("train", "orange"), ("validation", "blue"))
        ]
        caption = "Weighted sum; the weights may differ by stage." if term == "total" else ""
        figures.append(EpochChart(f"loss-{index}", f"Loss: {term}", stages, lines, caption=caption).figure())
    return [figure for figure in figures if figure]


def _metrics(run: Run) -> list[Figure]:
    """Draw the validation metrics, those of one kind that belong together in one chart."""
    stages = run.stages
    trained = {name for stage in stages for epoch in stage.epochs for name in mapping(epoch, "train")}
    seen = dict.fromkeys(name for stage in stages for epoch in stage.epochs for name in mapping(epoch, "validation"))
    names = [name for name in seen if name not in trained and name != "total"]
    groups = [[name for name in group if name in names] for group in _FIRST_METRICS]
    shown = {name for group in groups for name in group}
    groups += [[name] for name in names if name not in shown]
    figures = [_metric(f"metric-{index}", group, run) for index, group in enumerate(groups) if group]
    return [figure for figure in figures if figure]


def _metric(key: str, names: list[str], run: Run) -> Figure | None:
    about = measure(names[0])
    colours = ("orange", "blue")[-len(names) :]
    lines = [
        Line(
            measure(name).label if len(names) == 1 else name.partition("_")[0],
            colour,
            [_values(stage, "validation", name) for stage in run.stages],
        )
        for name, colour in zip(names, colours, strict=True)
    ]
    title = about.label if len(names) == 1 else "Accuracy above and below"
    caption = " ".join(MEASURES[name].meaning for name in names if name in MEASURES)
    label = run.unit if about.kind == "unit" else ""
    write = _percent if about.kind == "share" else setting_text
    return EpochChart(key, title, run.stages, lines, label, caption, write).figure()


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def _values(stage: StageHistory, part: str, name: str) -> list[float]:
    return [as_point(mapping(epoch, part).get(name)) for epoch in stage.epochs]


def _steps(stages: list[StageHistory]) -> list[Figure]:
    figures = [
        step_figure(f"step-{index}", title, stages, series, colour, linear=linear)
        for index, (series, title, colour, linear) in enumerate(_STEP_CHARTS)
    ]
    return [figure for figure in figures if figure]
