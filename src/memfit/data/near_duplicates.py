"""Copies among documents: exact ones by a digest, near ones by the word 8-grams that they share."""

import hashlib
import zlib

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 8
MAX_UNSAMPLED = 1 << 20
"""8-grams of held-out documents of which all are kept; of more, one of SAMPLED or fewer is."""
SAMPLED = 8
MAX_KEPT = 1 << 23
"""Most of them that are kept, about: 64 MiB."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no difference between two words is lost modulo 2^64."""


def normalized(text: str) -> bytes:
    """Return a text as it is compared: without regard to case, and with single spaces between its words."""
    return " ".join(text.casefold().split()).encode()


def digest(text: bytes, seed: int) -> bytes:
    """Return 8 bytes of BLAKE2b of a normalized text, little-endian: the same text, the same digest."""
    return hashlib.blake2b(text, digest_size=8, salt=seed.to_bytes(16, "little", signed=True)).digest()


def shingles(text: bytes, keep_one_of: int = 1) -> NDArray[np.uint64]:
    """Hash every run of 8 words of a normalized text, and keep those whose hash is among the lowest 1 / keep_one_of.

    Which are kept depends on the words alone, so that two texts keep the same ones (Broder, 1997).
    """
    words = text.split()
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    num_shingles = max(0, len(words) - SHINGLE_WORDS + 1)
    joined = np.zeros(num_shingles, np.uint64)
    for place in range(SHINGLE_WORDS):
        joined = joined * _FACTOR + hashes[place : place + num_shingles]
    mixed = _mixed(joined)
    return mixed if keep_one_of == 1 else mixed[mixed < np.uint64((1 << 64) // keep_one_of)]


def sampling(num_shingles: int) -> int:
    """Return of how many shingles one is kept where held-out documents have so many: 1 is all of them."""
    return 1 if num_shingles <= MAX_UNSAMPLED else max(SAMPLED, -(-num_shingles // MAX_KEPT))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread the bits of each value evenly: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def shared_share(own: NDArray[np.uint64], others: NDArray[np.uint64]) -> float:
    """Return which share of some shingles is among others, uint64 [n], sorted; 0 where there are none."""
    if not len(own) or not len(others):
        return 0.0
    places = np.minimum(np.searchsorted(others, own), len(others) - 1)
    return float((others[places] == own).mean())
