"""The report's charts of a training: one axis through all stages, so that their curves read as one story."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from memfit.report.blocks import Figure, Key
from memfit.report.history import StageHistory
from memfit.report.plots import COLOURS, HEIGHT, NARROW, WIDE, Plot, css_colour, new_plot
from memfit.report.units import finite, setting_text

MAX_MARKERS = 40
MAX_DRAWN = 500
LARGEST = 1e100
NAN = float("nan")


@dataclass(frozen=True)
class Line:
    """One curve; `parts` holds one list of points per stage, NaN where a figure is missing."""

    label: str
    colour: str
    parts: Sequence[Sequence[float]]
    line: str = "solid"

    @property
    def known(self) -> list[float]:
        """All points that are there."""
        return [point for part in self.parts for point in part if not math.isnan(point)]


def as_point(value: Any) -> float:
    """Return a figure as a point of a line: NaN where there is none, or none that an axis could hold."""
    number = finite(value)
    return NAN if number is None or abs(number) > LARGEST else number


@dataclass(frozen=True)
class Stretch:
    """Where the stages lie on the common axis."""

    names: Sequence[str]
    lengths: Sequence[int]
    starts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index in range(len(self.lengths)):
            self.starts.append(sum(self.lengths[:index]))

    @property
    def total(self) -> int:
        """The length of all stages together."""
        return sum(self.lengths)


@dataclass(frozen=True)
class EpochChart:
    """Curves over the epochs of all stages. `ring` marks each stage's best epoch on the last curve."""

    name: str
    title: str
    stages: Sequence[StageHistory]
    lines: Sequence[Line]
    label: str = ""
    caption: str = ""
    write: Callable[[float], str] = setting_text
    from_zero: bool = False
    ring: bool = True

    def figure(self, *, wide: bool = False) -> Figure | None:
        """Draw the chart; a wide one also in the size of a phone. None where no curve has a point."""
        lines = [line for line in self.lines if line.known]
        if not lines:
            return None
        narrow = self._draw(lines, NARROW, HEIGHT)
        broad = self._draw(lines, WIDE, 280) if wide else None
        legend = [Key(line.label, css_colour(line.colour), line.line) for line in lines]
        if self.ring and any(stage.best_index is not None for stage in self.stages):
            legend.append(Key("best epoch", css_colour(lines[-1].colour), "dot"))
        return Figure(self.title, broad or narrow, self.caption, tuple(legend), narrow if broad else None)

    def _draw(self, lines: Sequence[Line], width: float, height: float) -> Markup:
        stretch = Stretch([stage.name for stage in self.stages], [len(stage.epochs) for stage in self.stages])
        with new_plot(width, height) as plot:
            for line in lines:
                _draw_line(plot.axes, stretch, line)
            if self.ring:
                _ring_best(plot.axes, stretch, self.stages, lines[-1])
            finish_axes(plot.axes, [point for line in lines for point in line.known], self.write, self.from_zero)
            plot.axes.set_xlabel("epoch, all stages" if len(self.stages) > 1 else "epoch")
            plot.axes.set_ylabel(self.label)
            plot.axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            _separate(plot, stretch)
            first, last = self.write(lines[-1].known[0]), self.write(lines[-1].known[-1])
            label = f"{self.title} over {stretch.total} epochs; {lines[-1].label} from {first} to {last}."
            return plot.svg(f"{self.name}-{width:.0f}", label)


def step_figure(
    name: str, title: str, stages: Sequence[StageHistory], series: str, colour: str, *, linear: bool = False
) -> Figure | None:
    """Draw a thinned series over the steps of all stages: its mean, and the band from lowest to highest.

    `linear` starts the scale at zero; otherwise it is logarithmic where the values span much.
    """
    if not any(stage.steps[series].buckets for stage in stages):
        return None
    stretch = Stretch([stage.name for stage in stages], [stage.num_steps for stage in stages])
    drawn: list[float] = []
    banded = False
    with new_plot() as plot:
        for stage, start in zip(stages, stretch.starts, strict=True):
            thinned = stage.steps[series]
            xs = [start + step for step in thinned.steps]
            if thinned.stride > 1:
                banded = True
                plot.axes.fill_between(xs, thinned.lows, thinned.highs, color=COLOURS[colour], alpha=0.22, linewidth=0)
            plot.axes.plot(xs, thinned.means, color=COLOURS[colour], linewidth=1.4, marker=_marker(len(xs)))
            drawn += [*thinned.lows, *thinned.highs]
        finish_axes(plot.axes, drawn, setting_text, from_zero=linear)
        plot.axes.set_xlabel("optimizer step")
        plot.axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _separate(plot, stretch)
        svg = plot.svg(name, f"{title} over {stretch.total} optimizer steps.")
    legend = (Key("mean", css_colour(colour)), Key("lowest to highest", css_colour(colour), "area"))
    return Figure(title, svg, legend=legend if banded else ())


def finish_axes(axes: Axes, known: Sequence[float], write: Callable[[float], str], from_zero: bool) -> None:
    """Choose the vertical scale: logarithmic where positive values span more than a factor of 50."""
    if known and min(known) > 0 and max(known) / min(known) > 50 and not from_zero:
        axes.set_yscale("log")
        axes.minorticks_off()
    elif from_zero:
        axes.set_ylim(0, max([*known, 0.0]) * 1.15 or 1)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value) if abs(value) > 1e-12 else "0"))


def _draw_line(axes: Axes, stretch: Stretch, line: Line) -> None:
    style = "--" if line.line == "dashed" else "-"
    for part, start in zip(line.parts, stretch.starts, strict=True):
        picked = _every(len(part))
        ys = [part[index] for index in picked]
        xs = [start + index + 1.0 for index in picked]
        if style == "--" and xs:  # a level: from the stage's left border to its right one
            xs, ys = [xs[0] - 0.5, *xs, xs[-1] + 0.5], [ys[0], *ys, ys[-1]]
        marker = _marker(stretch.total) if style == "-" else ""
        axes.plot(xs, ys, style, color=COLOURS[line.colour], marker=marker)


def _every(length: int) -> list[int]:
    """Pick at most `MAX_DRAWN` positions, the last included."""
    stride = -(-length // MAX_DRAWN) or 1
    return sorted({*range(0, length, stride), *([length - 1] if length else [])})


def _marker(num_points: int) -> str:
    return "o" if num_points <= MAX_MARKERS else ""


def _ring_best(axes: Axes, stretch: Stretch, stages: Sequence[StageHistory], line: Line) -> None:
    for stage, start, part in zip(stages, stretch.starts, line.parts, strict=True):
        best = stage.best_index
        if best is None or best >= len(part) or math.isnan(part[best]):
            continue
        axes.plot(
            [start + best + 1],
            [part[best]],
            "o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=COLOURS[line.colour],
            markeredgewidth=1.6,
        )


def _separate(plot: Plot, stretch: Stretch) -> None:
    """Draw a line between the stages and write each one's name above its part."""
    total = max(stretch.total, 1)
    plot.axes.set_xlim(0.5 - 0.02 * total, total + 0.5 + 0.02 * total)
    if len(stretch.names) < 2:
        return
    for name, start, length in zip(stretch.names, stretch.starts, stretch.lengths, strict=True):
        if start and length:
            plot.axes.axvline(start + 0.5, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (2, 3)))
        room = int(plot.width * 0.8 * length / total / 6)
        if room >= 3:
            short = name if len(name) <= room else name[: room - 1] + "…"
            plot.axes.annotate(
                short,
                (start + 0.5 + length / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=10,
                color=COLOURS["muted"],
            )
