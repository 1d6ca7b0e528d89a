"""A column of text in Parquet files, read batch by batch; first in a child, as what their metadata say may be false."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from memfit.data.parquet import Stated, check_footer, check_metadata
from memfit.data.spec import nearest
from memfit.data.trial import limit_memory, try_files
from memfit.errors import DataError
from memfit.process import Emit

BATCH_ROWS = 64
BUFFER_BYTES = 1 << 20
"""What is read of a column's compressed pages at once; without it Arrow reads a whole row group's."""


def text_batches(path: Path, name: str) -> Iterator[tuple[float, int, Any]]:
    """Yield the share of rows that is read, the row, counted from 1, and what its column holds.

    Raises: DataError for a table without such a column of text; pa.ArrowException or OSError where it cannot be read.
    """
    row = 0
    with _open(path) as opened:
        stated = _check(path, opened, name)
        for batch in opened.iter_batches(BATCH_ROWS, columns=[name], use_threads=False):
            for row, value in enumerate(batch.column(0), row + 1):  # noqa: B020
                yield row / max(stated.rows, row), row, _plain(value, path, row)


def _plain(value: pa.Scalar, path: Path, row: int) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {row}: no UTF-8; expected text. Repair or remove the row") from error


def _open(path: Path) -> pa.parquet.ParquetFile:
    check_footer(path)
    return pa.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES)


def _check(path: Path, opened: pa.parquet.ParquetFile, name: str) -> Stated:
    schema = opened.schema_arrow
    if schema.names.count(name) != 1:
        raise DataError(
            f"{path}: expected one column {name!r}{nearest(name, schema.names)}, got {schema.names!r:.200}. "
            "Set source.field"
        )
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{path}: column {name!r} has the type {kind}; expected text. Set source.field")
    return check_metadata(path, opened.metadata, [name])


def try_text_columns(paths: Sequence[Path], name: str) -> None:
    """Decode the files in a child, so that this process may do it in bounded memory and time.

    Raises: DataError where one takes more than its metadata account for, or cannot be read.
    """
    told = {path: _stated(path, name) for path in paths}
    try_files("memfit.data.text_columns:run", {"column": name}, told, num_columns=1)


def _stated(path: Path, name: str) -> Stated:
    try:
        with _open(path) as opened:
            return _check(path, opened, name)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    """Say what a library said of a file."""
    return DataError(f"{path} cannot be read: {error!s:.200}. Check that it is whole and what its suffix says")


def run(job: dict[str, Any], emit: Emit) -> None:
    """Decode a column of every file to its end, within so many bytes above what this process holds.

    job: files [[path, bytes]], column.
    """
    for name, num_bytes in job["files"]:
        emit({"event": "phase", "phase": name})
        limit_memory(num_bytes)
        path = Path(name)
        try:
            for _ in text_batches(path, job["column"]):
                pass
        except (pa.ArrowException, OSError) as error:
            raise unreadable(path, error) from error
