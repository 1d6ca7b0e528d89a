"""What a source may ask of this machine: bytes, columns, rows, and how far a compressed file may expand."""

from dataclasses import dataclass, field
from pathlib import Path

from memfit.errors import DataError
from memfit.memory.host import host_memory

MIB = 1 << 20
MAX_FILE_BYTES = 1 << 36
"""Largest file of a source: 64 GiB. 50 million rows of 20 columns take about 10 GiB as CSV."""
MAX_COLUMNS = 1 << 13
"""Most columns of a file, used or not: a CSV reader takes 9 KiB for each."""
MAX_VALUES = 1 << 31
"""Most times and numbers that are read, over all files: 16 GiB. 50 million rows of 20 columns are half of it."""
HARMLESS_BYTES = 256 * MIB
"""What any compressed file may expand to."""
MAX_GZIP_EXPANSION = 200
"""How many times its size a larger gzip file may expand to; 20 columns of text come to 40 at most, gzip can 1,030."""
MAX_PARQUET_EXPANSION = 1000
"""The same for Parquet, whose encodings store a constant column in nothing."""
MAX_FOOTER_BYTES = 32 * MIB
"""Largest footer of a Parquet file: 20 columns in 10,000 row groups take 20 MiB."""
BATCH_BYTES = 512 * MIB
"""Memory that one batch of a Parquet file may take on its way to numbers, besides what its metadata states."""
_COPIES = 2
"""How often what was read is in memory while the batches are joined."""


@dataclass
class Room:
    """How many rows of so many columns, the times included, may still be read: over all files of a source."""

    num_columns: int
    rows: int = 0
    max_rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.free_bytes = host_memory().free_bytes
        self.max_rows = min(MAX_VALUES, self.free_bytes // (8 * _COPIES)) // self.num_columns

    def take(self, rows: int, what: str) -> None:
        """Count rows. Raises: DataError where they are more than MAX_VALUES allows, or than free memory holds twice."""
        self.rows += rows
        if self.rows > self.max_rows:
            raise DataError(
                f"{what}: expected at most {self.max_rows:,} rows of {self.num_columns} columns in all ({MAX_VALUES:,} "
                f"numbers, and what {self.free_bytes / MIB:,.0f} MiB of free memory hold twice), got {self.rows:,} or "
                "more. Read fewer files or a coarser series"
            )


def check_expansion(path: Path, num_bytes: int, most: int) -> None:
    """Refuse a compressed file that expands to more than `most` times its size. Raises: DataError."""
    size = path.stat().st_size
    if num_bytes > max(HARMLESS_BYTES, most * size):
        raise DataError(
            f"{path}: {size:,} bytes expand to {num_bytes:,} or more; expected at most {most} times as many, or "
            f"{HARMLESS_BYTES // MIB} MiB. If these are data, store them less compressed"
        )
