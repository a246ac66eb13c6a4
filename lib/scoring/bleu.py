"""BLEU from counts: the same counts give sentence scores, corpus scores and bootstraps of both.

The counting is ``pycocoevalcap``'s own (``cook_refs`` and ``cook_test``), done once per image
instead of once per caption; its reference length is the closest one (the shorter of two equally
close). Papineni et al., 2002.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

ORDERS = 4
WIDTH = 2 * ORDERS + 2  # matches and guesses of each order, then the two lengths
#: The library's two guards against division by zero, kept so that values are equal to its own.
_TINY, _SMALL = 1e-15, 1e-9


def statistics(candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Counts of an image's candidates against its references; all are PTB tokens.

    Returns:
        int64 (candidates, 10): matches of 1- to 4-grams, guesses of 1- to 4-grams, the
        candidate's length, the closest reference's length (in tokens).
    """
    counts = np.zeros((len(candidates), WIDTH), dtype=np.int64)
    if not candidates:
        return counts
    cooked = cook_refs(list(references), n=ORDERS)
    for row, candidate in zip(counts, candidates, strict=False):
        one = cook_test(candidate, cooked, eff="closest", n=ORDERS)
        row[:] = [*one["correct"], *one["guess"], one["testlen"], one["reflen"]]
    return counts


def from_statistics(counts: np.ndarray) -> np.ndarray:
    """BLEU-1..4 from counts: one row gives a sentence score, summed rows a corpus score.

    Args:
        counts: (..., 10) as :func:`statistics` gives them.

    Returns:
        float64 (..., 4) in [0, 1].
    """
    counts = np.asarray(counts, dtype=np.float64)
    matches, guesses = counts[..., :ORDERS], counts[..., ORDERS : 2 * ORDERS]
    length, closest = counts[..., -2], counts[..., -1]
    precisions = (matches + _TINY) / (guesses + _SMALL)
    orders = np.arange(1, ORDERS + 1)
    means = np.cumprod(precisions, axis=-1) ** (1.0 / orders)  # geometric means of 1..n
    ratio = (length + _TINY) / (closest + _SMALL)
    # an empty caption has a ratio near 0, whose exponent underflows to the right value, 0
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        penalty = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return means * penalty[..., None]
