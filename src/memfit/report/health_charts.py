"""Charts of a training's health: gradient norms by layer and epoch, the whole net's curves, singular values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from memfit.report.blocks import Figure, Key
from memfit.report.charts import EpochChart, Line, Stretch, as_point
from memfit.report.history import StageHistory
from memfit.report.plots import COLOURS, NARROW, WIDE, css_colour, new_plot
from memfit.report.run_files import mapping
from memfit.report.units import finite, setting_text, significant

MAX_ROWS = 96
"""Rows of the map; of more layers, those with the same beginning are joined."""
MAX_COLUMNS = {WIDE: 60, NARROW: 24}
MAX_LETTERS = {WIDE: 40, NARROW: 20}
SHADES = 12
_GATE_COLOURS = ("blue", "orange", "green", "violet")

Norms = Mapping[str, Any]
Shade = tuple[str, float]
"""A colour and its opacity."""


def epochs_health(stage: StageHistory) -> list[dict[str, Any]]:
    """Return what was recorded of each of a stage's epochs, in their order; nothing where nothing was."""
    by_epoch = {finite(health.get("epoch")): health for health in stage.health}
    return [by_epoch.get(finite(epoch.get("epoch")), {}) for epoch in stage.epochs]


@dataclass(frozen=True)
class Bounds:
    """Gradient norms below and above which training warns."""

    low: float
    high: float

    @classmethod
    def of(cls, stages: Sequence[StageHistory]) -> "Bounds":
        """Read them from the first epoch that has them."""
        event: dict[str, Any] = next((health for stage in stages for health in stage.health), {})
        low, high = finite(event.get("vanishing_below")) or 0.0, finite(event.get("exploding_above")) or 0.0
        return cls(low if low > 0 else 1e-3, high if high > 0 else 100.0)

    def tone(self, norm: float | None) -> str:
        """Return how a norm stands out in a table."""
        return "" if norm is None or self.low <= norm <= self.high else "warn" if norm < self.low else "bad"


def norm_map(stages: Sequence[StageHistory]) -> Figure | None:
    """Draw each layer's gradient norm over the epochs of all stages, on a log scale of shades."""
    columns: list[Norms] = [mapping(health, "layers") for stage in stages for health in epochs_health(stage)]
    joined, depth = _joined(columns)
    names = list(dict.fromkeys(name for column in joined for name in column))[:MAX_ROWS]
    rows = [[as_point(column.get(name)) for column in joined] for name in names]
    known = [norm for row in rows for norm in row if not math.isnan(norm)]
    if not known:
        return None
    bounds = Bounds.of(stages)
    shade = _shades(known, bounds)
    drawn = [_draw_map(f"norms-{width:.0f}", width, names, rows, shade, stages) for width in (WIDE, NARROW)]
    legend = [Key("weak to strong", css_colour("blue"), "area")]
    if min(known) < bounds.low:
        legend.append(Key(f"below {setting_text(bounds.low)}", css_colour("orange"), "area"))
    if max(known) > bounds.high:
        legend.append(Key(f"above {setting_text(bounds.high)}", css_colour("red"), "area"))
    caption = f"From {significant(min(known), 2)} to {significant(max(known), 2)}; shades are even on a log scale."
    caption += f" Layers are joined by the first {depth} parts of their names." if depth else ""
    return Figure("Gradient norm by layer and epoch", drawn[0], caption, tuple(legend), drawn[1])


def _joined(columns: Sequence[Norms]) -> tuple[list[Norms], int]:
    """Join layers by the beginnings of their names until there are few enough; return the parts that are left, or 0."""
    names = {name for column in columns for name in column}
    deepest = max((name.count(".") + 1 for name in names), default=0)
    for depth in range(deepest, 0, -1):
        if len({_cut(name, depth) for name in names}) <= MAX_ROWS or depth == 1:
            return (list(columns), 0) if depth == deepest else ([_sums(column, depth) for column in columns], depth)
    return list(columns), 0


