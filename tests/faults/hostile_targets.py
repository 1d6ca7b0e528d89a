"""What the children of test_hostile_input.py do: make bombs, and read them under a limit that the kernel enforces."""

import gzip
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20
LIMIT_BYTES = 1536 * MIB
"""What a child may take beyond what it holds before it reads: a bomb that is not refused dies of it."""


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Do work that should be refused; return how it ended, how long it took, and the rise of the peak."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, started, kind, message = status("VmRSS"), time.monotonic(), "", ""
    try:
        work()
    except Exception as error:  # noqa: BLE001  (the test says which it should be)
        kind, message = type(error).__name__, str(error)
    return {
        "error": kind,
        "message": message,
        "seconds": time.monotonic() - started,
        "peak_bytes": status("VmHWM") - before,
        "children_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def limit() -> None:
    most = status("VmData") + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


# CSV


def sparse(path: Path, start: bytes, num_bytes: int = 10 * 2**30) -> Path:
    """Write a start and zeros after it, of which none are on the disk."""
    path.write_bytes(start)
    os.truncate(path, num_bytes)
    return path


def zipped(path: Path, start: bytes, piece: bytes, times: int) -> Path:
    with gzip.open(path, "wb", 1) as opened:
        opened.write(start)
        for _ in range(times):
            opened.write(piece)
    return path


HEADER = b"time,value\n"
ROWS = HEADER + b"".join(b"2024-01-%02d,%d\n" % (day % 28 + 1, day) for day in range(200_000))
CSV = {
    "zeros": lambda folder: sparse(folder / "a.csv", b""),
    "zeros below a header": lambda folder: sparse(folder / "a.csv", HEADER),
    "quote that never closes": lambda folder: sparse(folder / "a.csv", HEADER + b'2024-01-01,"'),
    "zeros below good rows": lambda folder: sparse(folder / "a.csv", ROWS),
    "larger than any disk": lambda folder: sparse(folder / "a.csv", ROWS, 2**40),
    "a million columns": lambda folder: sparse(folder / "a.csv", b"time,value" + b"," * 1_000_000 + b"\n", 1_000_011),
    "many columns below a quoted line": lambda folder: sparse(
        folder / "a.csv",
        b'"a\n",time,value' + b",b" * 400_000 + b"\n1,2024-01-01,1" + b"," * 400_000 + b"\n",
        1_200_030,
    ),
    "gzip of one line": lambda folder: zipped(folder / "a.csv.gz", HEADER, b"1" * MIB, 400),
    "gzip of empty lines": lambda folder: zipped(folder / "a.csv.gz", HEADER, b"\n" * MIB, 300),
    "gzip of one row": lambda folder: zipped(folder / "a.csv.gz", HEADER, b"2024-01-01,1\n" * 80_000, 300),
}


# Parquet


def repeated_rows(folder: Path) -> Path:
    """Write a hundred million rows into less than a megabyte."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = 20_000_000
    table = pa.table({"time": pa.array(np.zeros(rows, "M8[ns]")), "value": np.zeros(rows)})
    with pq.ParquetWriter(folder / "a.parquet", table.schema, compression="zstd") as writer:
        for _ in range(5):
            writer.write_table(table, row_group_size=rows)
    return folder / "a.parquet"


def lying_pages(folder: Path) -> Path:
    """Write pages of 320 MB each, and metadata that speak of a thousand rows in as many bytes."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, path = 40_000_000, folder / "a.parquet"
    table = pa.table({"time": pa.array(np.zeros(rows, "M8[ns]")), "value": np.zeros(rows)})
    whole = {"row_group_size": rows, "write_batch_size": rows, "max_rows_per_page": rows, "data_page_size": 2**31 - 1}
    pq.write_table(table, path, compression="zstd", use_dictionary=False, **whole)
    plain = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[start:]
    for true in (plain, rows):
        assert varint(true) in footer
        footer = footer.replace(varint(true), varint(1000, len(varint(true))))
    path.write_bytes(content[:start] + footer)
    assert pq.read_metadata(path).num_rows == 1000
    return path


def varint(number: int, length: int = 0) -> bytes:
    """Write a number as Parquet's footers do, in so many bytes at least."""
    number, written = number << 1, bytearray()
    while number or not written or len(written) < length:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written[-1] &= 0x7F
    return bytes(written)


def repeated_text(folder: Path, encoding: str) -> Path:
    """Write the same megabyte of text in many rows."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, rows = "2024-01-01" + " " * 1_000_000, 65_536 if encoding == "dictionary" else 300
    if encoding == "dictionary":
        times, settings = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, "i4")), pa.array([text])), {}
    else:
        times = pa.array([text] * rows)
        settings = {"use_dictionary": False, "column_encoding": {"time": "DELTA_BYTE_ARRAY"}}
    table = pa.table({"time": times, "value": np.arange(float(rows))})
    pq.write_table(table, folder / "a.parquet", compression="zstd", **settings)
    return folder / "a.parquet"


def many_columns(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"time": ["2024-01-01"], "value": [1.0], **{f"c{index}": [1] for index in range(9000)}})
    pq.write_table(table, folder / "a.parquet")
    return folder / "a.parquet"


def huge_footer(folder: Path) -> Path:
    path = sparse(folder / "a.parquet", b"PAR1")
    with path.open("r+b") as opened:
        opened.seek(-8, os.SEEK_END)
        opened.write((2**30).to_bytes(4, "little") + b"PAR1")
    return path


PARQUET = {
    "repeated rows": repeated_rows,
    "pages larger than stated": lying_pages,
    "repeated text": lambda folder: repeated_text(folder, "dictionary"),
    "text by its difference": lambda folder: repeated_text(folder, "delta"),
    "many columns": many_columns,
    "huge footer": huge_footer,
}


def make_sources(payload: dict[str, Any], emit: Any) -> dict[str, str]:
    """Write every source into a folder of its own; return their paths."""
    made = {}
    for name, make in {**CSV, **PARQUET}.items():
        folder = Path(payload["folder"]) / name.replace(" ", "-")
        folder.mkdir()
        made[name] = str(make(folder))
    return made


def read_sources(payload: dict[str, Any], emit: Any) -> dict[str, Any]:
    """Prepare every source under a limit; return how each ended."""
    from memfit.data.prepare import prepare_series
    from memfit.data.spec import SeriesSpec

    def prepare(path: str) -> None:
        source = {"kind": "files", "paths": [path]}
        spec = SeriesSpec.from_dict({"source": source, "time_column": "time", "value_column": "value", "context": 8})
        prepare_series(spec, Path(payload["store"]), code_version="1")

    limit()
    return {name: measured(lambda path=path: prepare(path)) for name, path in payload["sources"].items()}


def read_configs(payload: dict[str, Any], emit: Any) -> dict[str, Any]:
    """Read every config and apply every override under a limit; return how each ended."""
    from memfit.config import load_config

    limit()
    texts = {name: measured(lambda path=path: load_config(Path(path))) for name, path in payload["configs"].items()}
    base = Path(payload["base"])
    sets = {name: measured(lambda text=text: load_config(base, [text])) for name, text in payload["overrides"].items()}
    return {**texts, **sets}


def read_arrays(payload: dict[str, Any], emit: Any) -> dict[str, Any]:
    """Read a CSV file and an .npz file with the bundle's code under a limit; return how each ended."""
    from memfit.export.infer import load_arrays, read_csv

    limit()
    series = {"time_column": "time", "value_column": "value", "extra_columns": []}
    return {
        "csv": measured(lambda: read_csv(Path(payload["csv"]), series, 10)),
        "npz": measured(lambda: load_arrays(Path(payload["npz"]))),
    }
