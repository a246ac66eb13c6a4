"""CIDEr and CIDEr-D, two formulas that public code often mixes up (Vedantam et al., 2015).

Both average cosines of TF-IDF vectors of 1- to 4-grams over orders and references, times 10 as in the COCO tool kit.
CIDEr is the plain cosine (equations 1 to 3 of that paper, without stemming). CIDEr-D clips each candidate weight at
the reference's and multiplies by a Gaussian of the difference in length: ``pycocoevalcap`` computes it as ``Cider``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ORDERS, SIGMA, SCALE = 4, 6.0, 10.0
Gram = tuple[str, ...]


def grams(words: Sequence[str], order: int) -> Iterator[Gram]:
    """Return the n-grams of one order, in order of appearance."""
    return zip(*(words[start:] for start in range(order)), strict=False)


@dataclass(frozen=True)
class Frequencies:
    """In how many images' references an n-gram stands. ``counts`` leaves out what stands in one image only: the formula
    treats an n-gram that no reference has in the same way."""

    counts: Mapping[Gram, int]
    documents: int

    @classmethod
    def count(cls, documents: Iterable[Sequence[str]]) -> Frequencies:
        """Return the frequencies over images, each given as the PTB tokens of its references."""
        split = [[caption.split() for caption in captions] for captions in documents]
        kept: dict[Gram, int] = {}
        for order in range(1, ORDERS + 1):  # one order at a time keeps the peak memory low
            seen: Counter[Gram] = Counter()
            for captions in split:
                seen.update({gram for words in captions for gram in grams(words, order)})
            kept.update((gram, n) for gram, n in seen.items() if n > 1)
        return cls(kept, len(split))

    def vector(self, caption: str) -> Vector:
        """Return the TF-IDF vector of a caption of PTB tokens; idf is log N - log max(1, df), in nats."""
        words = caption.split()
        counted = [Counter(grams(words, order)) for order in range(1, ORDERS + 1)]
        weights = [{gram: n * (math.log(self.documents) - math.log(self.counts.get(gram, 1)))
                    for gram, n in part.items()} for part in counted]
        norms = [math.sqrt(sum(w * w for w in part.values())) for part in weights]
        return Vector(weights, norms, max(len(words) - 1, 0))


class Vector(NamedTuple):
    """TF-IDF weights of a caption by order, their norms, and its length in bigrams as the library measures it."""

    weights: list[dict[Gram, float]]
    norms: list[float]
    length: int


def cider(caption: Vector, references: Sequence[Vector]) -> tuple[float, float]:
    """Return CIDEr and CIDEr-D of a caption against the references of its image, each in [0, 10]."""
    plain, clipped = np.zeros((2, len(references), ORDERS))
    for number, reference in enumerate(references):
        for order, (own, other) in enumerate(zip(caption.weights, reference.weights, strict=True)):
            shared = [(weight, other[gram]) for gram, weight in own.items() if gram in other]
            scale = caption.norms[order] * reference.norms[order] or 1.0  # a zero vector has a zero product too
            plain[number, order] = sum(weight * there for weight, there in shared) / scale
            clipped[number, order] = sum(min(weight, there) * there for weight, there in shared) / scale
    differences = caption.length - np.array([reference.length for reference in references])
    penalty = np.exp(-(differences**2) / (2 * SIGMA**2))
    return SCALE * float(plain.mean()), SCALE * float((clipped * penalty[:, None]).mean())
