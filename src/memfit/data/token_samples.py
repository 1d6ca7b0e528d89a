"""Samples of a token stream: inputs and the tokens that follow them, each token of a split predicted exactly once."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memfit.data.prepared_corpus import PreparedCorpus

IGNORED = -100
"""The target of a place that holds no token."""
PACKINGS = ("stream", "document")


@dataclass(frozen=True)
class _Pieces:
    """Where the samples of a split begin: document j is cut into pieces[j + 1] - pieces[j] of them."""

    starts: NDArray[np.int64]
    """Position of the end-of-text token before each document, and of the last one."""
    pieces: NDArray[np.int64]


class TokenSamples:
    """A prepared corpus, cut into samples of `seq_len` tokens.

    stream: the documents one after the other, an end-of-text token between them; only the split's last sample is
    padded. document: no sample holds tokens of two documents, and the last one of each is padded. Either way a document
    begins with the end-of-text token as input, and ends with it as target.
    """

    def __init__(self, corpus: PreparedCorpus, seq_len: int, packing: str) -> None:
        self.corpus, self.seq_len = corpus, seq_len
        self._tokens = {split: corpus.tokens(split) for split in ("train", "validation", "test")}
        self._pieces = {split: self._cut_documents(split, packing) for split in self._tokens}

    def _cut_documents(self, split: str, packing: str) -> _Pieces:
        ends = np.array([0, len(self._tokens[split]) - 1]) if packing == "stream" else self.corpus.documents(split)
        starts = np.asarray(ends, np.int64)
        counts = -(-np.diff(starts) // self.seq_len)
        return _Pieces(starts, np.concatenate([[0], np.cumsum(counts)]))

    def num_samples(self, split: str) -> int:
        """Count the samples of a split."""
        return int(self._pieces[split].pieces[-1])

    def spans(self, split: str, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the position of each sample's first input, and how many tokens it predicts."""
        table = self._pieces[split]
        documents = np.searchsorted(table.pieces, indices, side="right") - 1
        first = table.starts[documents] + (indices - table.pieces[documents]) * self.seq_len
        return first, np.minimum(table.starts[documents + 1] - first, self.seq_len)

    def cut(self, split: str, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return inputs and targets int64 [n, seq_len]; padding is the end of text as input, IGNORED as target."""
        first, lengths = self.spans(split, np.asarray(indices, np.int64))
        inside = np.arange(self.seq_len) < lengths[:, None]
        places = np.where(inside, first[:, None] + np.arange(self.seq_len), 0)
        tokens = self._tokens[split]
        following = tokens[np.where(inside, places + 1, 0)].astype(np.int64)
        inputs = np.where(inside, tokens[places].astype(np.int64), self.corpus.eot)
        return inputs, np.where(inside, following, IGNORED)
