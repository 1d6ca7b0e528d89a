"""What a section is made of. Sections hold data; only the template knows HTML."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from markupsafe import Markup

from memfit.report.units import MISSING, finite


@dataclass(frozen=True)
class Cell:
    """One entry of a table or list: text, an explanation, and how it looks."""

    text: str
    title: str = ""
    tone: str = ""
    """`good`, `bad`, `warn`, `best`, `off`, `muted`, `code` or nothing."""
    bar: float | None = None
    """A share between 0 and 1, drawn as a bar under the text."""


def measured(value: Any, write: Callable[[float], str], missing: str = "not measured") -> Cell:
    """Write a figure, or a dash that explains why there is none."""
    number = finite(value)
    return absent(missing) if number is None else Cell(write(number))


def text_cell(value: Any, missing: str = "not recorded") -> Cell:
    """Write any value as text, or a dash that explains why there is none."""
    if value is None or value == "":
        return absent(missing)
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    return Cell(str(value))


def absent(why: str) -> Cell:
    """A dash whose title says why there is nothing."""
    return Cell(MISSING, title=why, tone="muted")


@dataclass(frozen=True)
class Column:
    """A column's heading; numbers are set to the right."""

    label: str
    number: bool = False
    title: str = ""


@dataclass(frozen=True)
class Row:
    """A table's row; the marked one stands out."""

    cells: tuple[Cell, ...]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table that scrolls within its own box."""

    kind: ClassVar[str] = "table"
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and their values."""

    kind: ClassVar[str] = "facts"
    pairs: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True)
class Key:
    """One entry of a figure's legend."""

    label: str
    colour: str
    line: str = "solid"
    """`solid`, `dashed`, `dot` or `area`."""


@dataclass(frozen=True)
class Figure:
    """An inline SVG; `narrow` replaces it on a phone where a wide one would be too small to read."""

    kind: ClassVar[str] = "figure"
    title: str
    svg: Markup
    caption: str = ""
    legend: tuple[Key, ...] = ()
    narrow: Markup | None = None


@dataclass(frozen=True)
class Gallery:
    """Figures of one size side by side, on a phone below each other."""

    kind: ClassVar[str] = "gallery"
    figures: tuple[Figure, ...]

    @property
    def num_columns(self) -> int:
        """Columns on a wide screen: those that leave the fewest places empty in the last row."""
        number = len(self.figures)
        return number if number <= 4 else min((3, 4), key=lambda columns: -number % columns)


@dataclass(frozen=True)
class Note:
    """A paragraph. Tones: nothing, `good`, `warn`, `bad`, `pending`."""

    kind: ClassVar[str] = "note"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Heading:
    """A heading inside a section, with an optional word beside it."""

    kind: ClassVar[str] = "heading"
    text: str
    aside: str = ""


@dataclass(frozen=True)
class Code:
    """Text to be copied as it stands."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until they are asked for."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: "tuple[Block, ...]"


Block: TypeAlias = Table | Facts | Figure | Gallery | Note | Heading | Code | Details


@dataclass(frozen=True)
class Section:
    """One part of the page; `key` is its anchor."""

    key: str
    title: str
    blocks: tuple[Block, ...]
    lead: str = ""


def pending(key: str, title: str, what: str) -> Section:
    """A section whose files do not exist yet."""
    return Section(key, title, (Note(f"Not yet: {what}.", "pending"),))
