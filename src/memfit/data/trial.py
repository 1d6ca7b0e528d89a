"""Parquet files are decoded once in a child under a memory limit: what their metadata say need not be true."""

import resource
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memfit.data.limits import BATCH_BYTES, MIB
from memfit.data.parquet import Stated
from memfit.data.tables import Columns, is_parquet, parsed_batches, stated
from memfit.errors import DataError
from memfit.memory.host import host_memory
from memfit.process import Emit, run_child

SLOWEST_BYTES_PER_SECOND = 4 * MIB
"""How slowly files may be decoded before they are given up, by their size and the numbers that they state to hold."""
START_SECONDS = 60.0
"""What the child may take besides."""


def try_parquet(paths: Sequence[Path], columns: Columns) -> None:
    """Decode the Parquet files among `paths` in a child, so that this process may do it in bounded memory and time.

    Raises: DataError where one takes more memory or time than its metadata account for, and whatever reading raises.
    """
    told = {path: stated(path, columns) for path in paths if is_parquet(path)}
    job = {"columns": [columns.time, columns.numbers, columns.only]}
    try_files("memfit.data.trial:run", job, told, len(columns.names))


def try_files(target: str, job: dict[str, Any], told: Mapping[Path, Stated], num_columns: int) -> None:
    """Have a child decode Parquet files in the memory and time that their metadata account for.

    target: `module:function`; it gets the job, and in it files [[path, bytes]].
    """
    if not told:
        return
    free = max(host_memory().free_bytes // 2, BATCH_BYTES)
    most = {path: min(said.decoding_bytes + BATCH_BYTES, free) for path, said in told.items()}
    work = sum(path.stat().st_size + 8 * said.rows * num_columns for path, said in told.items())
    seconds = START_SECONDS + work / SLOWEST_BYTES_PER_SECOND
    job = {**job, "files": [[str(path), extra] for path, extra in most.items()]}
    with tempfile.TemporaryDirectory(prefix="memfit-trial-") as folder:
        outcome = run_child(target, job, log=Path(folder) / "log", deadline_seconds=seconds)
    if outcome.status in ("oom", "timeout") or outcome.error.startswith("SIG"):
        path = Path(outcome.phase or next(iter(told)))
        limit = f"{seconds:.0f} s" if outcome.status == "timeout" else f"{most[path] // MIB} MiB"
        raise DataError(
            f"{path}: decoding it takes more than the {limit} that its metadata account for ({outcome.message:.200}). "
            "Check where it comes from, or write it anew"
        )
    outcome.unwrap("decoding Parquet files")


def run(job: dict[str, Any], emit: Emit) -> None:
    """Decode every file to its end, within so many bytes above what this process holds.

    job: files [[path, bytes]], columns [time, numbers, only].
    """
    time, numbers, only = job["columns"]
    columns = Columns(time, tuple(numbers), tuple(only) if only else None)
    for name, num_bytes in job["files"]:
        emit({"event": "phase", "phase": name})
        limit_memory(num_bytes)
        for _ in parsed_batches(Path(name), columns):
            pass


def limit_memory(num_bytes: int) -> None:
    """Let allocations fail that take this process more than `num_bytes` beyond what it holds now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = held + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
