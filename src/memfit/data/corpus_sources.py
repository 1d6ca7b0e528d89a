"""The documents of a corpus, streamed: text, JSON lines, Parquet columns and packaged samples, checked as read."""

import codecs
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa

from memfit.data.corpus_spec import CorpusSource
from memfit.data.limits import MAX_GZIP_EXPANSION, MIB, check_expansion
from memfit.data.source import SourceFile, expand
from memfit.data.spec import nearest
from memfit.data.tables import PARQUET_SUFFIXES
from memfit.data.text_columns import text_batches, try_text_columns, unreadable
from memfit.errors import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
CHUNK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 24
"""Longest document, and longest line of JSON: split into words, 16 MiB of text take some 200 MiB."""


def find_documents(source: CorpusSource) -> list[Path]:
    """Resolve paths and globs, each file once, in order. Raises DataError for what is missing."""
    if source.kind == "sample":
        return [_find_sample()]
    found: dict[Path, Path] = {}
    for pattern in source.paths:
        for path in expand(pattern):
            found.setdefault(path.resolve(), path)
    return sorted(found.values())


def _find_sample() -> Path:
    found = importlib.util.find_spec("pydoc_data.topics")
    path = Path(found.origin) if found and found.origin else Path()
    if not path.is_file():
        raise DataError(
            "this Python holds no pydoc_data.topics; take another source, or install Python's whole library"
        )
    return path


def file_format(source: CorpusSource, path: Path) -> str:
    """Tell "sample", "text", "jsonl" or "parquet" from the settings or, as they may leave open, the file's name."""
    if source.kind == "sample":
        return "sample"
    if source.format != "auto":
        return source.format
    name = path.name.lower()
    if name.endswith(PARQUET_SUFFIXES):
        return "parquet"
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return "jsonl" if name.endswith(JSON_SUFFIXES) else "text"


def check_documents(source: CorpusSource, paths: Sequence[Path]) -> None:
    """Decode the Parquet files once in a child, under limits. Raises DataError for one that passes them."""
    try_text_columns([path for path in paths if file_format(source, path) == "parquet"], source.field)


def read_documents(source: CorpusSource, files: Sequence[SourceFile], report: Callable[[float], None]) -> Iterator[str]:
    """Yield every document in order; a document and a piece of its file are in memory.

    `report` is told the share that is read, by the files' bytes. Raises DataError, naming the file and the line, row or
    byte, for what is no text, too long, malformed, or changed since it was hashed.
    """
    total, done = sum(file.num_bytes for file in files) or 1, 0
    for file in files:
        for share, document in _read(source, file.path):
            report((done + share * file.num_bytes) / total)
            yield document
        state = file.path.stat()
        if (state.st_size, state.st_mtime_ns) != (file.num_bytes, file.modified_ns):
            raise DataError(f"{file.path} changed while it was read; run again when it is complete")
        done += file.num_bytes


def _read(source: CorpusSource, path: Path) -> Iterator[tuple[float, str]]:
    """Yield the share of the file that is read, and a document."""
    kind = file_format(source, path)
    try:
        if kind == "sample":
            topics = importlib.import_module("pydoc_data.topics").topics
            yield from ((1.0, text) for text in topics.values())
        elif kind == "parquet":
            for share, row, value in text_batches(path, source.field):
                yield share, _checked(value, f"{path}, row {row}: column {source.field!r}")
        elif kind == "jsonl":
            yield from _json_lines(_records(path, b"\n"), source.field, path)
        else:
            yield from _texts(_records(path, source.separator.encode()), path)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error


Record = tuple[float, int, bytes]
"""Share of the file that is read, where in the text it begins, and its bytes."""


def _records(path: Path, separator: bytes) -> Iterator[Record]:
    """Cut a file's text at every separator, or nowhere."""
    share, start, rest = 0.0, 0, b""
    for share, chunk in _chunks(path):
        *whole, rest = (rest + chunk).split(separator) if separator else [rest + chunk]
        for record in whole:
            _check_length(record, path, start)
            yield share, start, record
            start += len(record) + len(separator)
        _check_length(rest, path, start)
    yield share, start, rest


def _check_length(record: bytes, path: Path, start: int) -> None:
    if len(record) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{path}, byte {start}: a document or line of more than {MAX_DOCUMENT_BYTES // MIB} MiB; expected shorter "
            "ones. Split it, or set source.separator to what documents of a text are separated by"
        )


def _chunks(path: Path) -> Iterator[tuple[float, bytes]]:
    """Yield pieces of a file's text, decompressed, and the share of the file that they come from."""
    compression, size, num_bytes = COMPRESSIONS.get(path.suffix.lower()), path.stat().st_size, 0
    with path.open("rb") as file, _decompressed(file, compression) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            if not num_bytes:
                chunk = chunk.removeprefix(codecs.BOM_UTF8)
            num_bytes += len(chunk)
            if compression:
                check_expansion(path, num_bytes, MAX_GZIP_EXPANSION)
            yield file.tell() / size, chunk


def _decompressed(file: Any, compression: str | None) -> Any:
    return pa.CompressedInputStream(file, compression) if compression else nullcontext(file)


def _texts(records: Iterable[Record], path: Path) -> Iterator[tuple[float, str]]:
    for share, start, record in records:
        try:
            yield share, record.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, byte {start + error.start}: no UTF-8; expected text. Convert it, or name a compressed file "
                f"by its kind ({', '.join(COMPRESSIONS)})"
            ) from error


def _json_lines(records: Iterable[Record], key: str, path: Path) -> Iterator[tuple[float, str]]:
    for number, (share, _, line) in enumerate(records, 1):
        if line and not line.isspace():
            yield share, _field(line, key, f"{path}:{number}")


def _field(line: bytes, key: str, where: str) -> str:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f'{where}: no JSON ({error!s:.100}); expected an object on every line, such as {{"{key}": "..."}}. '
            "Repair or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, got a {type(record).__name__}. Write one object a line")
    if key not in record:
        raise DataError(
            f"{where}: no field {key!r}{nearest(key, record)}; it has {list(record)!r:.200}. Set "
            "source.field, or remove the line"
        )
    return _checked(record[key], f"{where}: field {key!r}")


def _checked(text: object, what: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{what} is {text!r:.40}; expected text. Set source.field, or remove the line")
    if len(text) > MAX_DOCUMENT_BYTES:
        raise DataError(f"{what} has {len(text):,} characters; expected at most {MAX_DOCUMENT_BYTES:,}. Split it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half of a surrogate pair, which is no text. Repair or remove the line"
        ) from error
    return text
