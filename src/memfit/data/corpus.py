"""From documents to the prepared directory: splits without shared text, a tokenizer, tokens, a manifest."""

import ctypes
import itertools
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memfit.data.arrays import write_array
from memfit.data.corpus_sources import check_documents, find_documents, read_documents
from memfit.data.corpus_spec import CorpusSpec
from memfit.data.corpus_splits import DROPPED, MIN_DOCUMENTS, TRAIN, VALIDATION, HeldOut, assign_splits, check_filled
from memfit.data.near_duplicates import digest, normalized, sampling
from memfit.data.prepared_corpus import SplitWriter
from memfit.data.source import SourceFile, hash_files
from memfit.data.splits import SPLITS
from memfit.data.store import built, describe_sources, write_manifest
from memfit.data.tokenizer import (
    FILE,
    DocumentTokenizer,
    find_tokenizer,
    load_tokenizer,
    outline_tokenizer,
    train_tokenizer,
)
from memfit.files import check_free_disk, fingerprint, sha256_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SCHEMA = 1
REPORTED_SHARE = 0.002
"""How much more of a source is read before that is reported again."""
USUAL_TOKEN_BYTES = 4
"""How many bytes of text a token stands for, where the disk's free space is checked."""

Progress = Callable[[str, float], None]


def corpus_fingerprint(spec: CorpusSpec, code_version: str) -> str:
    """Return the name of the prepared directory: of spec, source, tokenizer and code version.

    Where the files lie does not matter, only their names and bytes. Raises DataError for missing files.
    """
    return _fingerprint(spec, _described(hash_files(find_documents(spec.source))), code_version)


def _described(files: Sequence[SourceFile]) -> dict[str, Any]:
    return describe_sources((file.sha256, file.name, file.num_bytes) for file in files)


def _fingerprint(spec: CorpusSpec, source: dict[str, Any], code_version: str) -> str:
    document = spec.to_dict()
    document["source"].pop("paths")
    path = document["tokenizer"].pop("path")
    given = sha256_file(find_tokenizer(path)) if path else None
    about = {"schema": SCHEMA, "source": source, "code_version": code_version}
    return fingerprint({**about, "corpus": document, "tokenizer": given})


def prepare_corpus(
    spec: CorpusSpec, store: Path, *, code_version: str, fresh: bool = False, on_progress: Progress | None = None
) -> Path:
    """Write `store/<fingerprint>/` and return it; one that is there and whole is used again.

    The source is read up to five times and never held: for the digests of all documents, the shingles of held-out ones,
    near copies of these, the tokenizer, and the tokens. What is held are 8 bytes a document, some 64 MiB of shingles,
    and what the training of the tokenizer keeps of `train_bytes`.

    A directory that differs from its manifest is built anew, and so is every one with `fresh`. `on_progress` is told
    the phase ("hash", "read", "compare", "learn", "write", "done") and the share of the work that is done. Raises
    DataError where the source will not do.
    """
    report = on_progress or (lambda _phase, _share: None)
    report("hash", 0.0)
    files = hash_files(find_documents(spec.source))
    source = _described(files)

    def build(empty: Path) -> dict[str, Any]:
        check_documents(spec.source, [file.path for file in files])
        manifest = _build(_Documents(spec, files, report), empty)
        _trim_heap()
        return {"schema": SCHEMA, "code_version": code_version, "source": source, **manifest}

    directory = built(store, _fingerprint(spec, source, code_version), build, fresh=fresh)
    report("done", 1.0)
    return directory


