"""The model's scores beside those of the baselines."""

from typing import Any

from memfit.report.blocks import Cell, Column, Facts, Note, Row, Section, Table, measured, pending, text_cell
from memfit.report.gate import gate_sentence
from memfit.report.measures import MEASURES, best_of, measure
from memfit.report.run_files import Run, mapping
from memfit.report.units import count_text, finite, setting_text

_ARROWS = {"lower": "lower is better", "higher": "higher is better", "": ""}


def scores(run: Run) -> Section:
    """Set every score beside the baselines' and mark the best of each line."""
    title = "Scores beside baselines"
    if not run.evaluation:
        return pending("scores", title, "the model has not been evaluated")
    columns = {"model": mapping(run.evaluation, "metrics")}
    for name in mapping(run.evaluation, "baselines"):
        columns[name] = mapping(run.evaluation, "baselines", name)
    names = [*MEASURES, *(name for name in columns["model"] if name not in MEASURES)]
    shown = [name for name in names if any(name in column for column in columns.values())]
    table = Table(
        columns=(
            Column("Score"),
            *(Column(name.replace("_", " "), number=True) for name in columns),
            Column("Better"),
            Column("What it says"),
        ),
        rows=tuple(_row(name, columns, run.unit) for name in shown),
    )
    return Section("scores", title, (_facts(run), *_gate(run), table), lead=_tally(shown, columns))


def _gate(run: Run) -> tuple[Note, ...]:
    gate = mapping(run.evaluation, "gate")
    return (Note(gate_sentence(gate), "" if gate.get("passed") is True else "warn"),) if gate else ()


def _row(name: str, columns: dict[str, dict[str, Any]], unit: str) -> Row:
    about = measure(name)
    best = best_of(name, [column.get(name) for column in columns.values()])
    cells = []
    for column in columns.values():
        why = "undefined: no row to compute it from" if name in column else "this baseline has no such score"
        cell = measured(column.get(name), about.write, why)
        wins = best is not None and finite(column.get(name)) == best
        cells.append(Cell(cell.text, "the best of this line", "best") if wins else cell)
    label = f"{about.label} ({unit})" if about.kind == "unit" and unit else about.label
    return Row((Cell(label), *cells, Cell(_ARROWS[about.better], tone="muted"), Cell(about.meaning, tone="muted")))


def _tally(names: list[str], columns: dict[str, dict[str, Any]]) -> str:
    """Count the lines that the model wins outright or shares."""
    bests = {name: best_of(name, [column.get(name) for column in columns.values()]) for name in names}
    judged = [name for name, best in bests.items() if best is not None]
    won = sum(finite(columns["model"].get(name)) == bests[name] for name in judged)
    if len(columns) < 2 or not judged:
        return ""
    return f"The model has the best figure, or shares it, in {won} of {len(judged)} lines."


def _facts(run: Run) -> Facts:
    facts = run.evaluation
    unit = f" {run.unit}" if run.unit else ""
    return Facts(
        (
            ("Split", text_cell(facts.get("split"))),
            ("Rows", measured(facts.get("num_rows"), count_text, "not recorded")),
            ("Threshold", measured(facts.get("threshold"), lambda value: setting_text(value) + unit, "not set")),
            ("Rows' hash", Cell(str(facts.get("rows_sha256") or "–")[:16], str(facts.get("rows_sha256")), "code")),
        )
    )
