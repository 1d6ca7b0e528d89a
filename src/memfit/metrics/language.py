"""Scores of next-token predictions, from sums over samples."""

import math

import numpy as np

METRICS = ("nll", "perplexity", "bits_per_byte", "token_accuracy")


def language_scores(
    nll: np.ndarray, num_tokens: np.ndarray, num_bytes: np.ndarray, num_correct: np.ndarray | None = None
) -> dict[str, float | None]:
    """Score predictions of tokens; every array has one entry per sample.

    nll: sum of the negative log-likelihoods of its tokens, in nats. num_bytes: UTF-8 bytes of the text that its tokens
    stand for. num_correct: tokens that were the likeliest, None where nobody looked. Bits per byte compare models with
    different tokenizers; perplexity does not.
    """
    total, tokens, size = float(nll.sum(dtype=np.float64)), int(num_tokens.sum()), int(num_bytes.sum())
    mean = total / tokens if tokens else None
    return {
        "nll": mean,
        "perplexity": None if mean is None or mean > 700 else math.exp(mean),
        "bits_per_byte": total / math.log(2) / size if size else None,
        "token_accuracy": None if num_correct is None or not tokens else int(num_correct.sum()) / tokens,
    }
