"""The needed columns of one CSV or Parquet file, read batch by batch in bounded memory."""

import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from memfit.data.limits import HARMLESS_BYTES, MAX_COLUMNS, MAX_GZIP_EXPANSION, MIB, Room, check_expansion
from memfit.data.parquet import Stated, check_footer, check_metadata
from memfit.data.spec import nearest
from memfit.errors import DataError

CSV_SUFFIXES = (".csv", ".csv.gz")
PARQUET_SUFFIXES = (".parquet", ".pq")
CSV_BLOCK_BYTES = 1 << 20
"""A CSV row longer than this is refused, whatever the file's size."""
BATCH_ROWS = 1 << 16
MISSING = ("", "na", "n/a", "nan", "null", "none", "nat", "-nan", "<na>", "#n/a")
FULL_DATE = r"\s*\d{4}-\d\d-\d\d"


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read, and which rows: all, or those where a text column says so."""

    time: str
    numbers: tuple[str, ...]
    only: tuple[str, str] | None = None

    @property
    def names(self) -> list[str]:
        """Every column that must be there."""
        return [self.time, *self.numbers, *([self.only[0]] if self.only else [])]


@dataclass(frozen=True)
class Table:
    """The rows of one file, in the file's order: UTC nanoseconds [N] and numbers [N, columns]; NaN is missing."""

    times: NDArray[np.int64]
    numbers: NDArray[np.float64]


def read_table(path: Path, columns: Columns, room: Room | None = None, *, until_unsorted: bool = False) -> Table:
    """Read the columns of a file; `room`, where it is given, says how many rows there may be.

    With `until_unsorted` reading ends after the first batch whose times do not rise, for a caller that refuses them.
    Raises DataError for an unreadable file, a missing column, a wrong type, an unparsable time, or more rows than there
    is room for; the message names the row, counted from 1 after the header, and its text.
    """
    room = room or Room(1 + len(columns.numbers))
    times: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    numbers: list[NDArray[np.float64]] = [np.empty((0, len(columns.numbers)))]
    for batch in parsed_batches(path, columns):
        room.take(len(batch.times), str(path))
        times.append(batch.times)
        numbers.append(batch.numbers)
        if until_unsorted and (np.diff(np.concatenate([*times[-2:-1], batch.times])) <= 0).any():
            break
    return Table(np.concatenate(times), np.concatenate(numbers))


