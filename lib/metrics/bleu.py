"""BLEU from counts that add up over captions (Papineni et al., 2002), counted by ``pycocoevalcap``."""

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

ORDERS = 4
COUNTS = (*(f"bleu_{kind}{n}" for kind in ("match", "guess") for n in range(1, 5)), "bleu_length", "bleu_closest")
#: The library's two guards against division by zero, kept so that values are equal to its own.
_TINY, _SMALL = 1e-15, 1e-9


def counts(pairs: Sequence[tuple[str, Sequence[str]]]) -> np.ndarray:
    """Return int64 (N, 10), the columns ``COUNTS``, for N pairs (caption, references) of PTB tokens: matches and guesses of
    1- to 4-grams, the caption's length and that of the closest reference (the shorter of two)."""
    cooked = {}  # the references of an image are counted once
    rows = np.zeros((len(pairs), len(COUNTS)), dtype=np.int64)
    for row, (caption, references) in zip(rows, pairs, strict=True):
        if references not in cooked:
            cooked[references] = cook_refs(list(references), n=ORDERS)
        one = cook_test(caption, cooked[references], eff="closest", n=ORDERS)
        row[:] = [*one["correct"], *one["guess"], one["testlen"], one["reflen"]]
    return rows


def bleu_from_counts(counts: object) -> np.ndarray:
    """Return BLEU-1 to BLEU-4 in [0, 1], float64 (..., 4), from counts (..., 10) in an array (leading axes may be resamples)
    or a table: of one row a sentence score, of a sum of rows a corpus score, which is not the mean of sentence scores."""
    counts = np.asarray(counts, dtype=np.float64)
    matches, guesses = counts[..., :ORDERS], counts[..., ORDERS : 2 * ORDERS]
    length, closest = counts[..., -2], counts[..., -1]
    precisions = (matches + _TINY) / (guesses + _SMALL)
    means = np.cumprod(precisions, axis=-1) ** (1.0 / np.arange(1, ORDERS + 1))  # geometric means of 1..n
    ratio = (length + _TINY) / (closest + _SMALL)
    with np.errstate(over="ignore", under="ignore", divide="ignore"):  # an empty caption: exp(-inf) is rightly 0
        penalty = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return means * penalty[..., None]
