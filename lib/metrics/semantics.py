"""Semantic accuracy: what a caption says of a picture-book image, judged by the true scene; no references involved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

_KINDS = ("object", "colour", "relation", "setting")
SEMANTIC_SCORES = (*(f"sem_{kind}_{part}" for kind in _KINDS for part in "prf"), "sem_f")


def score_semantics(captions: Sequence[str], scenes: Sequence[Mapping | None]) -> pd.DataFrame:
    """Return N rows of ``SEMANTIC_SCORES`` in [0, 1]: precision, recall and F1 by kind of fact, and F1 of all facts.

    ``scenes`` are dicts as ``scenes.json`` holds them. NaN where the scene is None or a part does not apply.
    """
    from lib.picturebook.scenes import Scene  # only the picture book needs these two
    from lib.picturebook.semantics import judge

    pairs = list(zip(captions, scenes, strict=True))
    judged = {i: judge(caption, Scene.from_dict(scene)) for i, (caption, scene) in enumerate(pairs)
              if isinstance(caption, str) and scene is not None}  # fmt: skip
    table = pd.DataFrame.from_dict(judged, orient="index", dtype=np.float64).add_prefix("sem_")
    return table.reindex(index=range(len(pairs)), columns=SEMANTIC_SCORES).astype(np.float64)
