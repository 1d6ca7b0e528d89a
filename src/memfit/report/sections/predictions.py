"""Predictions against truth: a time line, a scatter, the errors, and who is taken for what."""

from itertools import pairwise

import numpy as np

from memfit.report.blocks import Block, Cell, Column, Figure, Gallery, Heading, Note, Row, Section, Table, pending
from memfit.report.prediction_charts import Arrays, errors, probabilities, scatter, time_line
from memfit.report.run_files import Run
from memfit.report.units import count_text, finite, setting_text

MAX_CLASSES = 20


def predictions(run: Run) -> Section:
    """Show how the predictions of the test rows lie to the truth."""
    title = "Predictions against truth"
    arrays = run.predictions
    if not arrays:
        return pending("predictions", title, "no predictions have been written")
    if not {"times", "truth", "value"} <= set(arrays) or len({len(column) for column in arrays.values()}) != 1:
        return Section("predictions", title, (Note("predictions.npz lacks times, truth or value.", "warn"),))
    if not np.any(np.isfinite(arrays["truth"]) & np.isfinite(arrays["value"])):
        return Section("predictions", title, (Note("No test row has a finite prediction.", "bad"),))
    threshold = finite(run.evaluation.get("threshold"))
    figures: list[Figure | None] = [scatter(arrays, run.unit), errors(arrays, run.unit)]
    figures += [probabilities(arrays, threshold, run.unit)] if threshold is not None else []
    blocks: list[Block] = [
        time_line(arrays, run.unit, threshold),
        Gallery(tuple(figure for figure in figures if figure)),
    ]
    confusion = _confusion(arrays, run)
    blocks += [Heading("Classes", "rows: truth; columns: prediction"), confusion] if confusion else []
    return Section("predictions", title, tuple(blocks))


def _confusion(arrays: Arrays, run: Run) -> Table | None:
    """Count each true class's predictions; the shade is the share of its row."""
    if not {"class", "class_truth"} <= set(arrays):
        return None
    truth, predicted = arrays["class_truth"].astype(int), arrays["class"].astype(int)
    num_classes = int(max(truth.max(), predicted.max())) + 1
    if num_classes > MAX_CLASSES or min(truth.min(), predicted.min()) < 0:
        return None
    counts = np.zeros((num_classes, num_classes), dtype=int)
    np.add.at(counts, (truth, predicted), 1)
    names = _class_names(run, num_classes)
    columns = (Column("truth"), *(Column(name, number=True) for name in names), Column("rows", number=True))
    rows = []
    for index, line in enumerate(counts):
        total = int(line.sum())
        cells = [
            Cell(count_text(count), "right" if index == other else "", "best" if index == other else "", count / total)
            if total
            else Cell("0")
            for other, count in enumerate(line.tolist())
        ]
        rows.append(Row((Cell(names[index]), *cells, Cell(count_text(total), tone="muted"))))
    return Table(columns, tuple(rows))


def _class_names(run: Run, num_classes: int) -> list[str]:
    """Name classes by their bounds where the manifest holds them."""
    recorded = run.manifest.get("class_edges")
    edges = [edge for edge in map(finite, recorded if isinstance(recorded, list) else []) if edge is not None]
    if len(edges) != num_classes - 1 or not edges:
        return [f"class {index}" for index in range(num_classes)]
    texts = [setting_text(edge) for edge in edges]
    between = [f"{low} – {high}" for low, high in pairwise(texts)]
    return [f"up to {texts[0]}", *between, f"above {texts[-1]}"]
