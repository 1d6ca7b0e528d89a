"""The memory plan of each stage: what was tried, what it measured, and why one was chosen."""

from collections.abc import Callable
from typing import Any

from memfit.memory.plan import describe_change
from memfit.report.blocks import (
    Block,
    Cell,
    Column,
    Details,
    Facts,
    Heading,
    Note,
    Row,
    Section,
    Table,
    measured,
    pending,
    text_cell,
)
from memfit.report.memory_timeline import timeline_figure
from memfit.report.run_files import Run, objects
from memfit.report.units import bytes_text, count_text, finite, number_text, seconds_text

_OUTCOMES = {
    "fits": ("fits", "good", "ran within the budget"),
    "oom": ("out of memory", "bad", "the process ran out of its budget"),
    "over_budget": ("over budget", "bad", "ran, but its peak was above the budget"),
    "timeout": ("timeout", "warn", "took longer than a probe may"),
    "predicted": ("predicted", "", "simulated, not run"),
    "failed": ("failed", "bad", "ended in an error that is not about memory"),
}
_CLASSES = {
    "exact": ("Exact levers", "they change nothing in the result"),
    "numerics": ("Numeric levers", "they change rounding"),
    "lossy": ("Lossy levers", "they change what is learned"),
}
ONE_VARIANT = "the model has only one"
_LAYOUT = ("micro_batch_size", "accumulation_steps", "precision", "checkpointing", "variant")


def plan(run: Run) -> Section:
    """Show each stage's plan, with its evidence."""
    title = "Memory plan"
    if not run.plans:
        return pending("plan", title, "no memory plan has been made")
    blocks: list[Block] = []
    for number, stage in enumerate(run.plans, 1):
        blocks += _stage(stage, number)
    return Section("plan", title, tuple(blocks), lead=_levers_sentence(run.plans))


def _stage(stage: dict[str, Any], number: int) -> list[Block]:
    probes = objects(stage.get("probes"))
    chosen = _chosen(stage, probes)
    blocks: list[Block] = [Heading(str(stage.get("stage") or "stage"), _layout_sentence(stage))]
    if stage.get("verified"):
        blocks.append(Note(f"Chosen and verified: {stage.get('reason') or 'no reason recorded'}", "good"))
    else:
        blocks.append(Note(f"An estimate, not yet run: {stage.get('reason') or 'no reason recorded'}", "warn"))
    blocks += [Note(f"In flight: {_change(change)}.", "warn") for change in objects(stage.get("in_flight"))]
    blocks += [_facts(stage), _levers(stage)]
    drawn = timeline_figure(f"timeline-{number}", stage)
    if drawn is not None:
        blocks.append(drawn)
    if probes:
        table = _probe_table(probes, chosen, finite(stage.get("budget_bytes")))
        summary = f"All {len(probes)} tries" if len(probes) > 1 else "The one try"
        blocks.append(Details(summary, (table,)) if len(probes) > 20 else table)
    return blocks


def _change(change: dict[str, Any]) -> str:
    try:
        return describe_change(change)
    except (KeyError, TypeError):  # of another version
        return "the layout changed"


def _layout_sentence(stage: dict[str, Any]) -> str:
    return (
        f"global batch {_plain(stage, 'global_batch_size')} = micro {_plain(stage, 'micro_batch_size')}"
        f" × {_plain(stage, 'accumulation_steps')} accumulation × {_plain(stage, 'num_devices')} device"
    )


def _plain(stage: dict[str, Any], key: str) -> str:
    return measured(stage.get(key), count_text).text


def _levers_sentence(stages: list[dict[str, Any]]) -> str:
    used = {str(lever.get("class")) for stage in stages for lever in objects(stage.get("levers"))}
    if "lossy" in used:
        return "To fit, a lossy lever was pulled, which changes what is learned; see which below."
    if "numerics" in used:
        return "Nothing lossy was done to fit; levers that change rounding were pulled, as the config allows."
    if not used:
        return "It fits without pulling a lever."
    return "Only exact levers were pulled to fit: they change nothing in the result."


def _bar_cell(value: Any, budget: float | None, why: str = "not measured") -> Cell:
    number = finite(value)
    if number is None or not budget:
        return measured(value, bytes_text, why)
    tone = "bad" if number > budget else ""
    return Cell(f"{bytes_text(number)} · {number / budget * 100:.0f} %", "share of the budget", tone, number / budget)


