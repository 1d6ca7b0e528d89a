"""A prepared corpus on disk, written and read: tokens of documents, one after another, the end of text between them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from memfit.data.arrays import ArrayWriter
from memfit.data.splits import SPLITS
from memfit.data.tokenizer import FILE, DocumentTokenizer, load_tokenizer
from memfit.errors import DataError
from memfit.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class SplitWriter:
    """Write the arrays of one split, document by document. Used as a context."""

    def __init__(self, directory: Path, split: str, tokenizer: DocumentTokenizer) -> None:
        self._tokens = ArrayWriter(directory / f"{split}.npy", tokenizer.dtype, (None,))
        self._ends = ArrayWriter(directory / f"{split}_documents.npy", np.int64, (None,))
        self._sizes = ArrayWriter(directory / f"{split}_document_bytes.npy", np.int64, (None,))
        self._tokenizer, self.num_bytes = tokenizer, 0
        self.byte_exact = True
        """Whether every document's tokens stand for as many bytes as it has."""
        self._end_document()

    def write(self, tokens: NDArray[Any], num_bytes: int) -> None:
        """Append a document's tokens [n]."""
        self._tokens.write(tokens)
        self._end_document()
        self._sizes.write(np.array([num_bytes]))
        self.num_bytes += num_bytes
        self.byte_exact &= int(self._tokenizer.token_bytes[tokens].sum(dtype=np.int64)) == num_bytes

    def _end_document(self) -> None:
        self._ends.write(np.array([self.num_tokens]))
        self._tokens.write(np.array([self._tokenizer.eot]))

    @property
    def num_tokens(self) -> int:
        """How many there are by now, ends of text included."""
        return self._tokens.num_rows

    @property
    def num_documents(self) -> int:
        """How many were written by now."""
        return self._sizes.num_rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        for writer in (self._tokens, self._ends, self._sizes):
            writer.__exit__(*error)


class PreparedCorpus:
    """The arrays of a prepared directory. Raises DataError where they are missing or not what the manifest says.

    Only shapes are checked here; `prepare_corpus` checks the bytes. It pickles as its path.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = read_json(self.path / "manifest.json")
            self.vocab_size, self.eot = int(self.manifest["vocab_size"]), int(self.manifest["eot"])
            self.token_bytes = self._open("token_bytes.npy", np.uint16, self.vocab_size)
            self._splits = {split: self._open_split(split) for split in SPLITS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise self._broken(str(error)) from error

    def __reduce__(self) -> tuple[type["PreparedCorpus"], tuple[Path]]:
        return PreparedCorpus, (self.path,)

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer.json is."""
        return self.path / FILE

    def tokenizer(self) -> "Tokenizer":
        """Read the tokenizer, which imports its library. Raises DataError where it is broken."""
        return load_tokenizer(self.tokenizer_path)

    def tokens(self, split: str) -> NDArray[np.unsignedinteger[Any]]:
        """Return the tokens of "train", "validation" or "test": [n], uint16 or uint32, begun and ended by `eot`."""
        return self._of(split)[0]

    def documents(self, split: str) -> NDArray[np.int64]:
        """Return where the ends of text lie, int64 [num_documents + 1]: document j is between the j-th and the next."""
        return self._of(split)[1]

    def document_bytes(self, split: str) -> NDArray[np.int64]:
        """Return how many bytes of UTF-8 each document has, int64 [num_documents]."""
        return self._of(split)[2]

    def _of(self, split: str) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        return self._splits[split]

    def _open_split(self, split: str) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        num_tokens, num_documents = (int(self.manifest[name][split]) for name in ("num_tokens", "num_documents"))
        return (
            self._open(f"{split}.npy", np.uint16 if self.vocab_size <= 1 << 16 else np.uint32, num_tokens),
            self._open(f"{split}_documents.npy", np.int64, num_documents + 1),
            self._open(f"{split}_document_bytes.npy", np.int64, num_documents),
        )

    def _open(self, name: str, dtype: type[np.generic], length: int) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        if array.dtype != dtype or array.shape != (length,):
            raise self._broken(f"{name} holds {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} [{length}]")
        return array

    def _broken(self, reason: str) -> DataError:
        return DataError(f"{self.path} is no whole prepared corpus: {reason}. Prepare it again")
