"""Which documents a split takes: drawn by a hash of their text, so that copies of one fall together."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from memfit.data.corpus_spec import CorpusSpec
from memfit.data.near_duplicates import normalized, shared_share, shingles
from memfit.data.splits import SPLITS
from memfit.errors import DataError

TRAIN, VALIDATION, TEST = range(len(SPLITS))
DROPPED = -1
MIN_DOCUMENTS = 3
"""Fewest documents of a split."""


def assign_splits(digests: NDArray[np.uint64], spec: CorpusSpec) -> NDArray[np.int8]:
    """Return the split of every document, int8 [N]; of documents with one digest all but the first are DROPPED.

    Test takes the lowest digests, validation the next: neither the order of the source nor numpy's generators change
    that. Raises DataError where there are too few different documents for three splits.
    """
    different, first = np.unique(digests, return_index=True)
    if len(different) < len(SPLITS) * MIN_DOCUMENTS:
        raise DataError(
            f"the source holds {len(different)} different documents; expected at least {len(SPLITS) * MIN_DOCUMENTS}, "
            f"{MIN_DOCUMENTS} for each split. If a file holds several, set source.separator to what is between them"
        )
    splits = np.full(len(digests), DROPPED, np.int8)
    splits[first] = TRAIN
    num_test = max(MIN_DOCUMENTS, round(len(different) * spec.test_share))
    num_validation = max(MIN_DOCUMENTS, round(len(different) * spec.validation_share))
    splits[first[:num_test]] = TEST
    splits[first[num_test : num_test + num_validation]] = VALIDATION
    check_filled(splits, "too many are held out: lower validation_share or test_share")
    return splits


def check_filled(splits: NDArray[np.int8], reason: str) -> None:
    """Raise DataError for a split with too few documents."""
    for code, split in enumerate(SPLITS):
        if (count := int((splits == code).sum())) < MIN_DOCUMENTS:
            raise DataError(f"{split} has {count} documents; expected at least {MIN_DOCUMENTS}; {reason}")


@dataclass(frozen=True)
class HeldOut:
    """Shingles that a document must not share with held-out ones, uint64 [n] each, sorted, by its split."""

    against: dict[int, NDArray[np.uint64]]
    keep_one_of: int

    @classmethod
    def read(cls, texts: Iterable[str], splits: NDArray[np.int8], keep_one_of: int) -> Self:
        """Collect those of the validation and test documents among all texts."""
        found = {VALIDATION: array("Q"), TEST: array("Q")}
        for text, split in zip(texts, splits):
            if split in found:
                found[split].frombytes(shingles(normalized(text), keep_one_of).tobytes())
        test = np.unique(np.frombuffer(found[TEST], np.uint64))
        both = np.union1d(test, np.frombuffer(found[VALIDATION], np.uint64))
        return cls({VALIDATION: test, TRAIN: both}, keep_one_of)

    def drop_copies(self, texts: Iterable[str], splits: NDArray[np.int8], share: float) -> dict[int, int]:
        """Mark, in place, train documents of whose shingles `share` or more are held out, and validation ones in test.

        A document that holds a held-out one among much else is no copy by this. Returns how many were dropped from
        each split.
        """
        dropped = dict.fromkeys(self.against, 0)
        for place, text in enumerate(texts):
            split = int(splits[place])
            if split in self.against:
                own = shingles(normalized(text), self.keep_one_of)
                if shared_share(own, self.against[split]) >= share:
                    splits[place] = DROPPED
                    dropped[split] += 1
        return dropped
