"""What a corpus of text is made of: its source, its tokenizer and its splits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from memfit.data.spec import build, require, to_document

KINDS = ("files", "sample")
FORMATS = ("auto", "text", "jsonl", "parquet")
SAMPLES = ("pydoc_topics",)
NUM_BYTES = 256
"""Symbols that byte-level BPE starts from; end of text comes besides."""
MAX_VOCAB_SIZE = 1 << 20
"""Most tokens of a tokenizer."""
MAX_NAME = 1 << 10
"""Most characters of a separator, or of the text of a token."""


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """Where documents come from. Raises ConfigError, naming the setting, where a value cannot work."""

    kind: str = "files"
    """files: text, JSON lines or Parquet. sample: a packaged one."""
    paths: tuple[str, ...] = ()
    """For `files`: paths or globs."""
    format: str = "auto"
    """For `files`: text, jsonl or parquet; auto: by the suffix (.jsonl, .json, .ndjson; .parquet, .pq; else text). Text
    and JSON lines may be compressed (.gz, .zst)."""
    field: str = "text"
    """For jsonl the key, for parquet the column that holds a document's text."""
    separator: str = ""
    """For text: where a file is cut into documents, such as "\\n\\n" or "\\f"; empty: a file is a document."""
    name: str = "pydoc_topics"
    """For `sample`: which one. pydoc_topics: 79 pages of Python's own language reference, 0.5 MB."""

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "source.kind", f"one of {', '.join(KINDS)}", self.kind)
        needs_paths = self.kind == "files"
        expected = "at least one path or glob" if needs_paths else "none"
        require(bool(self.paths) == needs_paths, "source.paths", expected, self.paths)
        require(self.format in FORMATS, "source.format", f"one of {', '.join(FORMATS)}", self.format)
        require(self.field != "", "source.field", "a name", self.field)
        require(len(self.separator) <= MAX_NAME, "source.separator", f"up to {MAX_NAME} characters", self.separator)
        require(self.name in SAMPLES, "source.name", f"one of {', '.join(SAMPLES)}", self.name)


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """A tokenizer to train, or to use as it is. Raises ConfigError where a value cannot work."""

    vocab_size: int = 5700
    """Tokens in all, end of text included; unused where `path` is given."""
    path: str = ""
    """A tokenizer.json of the library tokenizers, or a folder that holds one; empty: byte-level BPE is trained."""
    train_bytes: int = 1 << 26
    """Most bytes of train documents that the training sees: a sample of them, drawn by a hash."""

    def __post_init__(self) -> None:
        enough = NUM_BYTES < self.vocab_size <= MAX_VOCAB_SIZE
        require(enough, "tokenizer.vocab_size", f"{NUM_BYTES + 1} to {MAX_VOCAB_SIZE} tokens", self.vocab_size)
        require(self.train_bytes >= 1, "tokenizer.train_bytes", "1 or more", self.train_bytes)


@dataclass(frozen=True, kw_only=True)
class CorpusSpec:
    """One corpus to prepare. Raises ConfigError, naming the setting, where a value cannot work."""

    source: CorpusSource
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    end_of_text: str = "<|endoftext|>"
    """The token between documents; a tokenizer that is given must have it."""
    validation_share: float = 0.05
    """Share of the documents that is validated on."""
    test_share: float = 0.05
    """Share of the documents that is tested on."""
    seed: int = 0
    """Which documents the splits take: another seed, other documents."""
    near_duplicates: float = 0.5
    """Share of its word 8-grams from which on a train document that has them in common with held-out ones counts as a
    copy and is dropped; 0: only exact copies are."""
    min_chars: int = 1
    """Documents with fewer characters, blanks around them not counted, are left out."""
    max_documents: int | None = None
    """Read no more documents than this; None: all."""

    def __post_init__(self) -> None:
        require(0 < len(self.end_of_text) <= MAX_NAME, "end_of_text", f"1 to {MAX_NAME} characters", self.end_of_text)
        shares = (self.validation_share, self.test_share)
        possible = min(shares) > 0 and sum(shares) < 1
        require(possible, "validation_share and test_share", "two shares that leave a train share", shares)
        require(abs(self.seed) < 1 << 63, "seed", "a whole number of 64 bits", self.seed)
        require(0 <= self.near_duplicates <= 1, "near_duplicates", "a share from 0 to 1", self.near_duplicates)
        require(self.min_chars >= 1, "min_chars", "1 or more", self.min_chars)
        require(self.max_documents is None or self.max_documents >= 1, "max_documents", "1 or more", self.max_documents)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Build a spec from a JSON-able document; an unknown key is an error that names the nearest one."""
        require(isinstance(document, Mapping), "data", "a table of settings", document)
        return build(cls, document, "")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able document that `from_dict` takes."""
        return to_document(self)
