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

import numpy as np

ORDERS = 4
SIGMA = 6.0
SCALE = 10.0

Gram = tuple[str, ...]


def grams(words: Sequence[str], order: int) -> Iterator[Gram]:
    """Return the n-grams of one order, in order of appearance."""
    return zip(*(words[start:] for start in range(order)), strict=False)


@dataclass(frozen=True)
class Frequencies:
    """In how many images' references an n-gram stands.

    ``counts`` leaves out what stands in one image only: the formula treats an n-gram that no reference has like one
    that a single image has.
    """

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

    def vectors(self, caption: str) -> tuple[list[dict[Gram, float]], list[float], int]:
        """Return the TF-IDF weights of a caption by order, their norms, and its length in bigrams."""
        words = caption.split()
        weights = []
        for order in range(1, ORDERS + 1):
            counted = Counter(grams(words, order))
            # idf: log N - log max(1, df), in nats
            weights.append({
                gram: n * (math.log(self.documents) - math.log(self.counts.get(gram, 1)))
                for gram, n in counted.items()
            })  # fmt: skip
        return weights, [math.sqrt(sum(w * w for w in part.values())) for part in weights], max(len(words) - 1, 0)


class ImageReferences:
    """The reference vectors of one image, indexed by n-gram: a caption meets only the n-grams that it shares."""

    def __init__(self, captions: Sequence[str], frequencies: Frequencies) -> None:
        self.frequencies = frequencies
        vectors = [frequencies.vectors(caption) for caption in captions]
        self.index: dict[Gram, list[tuple[int, float]]] = {}  # n-gram -> [(reference, weight there)]
        for number, (weights, _, _) in enumerate(vectors):
            for part in weights:
                for gram, weight in part.items():
                    self.index.setdefault(gram, []).append((number, weight))
        self.norms = np.array([norms for _, norms, _ in vectors])  # (references, orders)
        self.lengths = np.array([length for _, _, length in vectors])  # (references,)

    def score(self, caption: str) -> tuple[float, float]:
        """Return CIDEr and CIDEr-D of a caption of PTB tokens, each in [0, 10]."""
        weights, norms, length = self.frequencies.vectors(caption)
        # lists, not arrays: the loop below adds single numbers, which arrays are slow at
        plain = [[0.0] * len(self.lengths) for _ in range(ORDERS)]
        clipped = [[0.0] * len(self.lengths) for _ in range(ORDERS)]
        for order, part in enumerate(weights):
            for gram, weight in part.items():
                for number, other in self.index.get(gram, ()):
                    plain[order][number] += weight * other
                    clipped[order][number] += min(weight, other) * other
        scale = self.norms * np.array(norms)
        scale[scale == 0] = 1.0  # a zero vector has a zero product too
        penalty = np.exp(-((length - self.lengths) ** 2) / (2 * SIGMA**2))
        cider = (np.array(plain).T / scale).mean()
        cider_d = (np.array(clipped).T / scale * penalty[:, None]).mean()
        return SCALE * float(cider), SCALE * float(cider_d)
