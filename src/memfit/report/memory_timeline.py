"""Memory over one step, stacked by what holds it, against the budget line."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter

from memfit.report.blocks import Figure, Key
from memfit.report.plots import COLOURS, HEIGHT, NARROW, WIDE, css_colour, new_plot
from memfit.report.units import bytes_text, finite

# (colour, opacity) from the bottom up; what stays all step long is darker than what comes and goes.
_LAYERS = {
    "parameters": ("blue", 0.85),
    "buffers": ("blue", 0.35),
    "optimizer_state": ("violet", 0.75),
    "gradients": ("red", 0.7),
    "batch": ("green", 0.85),
    "activations": ("orange", 0.75),
    "temporaries": ("orange", 0.35),
    "workspaces": ("green", 0.35),
}
_MIB = 2**20


def timeline_figure(name: str, plan: Mapping[str, Any]) -> Figure | None:
    """Draw a plan's predicted memory over one step; None where the plan was not simulated."""
    timeline = plan.get("timeline")
    if not isinstance(timeline, Mapping) or not timeline.get("phase"):
        return None
    narrow, broad = (_draw(f"{name}-{width:.0f}", plan, timeline, width) for width in (NARROW, WIDE))
    legend = [Key(layer.replace("_", " "), css_colour(_LAYERS[layer][0]), "area") for layer in _layers(timeline)]
    caption = (
        f"Simulated for {plan.get('device')}, tensors alone: {bytes_text(_peak(timeline) * _MIB)} at the peak. The "
        "dashed line is the budget, which the process as a whole must keep."
    )
    return Figure("Memory over one step", broad, caption, tuple(legend), narrow)


def _draw(name: str, plan: Mapping[str, Any], timeline: Mapping[str, Sequence[Any]], width: float) -> Any:
    with new_plot(width, HEIGHT) as plot:
        _stack(plot.axes, plan, timeline, COLOURS)
        return plot.svg(name, f"Memory over one step, {bytes_text(_peak(timeline) * _MIB)} at the peak.")


def _layers(timeline: Mapping[str, Sequence[Any]]) -> list[str]:
    return [name for name in _LAYERS if name in timeline]


def _peak(timeline: Mapping[str, Sequence[Any]]) -> float:
    return max(map(sum, zip(*(timeline[name] for name in _layers(timeline)), strict=True)))


def _stack(
    axes: Axes, plan: Mapping[str, Any], timeline: Mapping[str, Sequence[Any]], colours: Mapping[str, str]
) -> None:
    moments = range(len(timeline["phase"]))
    floor = [0.0] * len(moments)
    for name in _layers(timeline):
        top = [below + held for below, held in zip(floor, timeline[name], strict=True)]
        colour, opacity = _LAYERS[name]
        axes.fill_between(
            moments, floor, top, color=colours[colour], alpha=opacity, linewidth=0, step="mid", label=name
        )
        floor = top
    budget = (finite(plan.get("budget_bytes")) or 0) / _MIB
    peak = _peak(timeline)
    if budget and budget < 4 * peak:
        axes.axhline(budget, color=colours["ink"], linestyle="--", linewidth=1.2)
    axes.set_ylim(0, 1.1 * max(peak, budget if budget < 4 * peak else 0) or 1)
    axes.set_xlim(0, max(len(moments) - 1, 1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value * _MIB) if value else "0"))
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(timeline["phase"]), 1) if a != b)]
    wide = [(a, b) for a, b in pairwise([*starts, len(moments)]) if b - a > len(moments) / 12]
    axes.set_xticks([(a + b) / 2 for a, b in wide], [_phase(timeline["phase"][a]) for a, _ in wide])
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")


def _phase(name: str) -> str:
    return {"begin": "forward", "optimizer": "update"}.get(name, name)


def save_timelines(plans: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw every plan's memory over one step, one below the other, into a picture file."""
    drawn = [plan for plan in plans if plan.get("timeline", {}).get("phase")]
    picture = Picture(figsize=(10, 3.2 * max(len(drawn), 1)), dpi=120, layout="constrained")
    colours = {
        "ink": "#222222", "blue": "#1763c6", "orange": "#b9510b", "green": "#1b7a3c", "red": "#c4262e",
        "violet": "#7341c2",
    }  # fmt: skip
    for index, plan in enumerate(drawn, 1):
        axes = picture.add_subplot(len(drawn), 1, index)
        _stack(axes, plan, plan["timeline"], colours)
        axes.set_title(
            f"{plan['stage']}: {plan['micro_batch_size']} x {plan['accumulation_steps']} samples, {plan['precision']}, "
            f"checkpointing {plan['checkpointing']}, budget {bytes_text(plan['budget_bytes'])}",
            loc="left",
            fontsize=10,
        )
        axes.legend(loc="upper right", fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path)
