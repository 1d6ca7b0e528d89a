"""Charts of predictions against truth on the test rows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import matplotlib.dates as mdates
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from memfit.metrics.calibration import by_confidence
from memfit.report.alignments import Alignment
from memfit.report.blocks import Figure, Key
from memfit.report.plots import COLOURS, HEIGHT, NARROW, WIDE, Plot, css_colour, new_plot
from memfit.report.run_files import CONFIDENCE
from memfit.report.units import number_text, setting_text

MAX_ROWS = 300
MAX_DOTS = 1000
SHADE = (57, 135, 230)
"""Of pixels, in which no CSS variable can stand: between the page's blue on light and on dark ground."""
Arrays = Mapping[str, NDArray[Any]]


def time_line(arrays: Arrays, unit: str, threshold: float | None) -> Figure:
    """Draw truth and prediction over the last `MAX_ROWS` test rows; a gap in time is a gap in the curves."""
    recent = {name: arrays[name][-MAX_ROWS:] for name in ("times", "truth", "value")}
    num_rows = len(recent["times"])
    legend = [Key("truth", css_colour("ink")), Key("prediction", css_colour("blue"))]
    legend += [Key("threshold", css_colour("red"), "dashed")] if threshold is not None else []
    label = f"Truth and prediction over the last {num_rows} test rows."
    drawn = {}
    for width, height, ticks in ((WIDE, 300.0, 12), (NARROW, 250.0, 5)):
        with new_plot(width, height) as plot:
            _draw_time_line(plot.axes, recent, threshold, ticks)
            plot.axes.set_ylabel(unit)
            drawn[width] = plot.svg(f"timeline-{width:.0f}", label)
    title = f"The last {num_rows} test rows"
    return Figure(title, drawn[WIDE], legend=tuple(legend), narrow=drawn[NARROW])


def _draw_time_line(axes: Axes, recent: Arrays, threshold: float | None, max_ticks: int) -> None:
    times, (truth, value) = _with_gaps(recent["times"], (recent["truth"], recent["value"]))
    axes.plot(times, truth, color=COLOURS["ink"], linewidth=1.2)
    axes.plot(times, value, color=COLOURS["blue"], linewidth=1.6)
    if threshold is not None:
        axes.axhline(threshold, color=COLOURS["red"], linewidth=1.1, linestyle=(0, (4, 3)))
    locator = mdates.AutoDateLocator(minticks=3, maxticks=max_ticks)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    formatter = mdates.ConciseDateFormatter(locator)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_formatter(formatter)
    axes.margins(x=0.01)


def _with_gaps(
    times: NDArray[Any], columns: tuple[NDArray[Any], ...]
) -> tuple[NDArray[Any], list[NDArray[np.float64]]]:
    """Put a NaN where more than three usual steps lie between two rows, so that no line bridges a hole."""
    stamps = times.astype(np.int64)
    steps = np.diff(stamps)
    usual = np.median(steps) if len(steps) else 0
    holes = np.flatnonzero(steps > 3 * usual) + 1
    filled = [np.insert(column.astype(np.float64), holes, np.nan) for column in columns]
    return np.insert(stamps, holes, stamps[holes]).astype("datetime64[ns]"), filled


