"""Unigram and bigram models of token streams: what a language model must beat. Memory does not grow with the corpus."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 20
"""Tokens that are counted at once."""
MAX_COUNTED = 1 << 26
"""Tokens of the train split that are counted; of a longer one, evenly spaced pieces."""
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""How many observations the unigram weighs in the bigram; the best on the validation split is taken."""

Tokens = NDArray[np.unsignedinteger]
Logs = NDArray[np.float64]


def num_counted(num_tokens: int) -> int:
    """Say how many of so many train tokens are counted."""
    return sum(stop - start for start, stop in _pieces(num_tokens))


def _pieces(num_tokens: int) -> list[tuple[int, int]]:
    starts = np.arange(0, max(num_tokens - 1, 1), PIECE)
    if num_tokens > MAX_COUNTED:
        starts = starts[np.linspace(0, len(starts) - 1, MAX_COUNTED // PIECE).round().astype(np.int64)]
    return [(int(start), min(int(start) + PIECE, num_tokens)) for start in starts]


def _read(tokens: Tokens) -> Iterator[NDArray[np.int64]]:
    """Yield pieces, each with the token that follows it, so that every pair is seen once."""
    for start, stop in _pieces(len(tokens)):
        yield np.asarray(tokens[start : stop + 1], np.int64)


class NGrams:
    """Counts of a train stream, for the pairs that occur in the streams that will be scored.

    The unigram adds 1 to every count (Laplace); the bigram is p(b | a) = (c(a, b) + k p(b)) / (c(a) + k), a Dirichlet
    prior of strength k on the unigram (MacKay and Peto, 1995).
    """

    def __init__(self, train: Tokens, scored: list[Tokens], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._pairs = np.unique(np.concatenate([self._codes(np.asarray(part, np.int64)) for part in scored]))
        counts, firsts = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
        self._pair_counts = np.zeros(len(self._pairs), np.int64)
        for piece in _read(train):
            counts += np.bincount(piece[1:], minlength=vocab_size)
            firsts += np.bincount(piece[:-1], minlength=vocab_size)
            codes = self._codes(piece)
            places = np.searchsorted(self._pairs, codes).clip(max=max(len(self._pairs) - 1, 0))
            known = places[self._pairs[places] == codes]
            self._pair_counts += np.bincount(known, minlength=len(self._pairs))
        self._firsts = firsts
        self.unigram: Logs = (counts + 1) / (counts.sum() + vocab_size)
        """Probability of every token, float64 [V]."""

    def _codes(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        return tokens[:-1] * self._vocab_size + tokens[1:]

    def unigram_nll(self, tokens: Tokens) -> Logs:
        """Return the negative log-likelihood of every token but the first, in nats."""
        found: Logs = -np.log(self.unigram[np.asarray(tokens[1:], np.int64)])
        return found

    def bigram_nll(self, tokens: Tokens, strength: float) -> Logs:
        """Return that of every token but the first, given the one before it; `tokens` is one of those to be scored."""
        plain = np.asarray(tokens, np.int64)
        seen = self._pair_counts[np.searchsorted(self._pairs, self._codes(plain))]
        chance = (seen + strength * self.unigram[plain[1:]]) / (self._firsts[plain[:-1]] + strength)
        found: Logs = -np.log(chance)
        return found

    def best_strength(self, validation: Tokens) -> float:
        """Return the strength that predicts a validation stream best; it must be one of those to be scored."""
        return min(STRENGTHS, key=lambda strength: float(self.bigram_nll(validation, strength).sum()))