def _facts(stage: dict[str, Any]) -> Facts:
    budget = finite(stage.get("budget_bytes"))
    unseen = "not predicted: the step could not be simulated"
    pairs = [
        ("Budget", measured(budget, bytes_text, "not set")),
        ("Measured peak", _bar_cell(stage.get("measured_peak_bytes"), budget, "no probe has run")),
        ("Predicted peak", _bar_cell(stage.get("predicted_peak_bytes"), budget, unseen)),
        ("Its upper bound", _bar_cell(stage.get("upper_peak_bytes"), budget, unseen)),
        ("Device", text_cell(stage.get("device"))),
        ("Precision", text_cell(stage.get("precision"))),
        ("Checkpointing", text_cell(stage.get("checkpointing"))),
        ("Variant", text_cell(stage.get("variant"), ONE_VARIANT)),
        ("Sequence length", measured(stage.get("seq_len"), count_text, "the data's own: not a lever here")),
        ("Step", measured(stage.get("step_seconds"), seconds_text)),
        ("Samples/s", measured(stage.get("samples_per_second"), number_text)),
        ("Evaluation batch", measured(stage.get("eval_batch_size"), count_text, "not recorded")),
    ]
    return Facts(tuple(pairs))


def _levers(stage: dict[str, Any]) -> Facts:
    """Say per class which levers were pulled; a class without any is worth saying too."""
    levers = objects(stage.get("levers"))
    classes = [*_CLASSES, *sorted({str(lever.get("class")) for lever in levers} - set(_CLASSES))]
    pairs = []
    for name in classes:
        used = [lever for lever in levers if str(lever.get("class")) == name]
        label, meaning = _CLASSES.get(name, (f"{name} levers", ""))
        text = ", ".join(f"{lever.get('name')} = {lever.get('value')}".replace("_", " ") for lever in used)
        tone = "warn" if name == "lossy" else ""
        pairs.append((label, Cell(text, meaning, tone) if used else Cell("none", meaning, "muted")))
    return Facts(tuple(pairs))


def _chosen(stage: dict[str, Any], probes: list[dict[str, Any]]) -> set[int]:
    """Return the positions of the probes that ran the chosen layout and fit."""
    wanted = [stage.get(key) for key in _LAYOUT]
    return {
        index
        for index, probe in enumerate(probes)
        if probe.get("outcome") == "fits" and [probe.get(key) for key in _LAYOUT] == wanted
    }


def _probe_table(probes: list[dict[str, Any]], chosen: set[int], budget: float | None) -> Table:
    columns = (
        Column("", title="chosen"),
        Column("Micro", number=True, title="micro-batch size"),
        Column("Accum.", number=True, title="accumulation steps"),
        Column("Precision"),
        Column("Checkpointing"),
        Column("Variant"),
        Column("Outcome"),
        Column("Peak", title="of the process, and its share of the budget"),
        Column("Step", number=True),
        Column("Samples/s", number=True),
        Column("Ended in"),
    )
    rows = tuple(
        Row(_probe_cells(probe, index in chosen, budget), marked=index in chosen) for index, probe in enumerate(probes)
    )
    return Table(columns, rows)


def _probe_cells(probe: dict[str, Any], chosen: bool, budget: float | None) -> tuple[Cell, ...]:
    label, tone, meaning = _OUTCOMES.get(str(probe.get("outcome")), (str(probe.get("outcome")), "", ""))
    mark = Cell("✓ verified" if probe.get("verifying") else "✓ chosen", "this layout trains", "good")

    def figure(key: str, write: Callable[[float], str]) -> Cell:
        return measured(probe.get(key), write)

    return (
        mark if chosen else Cell(""),
        figure("micro_batch_size", count_text),
        figure("accumulation_steps", count_text),
        text_cell(probe.get("precision")),
        text_cell(probe.get("checkpointing")),
        text_cell(probe.get("variant"), ONE_VARIANT),
        Cell(label, str(probe.get("message") or meaning), tone),
        _bar_cell(probe.get("peak_bytes"), budget, "not measured: it did not run to the end"),
        figure("step_seconds", seconds_text),
        figure("samples_per_second", number_text),
        text_cell(probe.get("phase"), "it ran to the end"),
    )
