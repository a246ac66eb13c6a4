"""Scores from raw embeddings: CLIP score of two images (section 4.3), CLIPScore and RefCLIPScore of captions.

Hessel et al., 2021, put "A photo depicts" before each text. Texts are embedded by the caller, which takes the prompt
from the encoder's settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WEIGHT = 2.5  # spreads the caption score over about [0, 1]; equation 1 of Hessel et al.


def clip_score(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return rowwise cosines in [-1, 1], (N, d) with (N, d) -> float64 (N,); NaN for a zero vector."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    products = (first * second).sum(axis=-1)
    return np.divide(products, norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def clipscore(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return CLIPScore in [0, 2.5] of image and caption embeddings, (N, d) with (N, d) -> float64 (N,)."""
    return WEIGHT * np.maximum(clip_score(images, texts), 0.0)


def ref_clipscore(images: np.ndarray, texts: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
    """Return RefCLIPScore in [0, 10/7], float64 (N,): harmonic mean of CLIPScore and the best cosine with a reference.

    ``references`` holds N arrays (R_i, d). NaN for a row without references, 0 where either part is 0.
    """
    own = clipscore(images, texts)
    best = np.full(len(own), np.nan)
    for row, (text, group) in enumerate(zip(texts, references, strict=True)):
        if len(group):
            best[row] = max(clip_score(np.broadcast_to(text, np.shape(group)), group).max(), 0.0)
    total = own + best
    return np.divide(2 * own * best, total, out=total * 0.0, where=total > 0)
