"""What a Parquet file says of itself, checked before anything of it is decoded."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from memfit.data.limits import MAX_COLUMNS, MAX_FOOTER_BYTES, MAX_PARQUET_EXPANSION, MIB, check_expansion
from memfit.errors import DataError

MAGIC = b"PAR1"


@dataclass(frozen=True)
class Stated:
    """What the metadata state; pages may differ."""

    rows: int
    decoding_bytes: int
    """What the wanted columns' largest chunks take, compressed and not."""


def check_footer(path: Path) -> None:
    """Refuse a footer that is larger than any table needs, before it is parsed. Raises: DataError."""
    with path.open("rb") as opened:
        opened.seek(max(path.stat().st_size - 8, 0))
        end = opened.read(8)
    size = int.from_bytes(end[:4], "little")
    if end[4:] == MAGIC and size > MAX_FOOTER_BYTES:
        raise DataError(
            f"{path}: a footer of {size:,} bytes; expected at most {MAX_FOOTER_BYTES // MIB} MiB. Write it with fewer "
            "columns or row groups"
        )


def check_metadata(path: Path, metadata: pyarrow.parquet.FileMetaData, wanted: Collection[str]) -> Stated:
    """Refuse a table that is too wide, or that expands too far. Raises: DataError."""
    if metadata.num_columns > MAX_COLUMNS:
        raise DataError(f"{path}: {metadata.num_columns} columns; expected at most {MAX_COLUMNS}. Drop the others")
    leaves = [index for index in range(metadata.num_columns) if _belongs(metadata.schema.column(index).path, wanted)]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    rows = max(metadata.num_rows, sum(_stated(group.num_rows) for group in groups))
    plain_bytes, largest = 0, dict.fromkeys(leaves, 0)
    for group in groups:
        for index in leaves:
            chunk = group.column(index)
            plain = _stated(chunk.total_uncompressed_size)
            plain_bytes += plain
            largest[index] = max(largest[index], plain + _stated(chunk.total_compressed_size))
    check_expansion(path, max(plain_bytes, 8 * rows * len(wanted)), MAX_PARQUET_EXPANSION)
    return Stated(rows, sum(largest.values()))


def _belongs(leaf: str, wanted: Collection[str]) -> bool:
    return leaf in wanted or any(leaf.startswith(f"{name}.") for name in wanted)


def _stated(number: Any) -> int:
    """Read a count that a file states: none is below zero."""
    return max(int(number), 0)
