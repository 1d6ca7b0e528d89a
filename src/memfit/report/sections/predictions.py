"""Predictions against truth: a time line, a scatter, the errors, and who is taken for what."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memfit.report.blocks import Block, Cell, Column, Figure, Gallery, Heading, Note, Row, Section, Table, pending
from memfit.report.class_names import class_names
from memfit.report.prediction_charts import (
    Arrays,
    errors,
    mean_alignment,
    probabilities,
    reliability_diagram,
    sample_alignments,
    scatter,
    time_line,
)
from memfit.report.run_files import Run
from memfit.report.units import count_text, finite

MAX_CLASSES = 20
"""Of more, no table of all pairs is shown, but the pairs that are mistaken most often."""
MAX_MISTAKES = 20
SERIES = {"times", "truth", "value"}


def predictions(run: Run) -> Section | None:
    """Show how the predictions of the test rows lie to the truth; None where they are nothing that can be drawn."""
    title = "Predictions against truth"
    arrays = run.predictions
    if not arrays:
        return pending("predictions", title, "no predictions have been written")
    if len({len(column) for column in arrays.values()}) != 1:
        return Section("predictions", title, (Note("predictions.npz holds arrays of different lengths.", "warn"),))
    if not set(arrays) >= SERIES:  # no series, or not all of one: at most classes
        nothing = (Note("There is nothing to draw.", "pending"),) if SERIES & set(arrays) else ()
        shown = _classes(arrays, run) or nothing
        return Section("predictions", title, shown) if shown else None
    if not np.any(np.isfinite(arrays["truth"]) & np.isfinite(arrays["value"])):
        return Section("predictions", title, (Note("No test row has a finite prediction.", "bad"),))
    threshold = finite(run.evaluation.get("threshold"))
    figures: list[Figure | None] = [scatter(arrays, run.unit), errors(arrays, run.unit)]
    figures += [probabilities(arrays, threshold, run.unit)] if threshold is not None else []
    blocks: list[Block] = [
        time_line(arrays, run.unit, threshold),
        Gallery(tuple(figure for figure in figures if figure)),
    ]
    return Section("predictions", title, (*blocks, *_attention(run), *_classes(arrays, run)))


def _attention(run: Run) -> tuple[Block, ...]:
    """Show which rows of the history each step of a forecast draws on, where that is known."""
    if run.alignment is None:
        return ()
    heading = Heading("Attention", "which rows of the history each step ahead draws on")
    singles = sample_alignments(run.alignment, run.predictions["times"])
    return heading, mean_alignment(run.alignment), *([Gallery(singles)] if singles else [])


def _classes(arrays: Arrays, run: Run) -> tuple[Block, ...]:
    if not {"class", "class_truth"} <= set(arrays):
        return ()
    diagram = reliability_diagram(arrays)
    honesty = (Heading("Calibration", "how often what was stated came true"), Gallery((diagram,))) if diagram else ()
    truth, predicted = arrays["class_truth"].astype(int), arrays["class"].astype(int)
    if min(truth.min(), predicted.min()) < 0:
        return honesty
    names = class_names(run, int(max(truth.max(), predicted.max())) + 1)
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (truth, predicted), 1)
    if len(names) > MAX_CLASSES:
        return Heading("Classes", f"most frequent mistakes among {len(names)}"), _mistakes(counts, names), *honesty
    return Heading("Classes", "rows: truth; columns: prediction"), _confusion(counts, names), *honesty


def _mistakes(counts: NDArray[np.int_], names: Sequence[str]) -> Table:
    """List the pairs of classes that are mistaken most often; the bars are shares of the true class."""
    wrong = counts - np.diag(np.diag(counts))
    order = [place for place in np.argsort(-wrong, axis=None, kind="stable")[:MAX_MISTAKES] if wrong.flat[place]]
    columns = (Column("truth"), Column("taken for"), Column("rows", number=True), Column("of", number=True))
    rows = []
    for truth, predicted in (divmod(int(place), len(names)) for place in order):
        count, total = int(wrong[truth, predicted]), int(counts[truth].sum())
        cells = (Cell(count_text(count), tone="off", bar=count / total), Cell(count_text(total), tone="muted"))
        rows.append(Row((Cell(names[truth]), Cell(names[predicted]), *cells)))
    return Table(columns, tuple(rows))


def _confusion(counts: NDArray[np.int_], names: Sequence[str]) -> Table:
    """Show each true class's predictions; the bars are shares of the row."""
    columns = (Column("truth"), *(Column(name, number=True) for name in names), Column("rows", number=True))
    return Table(columns, tuple(_class_row(name, index, counts[index].tolist()) for index, name in enumerate(names)))


def _class_row(name: str, index: int, counts: list[int]) -> Row:
    total = sum(counts)
    cells = [
        Cell(
            count_text(count),
            tone=("best" if other == index else "off") if count else "muted",
            bar=count / (total or 1),
        )
        for other, count in enumerate(counts)
    ]
    return Row((Cell(name), *cells, Cell(count_text(total), tone="muted")))
