"""Matplotlib figures as inline SVG that takes its colours and its font from the page around it."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Drawn in these stand-ins, which no other part of a figure uses, and replaced by CSS variables afterwards:
# so one figure serves the light and the dark page.
COLOURS = {
    "ink": "#010203",
    "muted": "#010204",
    "grid": "#010205",
    "paper": "#010206",
    "blue": "#010207",
    "orange": "#010208",
    "green": "#010209",
    "red": "#01020a",
    "violet": "#01020b",
}
NARROW, WIDE = 330.0, 1140.0
HEIGHT = 220.0

_STYLE: Any = {
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 3 / 72,
    "figure.constrained_layout.h_pad": 3 / 72,
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.parse_math": False,
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.7,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
}


class Plot:
    """One pair of axes, and its SVG once it is drawn."""

    def __init__(self, width: float, height: float) -> None:
        self._figure = Figure(figsize=(width / 72, height / 72))
        self.axes: Axes = self._figure.add_subplot()
        self.width = width

    def svg(self, name: str, label: str) -> Markup:
        """Draw the figure. `name` is unique on the page; `label` is read out in the figure's place."""
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
            # A name in a script that the measuring font lacks: the reader's browser draws it all the same.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            self._figure.savefig(drawn, format="svg", metadata=nothing)
        return _inline(drawn.getvalue(), name, label)


@contextmanager
def new_plot(width: float = NARROW, height: float = HEIGHT) -> Iterator[Plot]:
    """Open axes in the page's style; width and height are in CSS pixels at the size meant for reading."""
    with mpl.rc_context(_STYLE):
        yield Plot(width, height)


def css_colour(name: str) -> str:
    """Return the CSS variable of a colour."""
    return f"var(--{name})"


def _inline(svg: str, name: str, label: str) -> Markup:
    """Cut the SVG loose from its file: no prolog, fixed size, fonts, stand-in colours or clashing ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would reach the whole page
    svg = re.sub(r"<[^>]+>", _shorten, svg)
    svg = re.sub(r"(font: *[\d.]+px) [^;\"]+", r"\1 inherit", svg)
    svg = re.sub(r"font-family: *[^;\"]+;? *", "", svg)
    for colour, stand_in in COLOURS.items():
        svg = svg.replace(stand_in, css_colour(colour))
    svg = _own_ids(svg, name)
    root = re.search(r'viewBox="[^"]+"', svg)
    opening = f'<svg {root.group() if root else ""} role="img" aria-label="{escape(label)}">'
    body = re.sub(r">\s+<", "><", svg[svg.index(">") + 1 :].strip())
    return Markup(opening + body)  # noqa: S704  (matplotlib escapes what it draws; the label is escaped here)


def _shorten(tag: re.Match[str]) -> str:
    """Round coordinates to a hundredth of a pixel: half the bytes, the same picture."""
    text = re.sub(r"\s+", " ", tag[0])
    text = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", text)
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), text)


def _own_ids(svg: str, name: str) -> str:
    """Drop the ids that nothing refers to, and put the figure's name before the others."""
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', svg))

    def keep(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    svg = re.sub(r' id="([^"]+)"', keep, svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    return re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
