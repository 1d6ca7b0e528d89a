"""What a series is made of: its source, columns, clock, gaps, splits and features."""

import dataclasses
import difflib
import itertools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from memfit.data.features import feature_names, lookback
from memfit.errors import ConfigError

GAP_POLICIES = ("error", "forward_fill", "interpolate")
T = TypeVar("T")

DEFAULT_CLASS_QUANTILES = (0.2, 0.4, 0.6, 0.8)

MAX_SPAN = 1 << 20
"""Most rows that a window, a lag or a filled gap may span: two years of minutes."""
MAX_ENTRIES = 256
"""Most entries in a list of lags, windows, quantiles or class edges."""
MAX_FEATURES = 1 << 13
"""Most features in all: a piece of them takes half a GiB while they are computed."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the choice nearest to a misspelled name, or nothing."""
    found = difflib.get_close_matches(name, [*choices], n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


@dataclass(frozen=True, kw_only=True)
class FilesSource:
    """CSV (.csv, .csv.gz) or Parquet (.parquet, .pq) files, read in the order of their times."""

    paths: tuple[str, ...]
    """Paths or globs."""
    kind: str = "files"

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "source.paths", "at least one path or glob", self.paths)


@dataclass(frozen=True, kw_only=True)
class SampleSource:
    """A packaged sample of real data."""

    name: str
    airport: str = "JFK"
    kind: str = "sample"


@dataclass(frozen=True, kw_only=True)
class GapPolicy:
    """What happens to missing observations: rows that the clock expects, and values that are NaN."""

    policy: str = "error"
    """"error", "forward_fill" or "interpolate"."""
    limit: int = 6
    """The longest gap, in rows, that is filled; a longer one is an error."""

    def __post_init__(self) -> None:
        known = self.policy in GAP_POLICIES
        require(known, "gaps.policy", f"one of {', '.join(GAP_POLICIES)}", self.policy)
        require(self.limit >= 1, "gaps.limit", "1 or more rows", self.limit)
        require(self.limit <= MAX_SPAN, "gaps.limit", f"at most {MAX_SPAN} rows", self.limit)


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Which features are computed; the defaults give 121 for the value column and 8 for each extra one."""

    lags: tuple[int, ...] = (*range(1, 17), 18, 24, 36, 48, 72, 96, 120, 168)
    """Past values; 1 is the newest known one."""
    difference_lags: tuple[int, ...] = (1, 2, 3, 6, 12, 24, 48, 168)
    """The newest value minus the one so many rows before it."""
    rolling_windows: tuple[int, ...] = (5, 10, 24, 50, 100, 168)
    rolling_statistics: tuple[str, ...] = ("mean", "std", "min", "max", "skew", "zscore", "slope")
    rolling_quantiles: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    calendar: tuple[str, ...] = ("hour", "weekday", "yearday", "weekend")
    """Of minute, hour, weekday, yearday, weekend, elapsed (seconds since the row before); UTC."""
    streak_window: int = 50
    """The longest streak that is counted; 0 for no streaks."""
    share_windows: tuple[int, ...] = (5, 10, 24, 50, 100, 168)
    """Windows in which the share above the threshold is taken."""
    extra_lags: tuple[int, ...] = (1, 2, 3, 6, 24)
    extra_difference_lags: tuple[int, ...] = (1,)
    extra_mean_windows: tuple[int, ...] = (24, 168)

    def __post_init__(self) -> None:
        self._check_lengths()
        try:
            names = feature_names(self.to_dict(), [])
        except ValueError as error:
            raise ConfigError(f"features.{error}") from error
        require(len(names) > 0, "features", "at least one feature of the value column", "none")

    def _check_lengths(self) -> None:
        for name, setting in vars(self).items():
            entries = setting if isinstance(setting, tuple) else (setting,)
            require(len(entries) <= MAX_ENTRIES, f"features.{name}", f"at most {MAX_ENTRIES} entries", len(entries))
            longest = max((entry for entry in entries if isinstance(entry, int)), default=0)
            require(longest <= MAX_SPAN, f"features.{name}", f"at most {MAX_SPAN} rows", longest)

    def count(self, num_extras: int) -> int:
        """Count the features of a series with so many extra columns."""
        own, one = (len(feature_names(self.to_dict(), columns)) for columns in ([], [""]))
        return own + (one - own) * num_extras

    @property
    def lookback(self) -> int:
        """How many rows a feature row depends on."""
        return lookback(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the plain document that `memfit.data.features` takes."""
        return to_document(self)