def _cut(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def _sums(column: Norms, depth: int) -> Norms:
    """Return the norms of the layers' gradients taken together."""
    squares: dict[str, float] = {}
    for name, norm in column.items():
        cut = _cut(name, depth)
        squares[cut] = squares.get(cut, 0.0) + as_point(norm) ** 2
    return {name: math.sqrt(square) for name, square in squares.items()}


def _shades(known: Sequence[float], bounds: Bounds) -> Callable[[float], Shade | None]:
    """Return how a norm is drawn: what lies within the bounds is blue, the stronger the larger."""
    logs = [math.log(norm) for norm in known if bounds.low <= norm <= bounds.high]
    low, reach = min(logs, default=0.0), max(logs, default=0.0) - min(logs, default=0.0)

    def shade(norm: float) -> Shade | None:
        if math.isnan(norm):
            return None
        if not bounds.low <= norm <= bounds.high:
            return ("orange" if norm < bounds.low else "red"), 0.8
        place = (math.log(norm) - low) / reach if reach else 1.0
        return "blue", round(0.1 + 0.85 * round(place * SHADES) / SHADES, 3)

    return shade


def _draw_map(
    name: str,
    width: float,
    names: Sequence[str],
    rows: Sequence[Sequence[float]],
    shade: Callable[[float], Shade | None],
    stages: Sequence[StageHistory],
) -> Markup:
    stretch = Stretch([stage.name for stage in stages], [len(stage.epochs) for stage in stages])
    letters = MAX_LETTERS[width]
    with new_plot(width, 70 + len(names) * (15 if len(names) <= 40 else 11)) as plot:
        axes = plot.axes
        _paint(axes, rows, shade, -(-stretch.total // MAX_COLUMNS[width]))
        for start in stretch.starts[1:]:
            axes.axvline(start + 0.5, color=COLOURS["ink"], linewidth=0.9, linestyle=(0, (2, 2)))
        axes.set_xlim(0.5, stretch.total + 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        labels = [each if len(each) <= letters else "…" + each[1 - letters :] for each in names]
        axes.set_yticks(range(len(names)), labels, fontsize=9.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False)
        axes.set_xlabel("epoch, all stages" if len(stages) > 1 else "epoch")
        axes.xaxis.set_major_locator(MaxNLocator(10 if width > NARROW else 5, integer=True))
        return plot.svg(name, f"Gradient norms of {len(names)} layers over {stretch.total} epochs.")


def _paint(axes: Axes, rows: Sequence[Sequence[float]], shade: Callable[[float], Shade | None], stride: int) -> None:
    """Draw one path per shade; neighbours of one shade are one rectangle, and of `stride` epochs the last is shown."""
    corners: dict[Shade, list[tuple[float, float]]] = {}
    for place, row in enumerate(rows):
        ends = [min(start + stride, len(row)) for start in range(0, len(row), stride)]
        left = 0.5
        for colour, run in groupby(ends, key=lambda end, row=row: shade(row[end - 1])):  # type: ignore[misc]
            right = list(run)[-1] + 0.5
            if colour is not None:
                top, bottom = place - 0.44, place + 0.44
                box = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
                corners.setdefault(colour, []).extend(box)
            left = right
    for (colour_name, opacity), points in corners.items():
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * (len(points) // 5)
        patch = PathPatch(Path(points, codes), facecolor=COLOURS[colour_name], alpha=opacity, linewidth=0)
        axes.add_patch(patch)


def net_charts(stages: Sequence[StageHistory]) -> list[Figure]:
    """Draw the whole net's gradient norm, its ratio to the weights and the weights' norm by epoch."""
    charts = [
        ("norm", "Gradient norm", (("largest", "orange", "gradient_norm_max"), ("mean", "blue", "gradient_norm"))),
        ("ratio", "Gradient norm / weight norm", (("mean", "violet", "ratio"),)),
        ("weights", "Weight norm", (("at the epoch's end", "green", "weight_norm"),)),
    ]
    figures = []
    for key, title, curves in charts:
        lines = [
            Line(label, colour, [_of_total(stage, figure) for stage in stages]) for label, colour, figure in curves
        ]
        figures.append(EpochChart(f"health-{key}", title, stages, lines, ring=False).figure())
    return [figure for figure in figures if figure]


def _of_total(stage: StageHistory, figure: str) -> list[float]:
    return [as_point(mapping(health, "total").get(figure)) for health in epochs_health(stage)]


def singular_charts(stages: Sequence[StageHistory]) -> list[Figure]:
    """Draw the largest singular value of each recurrent matrix by gate; of one gate, the median and smallest too."""
    gates: dict[str, dict[str, None]] = {}
    for stage in stages:
        for health in stage.health:
            for matrix, found in mapping(health, "recurrent").items():
                gates.setdefault(matrix, {}).update(dict.fromkeys(found if isinstance(found, dict) else ()))
    figures = []
    for index, (matrix, named) in enumerate(gates.items()):
        curves = [(gate, gate, 0) for gate in list(named)[: len(_GATE_COLOURS)]]
        if len(curves) == 1:
            curves = [(name, curves[0][0], place) for place, name in enumerate(("largest", "median", "smallest"))]
        lines = [
            Line(label, colour, [_singular(stage, matrix, gate, place) for stage in stages])
            for (label, gate, place), colour in zip(curves, _GATE_COLOURS, strict=False)
        ]
        chart = EpochChart(f"singular-{index}", matrix, stages, lines, ring=False)
        figures.append(chart.figure(wide=len(gates) == 1))
    return [figure for figure in figures if figure]


def _singular(stage: StageHistory, matrix: str, gate: str, place: int) -> list[float]:
    found = [mapping(health, "recurrent", matrix).get(gate) for health in epochs_health(stage)]
    return [as_point(values[place]) if isinstance(values, list) and len(values) == 3 else math.nan for values in found]
