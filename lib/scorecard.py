"""From rows as played to rows as read: rank, selection, caption scores and semantic accuracy.

No model runs here, so scores can be made again without playing again. A score that cannot be had
is null: for a flagged picture, an item without references, a metric that is missing on this
machine (the reason goes to ``run.json``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

import lib
from lib import metrics, ranking
from lib.datasets import Item
from lib.results import BASELINES, CAPTION_SCORES, ROWS, SEMANTIC_SCORES, to_table

LIB = Path(lib.__file__).parent
_CODE = ("scorecard.py", "metrics.py", "ranking.py", "scoring/*.py", "picturebook/semantics.py",
         "picturebook/lexicon.py")


@lru_cache(maxsize=1)
def version() -> str:
    """A hash of the program's scoring code. Tables carry it, and are scored again (not played
    again) when it has changed, so that no table mixes the scores of two programs."""
    digest = hashlib.sha256()
    for pattern in _CODE:
        for path in sorted(LIB.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def score_rows(
    played: pa.Table, items: Mapping[str, Item], corpus: metrics.Corpus | None
) -> tuple[pa.Table, dict[str, str]]:
    """Rank and score played rows of whole sources.

    items: the dataset's items by id; corpus: the references of the full split, None if there are
    none. Returns the rows in the same order and {metric: why it is missing}.
    """
    frame = played.to_pandas()
    spoken = frame["message"] if (frame["task"] == "image").all() else frame["reconstruction"]
    frame = frame.assign(**rank(frame["item"].to_numpy(), frame["similarity"].to_numpy()))
    usable = ~frame["flagged"].to_numpy(dtype=bool)
    scores, missing = _scores(frame["item"], spoken, usable, items, corpus)
    return to_table(pd.concat([frame, scores], axis=1), ROWS), missing


def score_baselines(
    played: pa.Table, items: Mapping[str, Item], corpus: metrics.Corpus | None
) -> pa.Table:
    """Score baseline captions with the same metrics as the rows."""
    frame = played.to_pandas()
    usable = np.ones(len(frame), dtype=bool)
    scores, _ = _scores(frame["item"], frame["caption"], usable, items, corpus)
    return to_table(pd.concat([frame, scores], axis=1), BASELINES)


def rank(items: np.ndarray, similarity: np.ndarray) -> dict[str, Any]:
    """rank (1 = most similar, the first candidate among ties; None where nothing was measured)
    and selected, each (N,). Rows of one item are neighbours, candidates in order."""
    ranks: list[int | None] = []
    starts = np.flatnonzero(np.r_[True, items[1:] != items[:-1]]) if len(items) else []
    for group in np.split(similarity, starts[1:]) if len(items) else []:
        ordinal = ranking.ordinal_ranks(group)  # NaN after every number
        ranks += [None if np.isnan(v) else int(r) for v, r in zip(group, ordinal, strict=True)]
    return {"rank": pd.array(ranks, dtype="Int32"), "selected": [r == 1 for r in ranks]}


def _scores(
    ids: pd.Series, captions: pd.Series, usable: np.ndarray, items: Mapping[str, Item],
    corpus: metrics.Corpus | None,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Every score column of (item, caption) pairs; each distinct pair is scored once."""
    pairs = pd.DataFrame({"item": ids.astype(str), "caption": captions})
    distinct = pairs[usable].drop_duplicates().reset_index(drop=True)
    against, missing = _against_references(distinct, items, corpus)
    known = pd.concat([distinct, against, _against_scenes(distinct, items)], axis=1)
    merged = pairs.merge(known, how="left", on=["item", "caption"])
    merged.loc[~usable, [*CAPTION_SCORES, *SEMANTIC_SCORES]] = np.nan
    return merged[[*CAPTION_SCORES, *SEMANTIC_SCORES]], missing


def _against_references(
    pairs: pd.DataFrame, items: Mapping[str, Item], corpus: metrics.Corpus | None
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Caption scores of pairs; NaN for an item without references."""
    empty = pd.DataFrame(np.nan, index=pairs.index, columns=list(CAPTION_SCORES))
    known = np.array([bool(items[item].references) for item in pairs["item"]], dtype=bool)
    if corpus is None or not known.any():
        return empty, dict.fromkeys(CAPTION_SCORES, "the dataset has no reference captions")
    asked = pairs[known]
    found = metrics.score_candidates(asked["item"].tolist(), asked["caption"].tolist(), corpus)
    for name in CAPTION_SCORES:
        empty.loc[known, name] = found[name].to_numpy()
    return empty, dict(found.attrs.get("missing", {}))


def _against_scenes(pairs: pd.DataFrame, items: Mapping[str, Item]) -> pd.DataFrame:
    """Semantic accuracy of pairs against the true scene; NaN where none is known."""
    scenes = [items[item].scene for item in pairs["item"]]
    if not any(scene is not None for scene in scenes):
        return pd.DataFrame(np.nan, index=pairs.index, columns=list(SEMANTIC_SCORES))
    found = metrics.score_semantics(pairs["caption"].tolist(), scenes)
    return found.reindex(columns=list(SEMANTIC_SCORES)).set_index(pairs.index)
