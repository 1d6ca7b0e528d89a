"""The health of the training: gradients by layer, warnings in plain words, weights, recurrent singular values."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from memfit.report.blocks import (
    Block,
    Cell,
    Column,
    Details,
    Gallery,
    Heading,
    Note,
    Row,
    Section,
    Table,
    absent,
    measured,
    pending,
)
from memfit.report.health_charts import Bounds, net_charts, norm_map, singular_charts
from memfit.report.history import StageHistory
from memfit.report.run_files import Run, mapping, objects
from memfit.report.units import count_text, finite, setting_text, significant

MAX_NAMED = 6
"""Layers that a note names."""
MAX_OPEN_ROWS = 40
"""Rows of a table that is not folded away."""
MAX_OPEN_CHARTS = 4
_ADVICE = {
    "not_finite": (
        "gradients were not finite",
        "Lower lr, set clip, or train in fp32 or bf16; a layer that divides or takes a logarithm may meet a zero.",
    ),
    "exploding": (
        "gradient norms were high",
        "Set clip, lower lr or warm it up for longer; normalization keeps what layers pass on in bounds.",
    ),
    "vanishing": (
        "gradient norms were low, so that little is learned there",
        "Normalization, skip connections or fewer layers bring them up; AdamW, which scales each weight by itself, "
        "suffers less than SGD. Small layers, and all layers late in a training, have low norms by nature.",
    ),
    "no_gradient": (
        "there was no gradient at all",
        "The loss does not depend on these layers: leave them out, freeze them by train, or look at its weights.",
    ),
    "dead_units": (
        "half or more of the units had no gradient",
        "They learn nothing, as a ReLU does not whose input is always negative: lower lr, take GELU or SiLU, or "
        "take a narrower layer.",
    ),
}
_WEIGHT_FIGURES = ("weight_norm", "mean", "std", "min", "max")
_NOT_RECORDED = "Not recorded: these stages were trained by a version of memfit that did not watch their health."


def health(run: Run) -> Section:
    """Show how gradients and weights fared in the training."""
    title = "Health of the training"
    if not any(stage.epochs for stage in run.stages):
        return pending("health", title, "no epoch has ended")
    stages = [stage for stage in run.stages if stage.health]
    if not stages:
        return Section("health", title, (Note(_NOT_RECORDED),))
    bounds = Bounds.of(stages)
    blocks: list[Block] = list(_notes(stages, bounds))
    layers = norm_map(stages)
    blocks += [layers] if layers else []
    figures = net_charts(stages)
    blocks += [Heading("The whole net", "by epoch"), Gallery(tuple(figures))] if figures else []
    blocks += _singular_blocks(stages)
    blocks += _weight_blocks(stages, bounds)
    lead = "Gradients before clipping, in a few steps of each epoch; weights at its end. Frozen layers are left out."
    return Section("health", title, tuple(blocks), lead)


def _notes(stages: Sequence[StageHistory], bounds: Bounds) -> Iterator[Note]:
    """Sum up the warnings: one note per stage and kind."""
    calm = True
    for stage in stages:
        found: dict[str, dict[int, list[str]]] = {}
        for event in stage.health:
            for warning in objects(event.get("warnings")):
                layers = warning.get("layers")
                named = [str(layer) for layer in layers] if isinstance(layers, list) else []
                found.setdefault(str(warning.get("kind")), {})[int(finite(event.get("epoch")) or 0)] = named
        last = int(finite(stage.health[-1].get("epoch")) or 0)
        for kind, by_epoch in found.items():
            calm = False
            yield _note(stage.name, kind, by_epoch, still=last in by_epoch, bounds=bounds)
    if calm:
        inside = f"between {setting_text(bounds.low)} and {setting_text(bounds.high)}"
        yield Note(f"No warnings: every layer got a gradient, and the norms lay {inside}.", "good")


def _note(stage: str, kind: str, by_epoch: dict[int, list[str]], *, still: bool, bounds: Bounds) -> Note:
    what, advice = _ADVICE.get(kind, (kind.replace("_", " "), ""))
    limit = {"vanishing": f" (below {setting_text(bounds.low)})", "exploding": f" (above {setting_text(bounds.high)})"}
    layers = by_epoch[max(by_epoch)]
    where = "the whole net" if not layers else ", ".join(layers[:MAX_NAMED])
    where += f" and {len(layers) - MAX_NAMED} more layers" if layers[MAX_NAMED:] else ""
    if kind == "vanishing" and not layers:
        advice = "Nothing is left to learn, or the loss is flat: stop earlier (patience), or look at lr and the loss."
    tone = ("bad" if kind == "not_finite" else "warn") if still else ""
    when = f"{_epochs(sorted(by_epoch))}{'' if still else ', but no longer in the last one'}"
    return Note(f"Stage {stage}, {when}: {what}{limit.get(kind, '')} in {where}. {advice}".strip(), tone)


def _epochs(epochs: Sequence[int]) -> str:
    """Write epochs as ranges: 1–3, 7."""
    starts = [epochs[0], *(later for earlier, later in pairwise(epochs) if later != earlier + 1)]
    ends = [*(earlier for earlier, later in pairwise(epochs) if later != earlier + 1), epochs[-1]]
    ranges = [f"{start}–{end}" if end > start else str(start) for start, end in zip(starts, ends, strict=True)]
    shown = ", ".join(ranges[:MAX_NAMED]) + (", …" if ranges[MAX_NAMED:] else "")
    return f"epoch{'s' if len(epochs) > 1 else ''} {shown}"


def _singular_blocks(stages: Sequence[StageHistory]) -> list[Block]:
    figures = singular_charts(stages)
    if not figures:
        return []
    explained = (
        "By how much one time step can stretch a state: well above 1, gradients may explode over many steps; well "
        "below, they vanish, which does not show in a layer's gradient norm, the sum over all steps. An LSTM whose "
        "forget gate starts open (a bias of 1 or more) holds on for longer than a plain RNN."
    )
    blocks: list[Block] = [
        Heading("Recurrent weights", "largest singular value, by gate and epoch"),
        Note(explained),
        figures[0] if len(figures) == 1 else Gallery(tuple(figures[:MAX_OPEN_CHARTS])),
    ]
    if figures[MAX_OPEN_CHARTS:]:
        blocks.append(Details("Further recurrent weights", (Gallery(tuple(figures[MAX_OPEN_CHARTS:])),)))
    tables = [(stage.name, _singular_table(stage)) for stage in stages]
    return blocks + [_folded(table, f"Singular values of {name}", 12) for name, table in tables if table.rows]


def _singular_table(stage: StageHistory) -> Table:
    names = ("Matrix", "Gate", "Largest", "Median", "Smallest")
    rows = []
    for matrix, gates in mapping(stage.newest_health, "recurrent").items():
        for gate, values in mapping(gates).items():
            three = values if isinstance(values, list) and len(values) == 3 else [None] * 3
            cells = [measured(value, _figure, "not finite") for value in three]
            rows.append(Row((Cell(matrix), Cell(gate), *cells)))
    caption = f"Singular values after {_last_epoch(stage)}."
    return Table(tuple(Column(name, number=name not in names[:2]) for name in names), tuple(rows), caption)


def _weight_blocks(stages: Sequence[StageHistory], bounds: Bounds) -> list[Block]:
    """Show each stage's last epoch in a table, the newest stage's first."""
    tables = [(stage, _weight_table(stage, bounds)) for stage in reversed(stages) if stage.newest_health]
    if not tables:
        return []
    blocks: list[Block] = [Heading("Layers", "after a stage's last epoch")]
    for place, (stage, table) in enumerate(tables):
        blocks.append(_folded(table, f"Layers of {stage.name}", 0 if place else MAX_OPEN_ROWS))
    return blocks


def _folded(table: Table, summary: str, most: int) -> Block:
    return table if len(table.rows) <= most else Details(f"{summary}, {len(table.rows)} rows", (table,))


def _weight_table(stage: StageHistory, bounds: Bounds) -> Table:
    columns = (
        Column("Layer"),
        Column("Gradient norm", number=True, title="mean over the steps that were looked at"),
        Column("Largest", number=True, title="largest gradient norm of these steps"),
        Column("To weights", number=True, title="gradient norm / weight norm; the bar is on a log scale"),
        Column("Weight norm", number=True),
        *(Column(name, number=True, title="of the weights, biases left out") for name in ("Mean", "Std", "Min", "Max")),
        Column("Dead units", number=True, title="rows of weights without gradient in all of these steps"),
    )
    layers = mapping(stage.newest_health, "layers")
    ratios = [ratio for name in layers if (ratio := finite(mapping(layers, name).get("ratio")) or 0.0) > 0]
    rows = tuple(_weight_row(name, mapping(layers, name), bounds, ratios) for name in layers)
    steps = finite(stage.newest_health.get("sampled_steps"))
    looks = "" if steps is None else f", gradients of {count_text(steps)} of its steps"
    return Table(columns, rows, f"Stage {stage.name} after {_last_epoch(stage)}{looks}.")


def _weight_row(name: str, figures: dict[str, Any], bounds: Bounds, ratios: Sequence[float]) -> Row:
    norms = [finite(figures.get(key)) for key in ("gradient_norm", "gradient_norm_max")]
    ratio = finite(figures.get("ratio"))
    to_weights = measured(ratio, _figure, "undefined: the weights are zero, or no gradient was finite")
    if ratio is not None and ratio > 0:
        to_weights = Cell(_figure(ratio), bar=_place(ratio, ratios))
    return Row(
        (
            Cell(name),
            *(measured(norm, _figure, "not finite") if norm is None else _norm(norm, bounds) for norm in norms),
            to_weights,
            *(
                measured(figures.get(key), _figure, "not finite")
                for key in ("weight_norm", "mean", "std", "min", "max")
            ),
            _dead(finite(figures.get("dead_units")), finite(figures.get("num_units"))),
        )
    )


def _norm(norm: float, bounds: Bounds) -> Cell:
    return Cell(_figure(norm), tone=bounds.tone(norm))


def _place(ratio: float, ratios: Sequence[float]) -> float:
    """Return where a ratio lies between a tenth of the smallest and the largest, on a log scale."""
    low, high = math.log(min(ratios)) - math.log(10), math.log(max(ratios))
    return (math.log(ratio) - low) / (high - low)


def _dead(dead: float | None, units: float | None) -> Cell:
    if dead is None or not units:
        return absent("it has no units" if units == 0 else "not recorded")
    return Cell(f"{count_text(dead)} of {count_text(units)}", tone="warn" if dead >= units / 2 else "")


def _last_epoch(stage: StageHistory) -> str:
    return f"epoch {count_text(finite(stage.newest_health.get('epoch')) or 0)}"


def _figure(value: float) -> str:
    return significant(value, 3)
