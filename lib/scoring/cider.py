"""CIDEr and CIDEr-D, two formulas that public code often mixes up (Vedantam et al., 2015).

Both compare TF-IDF vectors of 1- to 4-grams and average cosines over orders and references;
both are multiplied by 10, as the COCO tool kit does.

- CIDEr is the plain cosine, equations 1 to 3 of that paper, on PTB tokens without stemming.
- CIDEr-D clips each candidate weight at the reference's and multiplies by a Gaussian of the
  difference in length (sigma 6). This is what ``pycocoevalcap``'s class ``Cider`` computes.

Each caption's vector is computed once. A candidate meets only the n-grams that it shares with
the references of its image, by an index from n-gram to references.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = 4
SIGMA = 6.0
SCALE = 10.0

Gram = tuple[str, ...]


def grams(words: Sequence[str], order: int) -> Iterable[Gram]:
    """The n-grams of one order, in order of appearance."""
    return zip(*(words[start:] for start in range(order)), strict=False)


@dataclass(frozen=True)
class Frequencies:
    """In how many images' references an n-gram stands.

    ``counts`` leaves out what stands in one image only: the formula treats an n-gram that no
    reference has like one that a single image has, so the table stays small.
    """

    counts: Mapping[Gram, int]
    documents: int

    @classmethod
    def count(cls, documents: Iterable[Sequence[str]]) -> Frequencies:
        """Count over images, each given as the PTB tokens of its references."""
        split = [[caption.split() for caption in captions] for captions in documents]
        kept: dict[Gram, int] = {}
        for order in range(1, ORDERS + 1):  # one order at a time keeps the peak memory low
            seen: Counter[Gram] = Counter()
            for captions in split:
                seen.update({gram for words in captions for gram in grams(words, order)})
            kept.update((gram, n) for gram, n in seen.items() if n > 1)
        return cls(counts=kept, documents=len(split))

    def idf(self, gram: Gram) -> float:
        """log N - log max(1, df), in nats."""
        return math.log(self.documents) - math.log(self.counts.get(gram, 1))


@dataclass(frozen=True)
class Vector:
    """The TF-IDF vector of one caption: weights by order, their norms, and its length."""

    weights: tuple[dict[Gram, float], ...]
    norms: tuple[float, ...]
    length: int  # in bigrams, as the library measures it

    @classmethod
    def of(cls, caption: str, frequencies: Frequencies) -> Vector:
        words = caption.split()
        weights = []
        for order in range(1, ORDERS + 1):
            counted = Counter(grams(words, order))
            weights.append({g: n * frequencies.idf(g) for g, n in counted.items()})
        norms = tuple(math.sqrt(sum(w * w for w in part.values())) for part in weights)
        return cls(tuple(weights), norms, max(len(words) - 1, 0))


class References:
    """The reference vectors of one image, indexed by n-gram."""

    def __init__(self, captions: Sequence[str], frequencies: Frequencies) -> None:
        self.frequencies = frequencies
        self.vectors = [Vector.of(caption, frequencies) for caption in captions]
        #: n-gram -> [(reference, weight there)]; an n-gram's own length tells its order
        self.index: dict[Gram, list[tuple[int, float]]] = {}
        for number, vector in enumerate(self.vectors):
            for part in vector.weights:
                for gram, weight in part.items():
                    self.index.setdefault(gram, []).append((number, weight))
        self.norms = np.array([vector.norms for vector in self.vectors])  # (references, orders)
        self.lengths = np.array([vector.length for vector in self.vectors])  # (references,)

    def score(self, caption: str) -> tuple[float, float]:
        """CIDEr and CIDEr-D of one caption, each in [0, 10]."""
        vector = Vector.of(caption, self.frequencies)
        # lists, not arrays: the loop below adds single numbers, which arrays are slow at
        plain = [[0.0] * len(self.vectors) for _ in range(ORDERS)]
        clipped = [[0.0] * len(self.vectors) for _ in range(ORDERS)]
        for order, part in enumerate(vector.weights):
            products, clips = plain[order], clipped[order]
            for gram, weight in part.items():
                for number, other in self.index.get(gram, ()):
                    products[number] += weight * other
                    clips[number] += min(weight, other) * other
        norms = self.norms * np.array(vector.norms)
        norms[norms == 0] = 1.0  # a zero vector has a zero product too
        penalty = np.exp(-((vector.length - self.lengths) ** 2) / (2 * SIGMA**2))
        cider = (np.array(plain).T / norms).mean()
        cider_d = (np.array(clipped).T / norms * penalty[:, None]).mean()
        return SCALE * float(cider), SCALE * float(cider_d)