def scatter(arrays: Arrays, unit: str) -> Figure:
    """Draw predictions over truth, evenly thinned to `MAX_DOTS` rows, with the diagonal of a perfect model."""
    truth, value = _finite_pairs(arrays["truth"], arrays["value"])
    picked = np.linspace(0, len(truth) - 1, min(len(truth), MAX_DOTS)).round().astype(int)
    with new_plot(NARROW, HEIGHT + 20) as plot:
        ends = _range(np.concatenate([truth, value]))
        plot.axes.plot(ends, ends, color=COLOURS["muted"], linewidth=1.1, linestyle=(0, (4, 3)))
        plot.axes.plot(
            truth[picked], value[picked], "o", color=COLOURS["blue"], alpha=0.35, markersize=3.6, markeredgewidth=0
        )
        plot.axes.set_xlabel(f"truth ({unit})" if unit else "truth")
        plot.axes.set_ylabel(f"prediction ({unit})" if unit else "prediction")
        plot.axes.xaxis.set_major_locator(MaxNLocator(6))
        plot.axes.yaxis.set_major_locator(MaxNLocator(6))
        svg = plot.svg("scatter", f"Prediction over truth for {len(picked)} test rows.")
    legend = (Key("one row", css_colour("blue"), "dot"), Key("perfect", css_colour("muted"), "dashed"))
    shown = "" if len(picked) == len(truth) else f"{len(picked):,} of {len(truth):,} rows, evenly spaced."
    return Figure("Prediction over truth", svg, shown, legend)


def errors(arrays: Arrays, unit: str) -> Figure:
    """Draw how the errors spread, the model's beside persistence's, in the same bins."""
    own = _errors(arrays["truth"], arrays["value"])
    rival = _errors(arrays["truth"], arrays["persistence"]) if "persistence" in arrays else own[:0]
    both = np.concatenate([own, rival])
    reach = float(np.quantile(np.abs(both), 0.99)) * 1.1 or 1.0
    bins = np.linspace(-reach, reach, 42)
    with new_plot(NARROW, HEIGHT + 20) as plot:
        if len(rival):
            _stairs(plot, rival, bins, "orange")
        _stairs(plot, own, bins, "blue", fill=True)
        plot.axes.axvline(0, color=COLOURS["muted"], linewidth=0.9)
        plot.axes.set_xlabel(f"prediction − truth ({unit})" if unit else "prediction − truth")
        plot.axes.set_ylabel("rows")
        plot.axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        svg = plot.svg("errors", f"Histogram of {len(own)} errors; mean {number_text(float(own.mean()))}.")
    legend = [Key("model", css_colour("blue"), "area")]
    legend += [Key("persistence", css_colour("orange"))] if len(rival) else []
    bias = f"Mean error {number_text(float(own.mean()))} {unit}".strip()
    return Figure("Errors", svg, f"{bias} (bias); the outermost 1 % is cut off.", tuple(legend))


def probabilities(arrays: Arrays, threshold: float, unit: str) -> Figure | None:
    """Draw which probability of exceeding the threshold was given to rows that did, and to rows that did not."""
    if "exceeds_probability" not in arrays:
        return None
    truth, given = _finite_pairs(arrays["truth"], arrays["exceeds_probability"])
    bins = np.linspace(0, 1, 21)
    above = truth > threshold
    parts = ((above, "truly above", "orange"), (~above, "at or below", "blue"))
    with new_plot(NARROW, HEIGHT + 20) as plot:
        for chosen, _, colour in parts:
            if chosen.any():
                _stairs(plot, given[chosen], bins, colour, fill=True, weight=1 / chosen.sum())
        plot.axes.set_xlabel("probability given")
        plot.axes.set_ylabel("share of such rows")
        plot.axes.yaxis.set_major_locator(MaxNLocator(5))
        svg = plot.svg("probabilities", "Histograms of the probability given to rows above and at or below.")
    legend = tuple(Key(label, css_colour(colour), "area") for _, label, colour in parts)
    caption = f"{int(above.sum()):,} of {len(truth):,} rows are above {setting_text(threshold)} {unit}".rstrip()
    return Figure("Probability of exceeding", svg, f"{caption}. The further apart, the better.", legend)


