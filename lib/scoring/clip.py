"""Scores from embeddings: CLIP score between images, CLIPScore and RefCLIPScore of captions.

Hessel et al., 2021, for the caption scores; section 4.3 of the paper for the image score. All
take raw embeddings and use directions only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WEIGHT = 2.5  # spreads the caption score over about [0, 1]; equation 1 of Hessel et al.


def clip_score(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Row-wise cosine, (N, d) with (N, d) -> float64 (N,) in [-1, 1]; NaN for a zero vector."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"embeddings differ in shape: {first.shape} and {second.shape}")
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    products = (first * second).sum(axis=-1)
    return np.divide(products, norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def clipscore(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """CLIPScore of captions, (N, d) with (N, d) -> float64 (N,) in [0, 2.5].

    It takes embeddings, and rows embed a caption as it is; Hessel et al. put "A photo depicts" before
    each, so their published values are not comparable with ours.
    """
    return WEIGHT * np.maximum(clip_score(images, texts), 0.0)


def ref_clipscore(
    images: np.ndarray, texts: np.ndarray, references: Sequence[np.ndarray]
) -> np.ndarray:
    """RefCLIPScore: harmonic mean of CLIPScore and the best cosine with a reference.

    Args:
        images, texts: (N, d), the image and the caption of each row.
        references: N arrays (R_i, d), embeddings of the row's reference captions.

    Returns:
        float64 (N,) in [0, 10/7]; NaN for a row without references, 0 where either part is 0.
    """
    if len(references) != len(texts):
        raise ValueError(f"{len(texts)} captions but references for {len(references)}")
    own = clipscore(images, texts)
    best = np.full(len(own), np.nan)
    for row, group in enumerate(references):
        if len(group):
            group = np.asarray(group, np.float64)
            text = np.broadcast_to(np.asarray(texts[row], np.float64), group.shape)
            best[row] = max(float(clip_score(text, group).max()), 0.0)
    total = own + best
    return np.divide(2 * own * best, total, out=total * 0.0, where=total > 0)