def outline_corpus(spec: CorpusSpec, directory: Path, *, min_tokens: int) -> None:
    """Write made-up tokens of the right vocabulary size, `min_tokens` or more a split, before any document is read.

    Raises DataError for missing files.
    """
    find_documents(spec.source)
    directory.mkdir(parents=True)
    if spec.tokenizer.path:
        tokenizer = _given(spec, directory)
    else:
        tokenizer = _saved(outline_tokenizer(spec.tokenizer.vocab_size, spec.end_of_text), spec, directory)
    size = -(-min_tokens // MIN_DOCUMENTS)
    drawn = np.random.default_rng(0).integers(0, tokenizer.vocab_size - 1, (MIN_DOCUMENTS, len(SPLITS), size))
    drawn += drawn >= tokenizer.eot
    documents = [(split, tokens, size) for tokens_by_split in drawn for split, tokens in enumerate(tokens_by_split)]
    manifest = _write(spec, documents, tokenizer, directory, {"num_too_short": 0, "duplicates": _duplicates(0, 0, 0)})
    write_manifest(directory, {"schema": SCHEMA, "fingerprint": "outline", "code_version": "", **manifest})


@dataclass
class _Documents:
    """The documents that count, as often as they are read, always in the same order."""

    spec: CorpusSpec
    files: Sequence[SourceFile]
    report: Progress
    num_short: int = 0
    """How many were too short, when last read."""

    def read(self, phase: str, begin: float, end: float) -> Iterator[str]:
        """Yield them; meanwhile the share of the work that is done goes from `begin` to `end`."""
        self.num_short, next_share = 0, 0.0

        def report(share: float) -> None:
            nonlocal next_share
            if share >= next_share:
                self.report(phase, begin + (end - begin) * share)
                next_share = share + REPORTED_SHARE

        everything = read_documents(self.spec.source, self.files, report)
        return itertools.islice(filter(self._is_long_enough, everything), self.spec.max_documents)

    def _is_long_enough(self, text: str) -> bool:
        enough = len(text.strip()) >= self.spec.min_chars
        self.num_short += not enough
        return enough


def _build(documents: _Documents, directory: Path) -> dict[str, Any]:
    spec = documents.spec
    digests, num_bytes, num_words = _measure(documents)
    splits = assign_splits(digests, spec)
    num_short, num_exact, num_near = documents.num_short, int((splits == DROPPED).sum()), {TRAIN: 0, VALIDATION: 0}
    if spec.near_duplicates:
        num_near = _drop_near_copies(documents, splits, num_words)
    if spec.tokenizer.path:
        tokenizer = _given(spec, directory)
    else:
        sample = _sample(documents, splits, digests, num_bytes)
        tokenizer = _saved(train_tokenizer(sample, spec.tokenizer.vocab_size, spec.end_of_text), spec, directory)
    check_free_disk(directory, num_bytes // USUAL_TOKEN_BYTES * tokenizer.dtype().itemsize, "preparing the corpus")
    kept = ((split, text) for text, split in zip(documents.read("write", 0.3, 1.0), splits) if split != DROPPED)
    facts = {"num_too_short": num_short, "duplicates": _duplicates(num_exact, num_near[TRAIN], num_near[VALIDATION])}
    return _write(spec, tokenizer.encode(kept), tokenizer, directory, facts)


def _measure(documents: _Documents) -> tuple[NDArray[np.uint64], int, int]:
    """Return every document's digest, uint64 [N], and how many bytes and words they have in all."""
    digests, num_bytes, num_words = bytearray(), 0, 0
    for text in documents.read("read", 0.0, 0.1):
        plain = normalized(text)
        digests += digest(plain, documents.spec.seed)
        num_bytes += len(plain)
        num_words += plain.count(b" ") + 1
    return np.frombuffer(digests, "<u8"), num_bytes, num_words


def _drop_near_copies(documents: _Documents, splits: NDArray[np.int8], num_words: int) -> dict[int, int]:
    """Mark near copies of held-out documents, in place; return how many there are in train and in validation."""
    spec = documents.spec
    keep_one_of = sampling(int(num_words * (spec.validation_share + spec.test_share)))
    held_out = HeldOut.read(documents.read("compare", 0.1, 0.15), splits, keep_one_of)
    dropped = held_out.drop_copies(documents.read("compare", 0.15, 0.25), splits, spec.near_duplicates)
    check_filled(splits, "the others are near copies of held-out ones: raise near_duplicates, or set it to 0")
    return dropped


def _sample(
    documents: _Documents, splits: NDArray[np.int8], digests: NDArray[np.uint64], num_bytes: int
) -> Iterator[str]:
    """Yield train documents of `train_bytes` at most: all, or those that a hash of their text draws."""
    left = documents.spec.tokenizer.train_bytes
    share = min(1.0, left / (num_bytes * (splits == TRAIN).mean()))
    drawn = (splits == TRAIN) & (
        digests & np.uint64(0xFFFFFFFF) < int(share * (1 << 32))
    )  # higher bits chose the split
    for text in itertools.compress(documents.read("learn", 0.25, 0.3), drawn):
        piece = text.encode()[:left]
        yield piece.decode(errors="ignore")  # without half a character at the end
        left -= len(piece)
        if not left:
            break


def _trim_heap() -> None:
    """Give back to the system what the tokenizer took: some 200 MiB, which the training's budget would lack."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _given(spec: CorpusSpec, directory: Path) -> DocumentTokenizer:
    shutil.copyfile(find_tokenizer(spec.tokenizer.path), directory / FILE)
    return DocumentTokenizer(load_tokenizer(directory / FILE), spec.end_of_text)


def _saved(tokenizer: "Tokenizer", spec: CorpusSpec, directory: Path) -> DocumentTokenizer:
    tokenizer.save(str(directory / FILE))
    return DocumentTokenizer(tokenizer, spec.end_of_text)


def _write(
    spec: CorpusSpec,
    documents: Iterable[tuple[int, NDArray[Any], int]],
    tokenizer: DocumentTokenizer,
    directory: Path,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write documents, each its split, its tokens and its bytes; return the manifest."""
    write_array(directory / "token_bytes.npy", tokenizer.token_bytes)
    with ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(directory, split, tokenizer)) for split in SPLITS]
        for split, tokens, num_bytes in documents:
            writers[split].write(tokens, num_bytes)
    by_split = dict(zip(SPLITS, writers))
    return {
        "workload": "language",
        "kind": spec.source.kind,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "end_of_text": spec.end_of_text,
        "num_tokens": {split: writer.num_tokens for split, writer in by_split.items()},
        "num_documents": {split: writer.num_documents for split, writer in by_split.items()},
        "num_bytes": {split: writer.num_bytes for split, writer in by_split.items()},
        "split_seed": spec.seed,
        "tokenizer_sha256": sha256_file(directory / FILE),
        "byte_exact": all(writer.byte_exact for writer in writers),
        **facts,
    }


def _duplicates(exact: int, near_in_train: int, near_in_validation: int) -> dict[str, int]:
    return {"exact": exact, "dropped_from_train": near_in_train, "dropped_from_validation": near_in_validation}
