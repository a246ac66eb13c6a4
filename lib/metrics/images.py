"""Scores of a caption by the image: CLIPScore, RefCLIPScore (Hessel et al., 2021; the caller embeds each text with the
prompt of the encoder's settings), and semantic accuracy by a picture-book image's true scene."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lib.ranking import cosine

WEIGHT = 2.5  # spreads the score over about [0, 1]; equation 1 of Hessel et al.
_KINDS = ("object", "colour", "relation", "setting")
SEMANTIC_SCORES = (*(f"sem_{kind}_{part}" for kind in _KINDS for part in "prf"), "sem_f")


def clipscore(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return CLIPScore in [0, 2.5] of raw image and caption embeddings, (N, d) with (N, d) -> float64 (N,)."""
    return WEIGHT * np.maximum(cosine(images, texts), 0.0)


def ref_clipscore(images: np.ndarray, texts: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
    """Return RefCLIPScore in [0, 10/7], float64 (N,): harmonic mean of CLIPScore and the best cosine with a reference, of N
    arrays (R_i, d). NaN for a row without references, 0 where either part is 0."""
    own = clipscore(images, texts)
    pairs = zip(texts, references, strict=True)
    best = np.array([max(cosine(text, group).max(), 0.0) if len(group) else np.nan for text, group in pairs])
    total = own + best
    return np.divide(2 * own * best, total, out=total * 0.0, where=total > 0)


def score_semantics(captions: Sequence[str], scenes: Sequence[Mapping | None]) -> pd.DataFrame:
    """Return N rows of ``SEMANTIC_SCORES`` in [0, 1]: precision, recall and F1 by kind of fact, and F1 of all facts. Scenes
    are as in ``scenes.json``; NaN where there is none or a part does not apply."""
    from lib.picturebook.scenes import Scene  # only the picture book needs these two
    from lib.picturebook.semantics import judge

    pairs = list(zip(captions, scenes, strict=True))
    judged = {i: judge(caption, Scene.from_dict(scene)) for i, (caption, scene) in enumerate(pairs)
              if isinstance(caption, str) and scene is not None}
    table = pd.DataFrame.from_dict(judged, orient="index", dtype=np.float64).add_prefix("sem_")
    return table.reindex(index=range(len(pairs)), columns=SEMANTIC_SCORES).astype(np.float64)
