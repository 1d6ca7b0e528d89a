"""Byte-level BPE, trained or read from a file; documents to tokens. The library is imported only where it is used."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memfit.data.corpus_spec import MAX_VOCAB_SIZE
from memfit.data.limits import MIB
from memfit.data.spec import nearest
from memfit.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
MAX_FILE_BYTES = 128 * MIB
"""Largest tokenizer.json; 262,144 tokens take 33 MiB."""
BATCH_CHARS = 1 << 20
"""What is tokenized at once: the library takes some 130 bytes for each character of it."""
PIECE_CHARS = 1 << 18
"""A longer document is tokenized in pieces."""
MIN_FREQUENCY = 2
"""How often a pair must occur in the train documents to become a token."""
_BEFORE_WORD = re.compile(r"(?<=\S)(?= \S)")
"""Where byte-level BPE cuts too, before it merges: pieces give the tokens of the whole."""
_LONG_RUN = re.compile(r"\S{256}|\s{256}")


def train_tokenizer(texts: Iterable[str], vocab_size: int, end_of_text: str) -> "Tokenizer":
    """Train byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) on texts; the same texts, the same tokenizer.

    The last token is the end of text. Raises DataError where the texts do not give so many tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _without_long_runs(text)), trainer)
    found = tokenizer.get_vocab_size() + 1
    if found < vocab_size:
        raise DataError(
            f"tokenizer.vocab_size: the train documents give {found} tokens, end of text included; expected "
            f"{vocab_size}. Lower it, or take more documents"
        )
    if tokenizer.token_to_id(end_of_text) is not None:
        raise DataError(f"end_of_text: {end_of_text!r} is a token of the documents' own. Set another, such as <|end|>")
    tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return _for_documents(tokenizer)


def _without_long_runs(text: str) -> Iterator[str]:
    """Cut runs of 256 letters or blanks: the training takes time with the square of a word's length."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def outline_tokenizer(vocab_size: int, end_of_text: str) -> "Tokenizer":
    """Make a tokenizer of as many tokens as a trained one, of which it knows single bytes and the end of text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"<{index}>" for index in range(len(tokens), vocab_size - 1)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return _for_documents(tokenizer)


def find_tokenizer(path: str) -> Path:
    """Find a tokenizer.json, given as a file or its folder. Raises DataError where there is none."""
    found = Path(path).expanduser()
    found = found / FILE if found.is_dir() else found
    if not found.is_file():
        raise DataError(
            f"tokenizer.path: {found}: no such file; expected a {FILE} or a folder that holds one, such as a model's "
            "folder as transformers saves it"
        )
    return found


def load_tokenizer(path: Path) -> "Tokenizer":
    """Read a tokenizer.json, for documents: nothing is added, cut off or padded, and no text becomes a special token.

    Raises DataError for a file that is none.
    """
    from tokenizers import Tokenizer

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(
                f"{path}: expected at most {MAX_FILE_BYTES // MIB} MiB, got {path.stat().st_size // MIB} MiB"
            )
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except DataError:
        raise
    except Exception as error:  # the library raises no narrower class
        raise DataError(f"{path}: no {FILE} of the library tokenizers: {error!s:.200}. Save it anew") from error
    return _for_documents(tokenizer)


def _for_documents(tokenizer: "Tokenizer") -> "Tokenizer":
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # of BPE: a training's, under which a text has other tokens each time
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # the text "<|endoftext|>" is text
    return tokenizer


class DocumentTokenizer:
    """Turns documents into tokens. Raises DataError where a tokenizer lacks the end of text, or has too many tokens."""

    def __init__(self, tokenizer: "Tokenizer", end_of_text: str) -> None:
        self._tokenizer = tokenizer
        tokens = tokenizer.get_vocab(with_added_tokens=True)
        if end_of_text not in tokens:
            special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
            raise DataError(
                f"end_of_text: the tokenizer has no token {end_of_text!r}{nearest(end_of_text, special)}; its special "
                f"tokens are {', '.join(special)[:200] or 'none'}. Set end_of_text to one that it has"
            )
        self.end_of_text, self.eot = end_of_text, tokens[end_of_text]
        self.vocab_size = max(tokens.values()) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise DataError(f"tokenizer.path: expected at most {MAX_VOCAB_SIZE} tokens, got {self.vocab_size}")
        self.token_bytes = _token_bytes(tokenizer, tokens, self.vocab_size)
        self.dtype: type[np.uint16] | type[np.uint32] = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, documents: Iterable[tuple[int, str]]) -> Iterator[tuple[int, NDArray[Any], int]]:
        """Yield each document's split, its tokens [n] and the bytes of its text, in order.

        Raises DataError where the tokenizer makes the end of text out of text.
        """
        parts = []
        for batch in _batches(documents):
            encodings = self._tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
            for encoding, (_, document) in zip(encodings, batch, strict=True):
                parts.append(np.array(encoding.ids, self.dtype))
                if document is not None:
                    split, text = document
                    yield split, self._checked(np.concatenate(parts)), len(text.encode())
                    parts = []

    def _checked(self, tokens: NDArray[Any]) -> NDArray[Any]:
        if (tokens == self.eot).any():
            raise DataError(
                f"end_of_text: the tokenizer makes {self.end_of_text!r} out of ordinary text. Set another of its "
                "tokens, or another tokenizer"
            )
        return tokens


def _token_bytes(tokenizer: "Tokenizer", tokens: dict[str, int], vocab_size: int) -> NDArray[np.uint16]:
    """Return how many bytes of text each token stands for, uint16 [V]; 0 for special tokens and gaps.

    Exact for byte-level tokenizers, each of whose characters stands for one byte. Of others it is what their usual
    marks say: of blanks, of parts of words and of single bytes.
    """
    byte_level = "ByteLevel" in repr(tokenizer.decoder)
    sizes = np.zeros(vocab_size, np.int64)
    for token, index in tokens.items():
        sizes[index] = len(token) if byte_level else _marked_bytes(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        sizes[index] = 0 if added.special else len(added.content.encode())
    return np.minimum(sizes, np.iinfo(np.uint16).max).astype(np.uint16)


def _marked_bytes(token: str) -> int:
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.removeprefix("##").replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode())


Piece = tuple[str, tuple[int, str] | None]
"""A piece of a document, and the document itself where it ends."""


def _batches(documents: Iterable[tuple[int, str]]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    num_chars = 0
    for document in documents:
        *first, last = _pieces(document[1])
        for piece in (*((part, None) for part in first), (last, document)):
            batch.append(piece)
            num_chars += len(piece[0])
            if num_chars >= BATCH_CHARS:
                yield batch
                batch, num_chars = [], 0
    yield batch


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        for place in _BEFORE_WORD.finditer(text, end - PIECE_CHARS // 2, end):
            end = place.start()
        yield text[start:end]
        start = end
    yield text[start:]