@dataclass(frozen=True, kw_only=True)
class SeriesSpec:
    """One series to prepare. Raises ConfigError, naming the setting, where a value cannot work."""

    source: FilesSource | SampleSource
    time_column: str
    """ISO 8601 text or Parquet timestamps; a time without a zone is taken as UTC."""
    value_column: str
    extra_columns: tuple[str, ...] = ()
    """Further numeric columns that give features; never predicted."""
    unit: str = ""
    frequency: str = "auto"
    """A pandas offset such as "1h"; "auto" finds it; "irregular" for events without a clock."""
    gaps: GapPolicy = field(default_factory=GapPolicy)
    train_share: float = 0.7
    validation_share: float = 0.15
    context: int = 1000
    """The longest window, in rows."""
    threshold: float = 1.5
    class_edges: tuple[float, ...] | None = None
    """Classes are the intervals between edges, each with its upper edge."""
    class_quantiles: tuple[float, ...] | None = None
    """Shares of the train targets at which the edges lie; fifths where neither is given."""
    features: FeatureSpec = field(default_factory=FeatureSpec)

    def __post_init__(self) -> None:
        columns = [self.time_column, self.value_column, *self.extra_columns]
        require(len(set(columns)) == len(columns), "columns", "each column named once", columns)
        shares = (self.train_share, self.validation_share)
        possible = min(shares) > 0 and sum(shares) < 1
        require(possible, "train_share and validation_share", "two shares that leave a test share", shares)
        require(self.context >= 1, "context", "1 or more rows", self.context)
        require(self.context <= MAX_SPAN, "context", f"at most {MAX_SPAN} rows", self.context)
        count = self.features.count(len(self.extra_columns))
        require(count <= MAX_FEATURES, "features", f"at most {MAX_FEATURES} in all", count)
        require(math.isfinite(self.threshold), "threshold", "a finite number", self.threshold)
        self._check_classes()
        self._check_frequency()

    def _check_classes(self) -> None:
        edges, quantiles = self.class_edges, self.class_quantiles
        require(not (edges and quantiles), "class_edges and class_quantiles", "one of the two", "both")
        for name, cuts in (("class_edges", edges), ("class_quantiles", quantiles)):
            require(len(cuts or ()) <= MAX_ENTRIES, name, f"at most {MAX_ENTRIES} numbers", len(cuts or ()))
            rising = cuts is None or (len(cuts) > 0 and all(a < b for a, b in itertools.pairwise(cuts)))
            require(rising, name, "one or more rising numbers", cuts)
            require(all(map(math.isfinite, cuts or ())), name, "finite numbers", cuts)
        inside = all(0 < q < 1 for q in quantiles or ())
        require(inside, "class_quantiles", "shares between 0 and 1", quantiles)

    def _check_frequency(self) -> None:
        if self.frequency in ("auto", "irregular"):
            return
        import pandas as pd  # 60 MiB and a second that a training process, which only reads arrays, need not pay

        try:
            offset = pd.tseries.frequencies.to_offset(self.frequency)
        except (ValueError, OverflowError) as error:
            raise _wrong("frequency", '"auto", "irregular" or a pandas offset such as "1h"', self.frequency) from error
        require(offset is not None and offset.n > 0, "frequency", "a positive offset", self.frequency)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Build a spec from a JSON-able document; an unknown key is an error that names the nearest one."""
        return build(cls, document, "")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able document that `from_dict` takes."""
        return to_document(self)


def require(holds: bool, setting: str, expected: str, got: object) -> None:
    """Raise ConfigError unless a condition holds."""
    if not holds:
        raise _wrong(setting, expected, got)


def _wrong(setting: str, expected: str, got: object) -> ConfigError:
    return ConfigError(f"{setting}: expected {expected}, got {got!r}")


def to_document(spec: Any) -> dict[str, Any]:
    """Turn a spec into plain dicts, lists and scalars."""
    document: dict[str, Any] = dataclasses.asdict(
        spec, dict_factory=lambda pairs: {key: [*v] if isinstance(v, tuple) else v for key, v in pairs}
    )
    return document


def build(cls: type[T], document: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a document whose keys and types it declares."""
    require(isinstance(document, Mapping), where.rstrip(".") or "series", "a table of settings", document)
    hints = typing.get_type_hints(cls)
    for key in document:
        if key not in hints:
            raise ConfigError(f"{where}{key} is no setting{nearest(key, hints)}; expected {', '.join(hints)}")
    values = {key: _convert(hints[key], value, where + key) for key, value in document.items()}
    for declared in dataclasses.fields(cls):  # type: ignore[arg-type]
        optional = declared.default is not dataclasses.MISSING
        optional |= declared.default_factory is not dataclasses.MISSING
        require(optional or declared.name in values, where + declared.name, "a value", "none")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        return value
    if hint == FilesSource | SampleSource:
        return _convert_source(value, where)
    if isinstance(hint, types.UnionType):  # `tuple[...] | None`
        return None if value is None else _convert(typing.get_args(hint)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, where + ".")
    if typing.get_origin(hint) is tuple:
        require(isinstance(value, list | tuple), where, "a list", value)
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, each, f"{where}.{index}") for index, each in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, hint) and not isinstance(value, bool)
    require(fits, where, {int: "a whole number", float: "a number", str: "text"}[hint], value)
    return value


def _convert_source(value: Any, where: str) -> FilesSource | SampleSource:
    kind = value.get("kind") if isinstance(value, Mapping) else None
    require(kind in ("files", "sample"), where + ".kind", '"files" or "sample"', kind)
    if kind == "files":
        return build(FilesSource, value, where + ".")
    return build(SampleSource, value, where + ".")