def parsed_batches(path: Path, columns: Columns) -> Iterator[Table]:
    """Read a file piece by piece. Raises: DataError as `read_table`."""
    first_row = 1
    try:
        for batch in _batches(path, columns):
            keep = _kept(batch, columns.only)
            place = _Place(path, first_row)
            times = _parse_times(batch.column(columns.time), columns.time, place)[keep]
            parsed = [_parse_numbers(batch.column(name), name, place) for name in columns.numbers]
            yield Table(times, np.stack(parsed, axis=1)[keep])
            first_row += batch.num_rows
    except MemoryError as error:
        raise DataError(
            f"{path}: a batch of {BATCH_ROWS:,} rows takes more memory than there is for it ({error}); expected "
            "numbers and short texts. Check where it comes from"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def check_start(path: Path, columns: Columns) -> None:
    """Refuse what a file's header or metadata show already, without reading on. Raises: DataError."""
    if is_parquet(path):
        Room(1 + len(columns.numbers)).take(stated(path, columns).rows, str(path))
        return
    try:
        with _open_checked_csv(path, columns):
            pass
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def hash_table(path: Path) -> str:
    """Hash a file's bytes (SHA-256); a CSV file only as far as its lines are short. Raises: DataError; OSError."""
    digest, in_lines = hashlib.sha256(), path.name.lower().endswith(".csv")
    with path.open("rb") as opened:
        while piece := opened.read(CSV_BLOCK_BYTES):
            if in_lines and len(piece) == CSV_BLOCK_BYTES and b"\n" not in piece and b"\r" not in piece:
                raise _too_long(path)
            digest.update(piece)
    return digest.hexdigest()


def is_parquet(path: Path) -> bool:
    """Tell a Parquet file from a CSV one by its name."""
    return path.name.lower().endswith(PARQUET_SUFFIXES)


def stated(path: Path, columns: Columns) -> Stated:
    """Read what a Parquet file states of itself. Raises: DataError where it will not do."""
    try:
        with _open_parquet(path) as opened:
            _check_columns(path, opened.schema_arrow.names, columns.names)
            return check_metadata(path, opened.metadata, columns.names)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


@dataclass(frozen=True)
class _Place:
    path: Path
    first_row: int

    def row(self, index: int) -> str:
        return f"{self.path}, row {self.first_row + index}"


def _batches(path: Path, columns: Columns) -> Iterator[pa.RecordBatch]:
    if is_parquet(path):
        stated(path, columns)
        with _open_parquet(path) as opened:
            yield from opened.iter_batches(BATCH_ROWS, columns=columns.names, use_threads=False)
        return
    with _open_checked_csv(path, columns) as opened:
        yield from opened


def _open_parquet(path: Path) -> pa.parquet.ParquetFile:
    check_footer(path)
    return pa.parquet.ParquetFile(path)


def _open_checked_csv(path: Path, columns: Columns) -> pa.csv.CSVStreamingReader:
    _check_header(path)
    with _open_csv(path, pa.csv.ConvertOptions()) as opened:
        _check_columns(path, opened.schema.names, columns.names)
    as_text = {name: pa.string() for name in columns.names}
    return _open_csv(path, pa.csv.ConvertOptions(include_columns=columns.names, column_types=as_text))


def _check_header(path: Path) -> None:
    """Refuse a header of too many columns before Arrow makes a reader for each of them."""
    with pa.input_stream(path) as opened:
        head = opened.read(CSV_BLOCK_BYTES).decode("utf-8-sig", errors="replace")
    try:
        names = next(filter(None, csv.reader(io.StringIO(head, newline=""))), [])
    except csv.Error as error:  # a name of more than 128 KiB
        raise _too_long(path) from error
    if len(names) > MAX_COLUMNS:
        raise DataError(f"{path}: {len(names)} columns; expected at most {MAX_COLUMNS}. Drop the others")


class _Gunzipped(io.RawIOBase):
    """A gzip file's content, as long as it does not expand too far."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._stream, self._num_bytes = path, pa.input_stream(path, compression="gzip"), 0

    def read(self, size: int = -1) -> bytes:
        """Read decompressed bytes. Raises: DataError where there are too many."""
        content: bytes = self._stream.read(size if size >= 0 else None)
        self._num_bytes += len(content)
        if self._num_bytes > HARMLESS_BYTES:
            check_expansion(self._path, self._num_bytes, MAX_GZIP_EXPANSION)
        return content

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        super().close()


def _open_csv(path: Path, convert: pa.csv.ConvertOptions) -> pa.csv.CSVStreamingReader:
    return pa.csv.open_csv(
        _Gunzipped(path) if path.name.lower().endswith(".gz") else path,
        read_options=pa.csv.ReadOptions(block_size=CSV_BLOCK_BYTES, use_threads=False),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=convert,
    )


def _check_columns(path: Path, found: list[str], wanted: list[str]) -> None:
    for name in wanted:
        if name not in found:
            some = ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")
            raise DataError(f"{path}: no column {name!r}{nearest(name, found)}; it has {some}")
        if found.count(name) > 1:
            raise DataError(f"{path}: {found.count(name)} columns are named {name!r}; rename all but one")


def _kept(batch: pa.RecordBatch, only: tuple[str, str] | None) -> NDArray[np.bool_]:
    if only is None:
        return np.ones(batch.num_rows, np.bool_)
    name, wanted = only
    kept: NDArray[np.bool_] = np.asarray(batch.column(name).to_pandas() == wanted, np.bool_)
    return kept


def _parse_times(array: pa.Array, name: str, place: _Place) -> NDArray[np.int64]:
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        stamps = _parse_texts(array.to_pandas().astype("str"), name, place)
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        stamps = pd.to_datetime(array.to_pandas(), utc=True)
    else:
        raise DataError(
            f"{place.path}: column {name!r} has the type {kind}; expected ISO 8601 text or timestamps. "
            "Convert it, for instance with pandas.to_datetime(..., unit='s')"
        )
    if stamps.isna().any():
        index = int(np.argmax(stamps.isna()))
        raise DataError(f"{place.row(index)}: no time in column {name!r}; expected one in every row")
    try:
        nanoseconds = stamps.dt.as_unit("ns").to_numpy(np.dtype("datetime64[ns]"))
    except pd.errors.OutOfBoundsDatetime as error:
        raise DataError(f"{place.path}: column {name!r} holds {error}; expected 1678 to 2261") from error
    times: NDArray[np.int64] = nanoseconds.astype(np.int64)
    return times


def _parse_texts(texts: "pd.Series[str]", name: str, place: _Place) -> "pd.Series[pd.Timestamp]":
    """Parse full ISO 8601 dates; pandas alone would take "now" and "2013" too."""
    full = texts.str.match(FULL_DATE).fillna(value=False).astype(bool)
    stamps = pd.to_datetime(texts.where(full), utc=True, format="ISO8601", errors="coerce")
    if stamps.isna().any():
        index = int(np.argmax(stamps.isna()))
        raise DataError(
            f"{place.row(index)}: {_text(texts.iloc[index])} in column {name!r} is no time; "
            "expected ISO 8601 such as 2013-01-01T06:00:00Z"
        )
    return stamps


def _parse_numbers(array: pa.Array, name: str, place: _Place) -> NDArray[np.float64]:
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    if pa.types.is_null(kind):
        return np.full(len(array), np.nan)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return np.asarray(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{place.path}: column {name!r} has the type {kind}; expected numbers")
    texts = array.to_pandas().astype("str")
    parsed: NDArray[np.float64] = pd.to_numeric(texts, errors="coerce").to_numpy(np.float64)
    missing = texts.isna() | texts.str.strip().str.lower().isin(MISSING)
    bad = np.isnan(parsed) & ~missing.to_numpy(np.bool_)
    if bad.any():
        index = int(np.argmax(bad))
        raise DataError(
            f"{place.row(index)}: {_text(texts.iloc[index])} in column {name!r} is no number; "
            "expected one such as 1.5, or an empty field where the observation is missing"
        )
    return parsed


def _text(value: object) -> str:
    shown = str(value)
    return repr(shown if len(shown) <= 60 else shown[:57] + "...")


def _unreadable(path: Path, error: Exception) -> DataError:
    if "straddling" in str(error) or "cannot infer number of columns" in str(error):
        return _too_long(path)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path} cannot be read: {reason[:200]}. Check that it is whole and what its suffix says")


def _too_long(path: Path) -> DataError:
    limit = f"{CSV_BLOCK_BYTES // MIB} MiB"
    return DataError(f"{path}: a row is longer than {limit}; expected a table of short rows, one a line")
