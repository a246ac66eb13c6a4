"""CLIPScore and RefCLIPScore of captions from raw embeddings (Hessel et al., 2021).

They put "A photo depicts" before each text: the caller embeds texts with the prompt of the encoder's settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lib.ranking import cosine

WEIGHT = 2.5  # spreads the score over about [0, 1]; equation 1 of Hessel et al.


def clipscore(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return CLIPScore in [0, 2.5] of image and caption embeddings, (N, d) with (N, d) -> float64 (N,)."""
    return WEIGHT * np.maximum(cosine(images, texts), 0.0)


def ref_clipscore(images: np.ndarray, texts: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
    """Return RefCLIPScore in [0, 10/7], float64 (N,): harmonic mean of CLIPScore and the best cosine with a reference.

    ``references`` holds N arrays (R_i, d). NaN for a row without references, 0 where either part is 0.
    """
    own = clipscore(images, texts)
    pairs = zip(texts, references, strict=True)
    best = np.array([max(cosine(text, group).max(), 0.0) if len(group) else np.nan for text, group in pairs])
    total = own + best
    return np.divide(2 * own * best, total, out=total * 0.0, where=total > 0)