def reliability_diagram(arrays: Arrays) -> Figure | None:
    """Draw how often the likeliest class was the true one, over the probability that was stated for it."""
    if not {CONFIDENCE, "class", "class_truth"} <= set(arrays) or not np.isfinite(arrays[CONFIDENCE]).all():
        return None
    found = by_confidence(arrays[CONFIDENCE].astype(np.float64), arrays["class"] == arrays["class_truth"])
    there = found.counts > 0
    with new_plot(NARROW, HEIGHT + 20) as plot:
        plot.axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1.1, linestyle=(0, (4, 3)))
        plot.axes.plot(found.confidence[there], found.accuracy[there], color=COLOURS["blue"], linewidth=1.0)
        sizes = 12 + 140 * found.counts[there] / found.counts.sum()
        plot.axes.scatter(found.confidence[there], found.accuracy[there], s=sizes, color=COLOURS["blue"], alpha=0.6)
        plot.axes.set_xlabel("probability stated")
        plot.axes.set_ylabel("share that was right")
        plot.axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        label = f"Share of right answers over stated probability, {int(there.sum())} bins of {found.counts.sum()} rows."
        svg = plot.svg("reliability", label)
    legend = (Key("rows of like confidence", css_colour("blue"), "dot"), Key("honest", css_colour("muted"), "dashed"))
    return Figure("Confidence and truth", svg, "Larger dots hold more rows; below the line: overconfident.", legend)


def mean_alignment(alignment: Alignment) -> Figure:
    """Draw where attention looks on average: the step that is predicted over the row of the history."""
    title = f"Mean of {alignment.count:,} test samples"
    wide = _alignment_map("alignment", title, alignment.mean, alignment, WIDE)
    narrow = _alignment_map("alignment", title, alignment.mean, alignment, NARROW)
    return replace(wide, narrow=narrow.svg)


def sample_alignments(alignment: Alignment, times: NDArray[Any]) -> tuple[Figure, ...]:
    """Draw the same of single samples, named by the time of their first step; times: int64 [n], ns."""
    stamps = np.datetime_as_string(times.astype(np.int64).astype("datetime64[ns]"), unit="m")
    return tuple(
        _alignment_map(f"alignment-{number}", str(stamps[number]).replace("T", " "), weights, alignment, NARROW)
        for number, weights in alignment.samples.items()
        if number < len(stamps)
    )


def _alignment_map(name: str, title: str, weights: NDArray[Any], alignment: Alignment, width: float) -> Figure:
    most = float(weights.max())
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3] = SHADE
    pixels[..., 3] = np.round(255 * weights / (most or 1))
    window, horizon = alignment.window, alignment.horizon
    with new_plot(width, HEIGHT + 20) as plot:
        extent = (-window - 0.5, -0.5, horizon + 0.5, 0.5)
        plot.axes.imshow(pixels, aspect="auto", interpolation="none", extent=extent)
        plot.axes.grid(visible=False)
        plot.axes.set_xlabel("row of the history; −1: the newest")
        plot.axes.set_ylabel("step ahead")
        plot.axes.xaxis.set_major_locator(MaxNLocator(12 if width == WIDE else 6, integer=True))
        plot.axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        svg = plot.svg(f"{name}-{width:.0f}", f"Attention of each of {horizon} steps over {window} rows: {title}.")
    even = number_text(1 / window)
    caption = f"Full colour: a weight of {number_text(most)}; evenly spread weights would be {even} each."
    return Figure(title, svg, caption)


def _stairs(
    plot: Plot, values: NDArray[Any], bins: NDArray[Any], colour: str, fill: bool = False, weight: float = 1
) -> None:
    counts, edges = np.histogram(values, bins)
    counts = counts * weight
    if fill:
        plot.axes.stairs(counts, edges, color=COLOURS[colour], alpha=0.25, fill=True)
    plot.axes.stairs(counts, edges, color=COLOURS[colour], linewidth=1.5)


def _finite_pairs(left: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    known = np.isfinite(left) & np.isfinite(right)
    return left[known].astype(np.float64), right[known].astype(np.float64)


def _errors(truth: NDArray[Any], value: NDArray[Any]) -> NDArray[np.float64]:
    truth, value = _finite_pairs(truth, value)
    return value - truth


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.min()), float(values.max())
