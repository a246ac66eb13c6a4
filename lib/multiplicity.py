"""Many claims at once: what is left of single decisions when all of them are judged together.

Each verdict is decided by its own 95 % interval.  Of many such decisions some come by chance, so
wherever verdicts are counted, `tally` also tells how many of them chance alone would decide and how
many stand after Holm's correction over all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.ranking import LEVEL, RESAMPLES


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment of (M,) p-values; NaN stays NaN and is not counted."""
    p_values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    order = _ascending(p_values)
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    return adjusted


def holm_levels(p_values: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Confidence level of each of (M,) intervals that matches Holm's step-down test; NaN gets NaN.

    The smallest p is judged at alpha / M, the next at alpha / (M - 1), ...  The test stops at the
    first that fails, so all after it keep its level: an interval excludes zero only where Holm's
    test decides, too.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    levels = np.full(p_values.shape, np.nan)
    order = _ascending(p_values)
    alphas = (1 - level) / (len(order) - np.arange(len(order)))
    failing = np.flatnonzero(p_values[order] > alphas)
    if failing.size:
        alphas[failing[0] :] = alphas[failing[0]]
    levels[order] = 1 - alphas
    return levels


def _ascending(p_values: np.ndarray) -> np.ndarray:
    """Places of the p-values that exist, the smallest first."""
    tested = np.flatnonzero(np.isfinite(p_values))
    return tested[np.argsort(p_values[tested], kind="stable")]


def standing(records: Sequence[Mapping[str, Any]], level: float = LEVEL) -> list[bool]:
    """Which verdicts, as `claims.Verdict.record` gives them, stay decided after Holm over all of them.

    A verdict without a p-value (it could not be judged) is not counted and never stands.
    """
    found = [record.get("p") for record in records]
    p_values = np.array([np.nan if p is None else p for p in found], dtype=np.float64)
    decided = np.array([record["finding"] in ("holds", "reversed") for record in records], dtype=bool)
    return (decided & (np.nan_to_num(holm(p_values), nan=1.0) <= 1 - level)).tolist()


def counted(count: int, finding: str) -> str:
    """Such as "1 holds", "3 hold", "2 undecided"."""
    return f"{count} {'hold' if finding == 'holds' and count != 1 else finding}"


def tally(records: Sequence[Mapping[str, Any]], level: float = LEVEL) -> str:
    """One sentence on all verdicts of a page together; empty where their p-values were not kept."""
    known = [record for record in records if record.get("p") is not None]
    if not known:
        return ""
    kept = [record["finding"] for record, stands in zip(known, standing(known, level), strict=True) if stands]
    counts = [counted(kept.count(name), name) for name in ("holds", "reversed")]
    chance = len(known) * (1 - level)
    few = "less than one" if chance < 1 else f"about {chance:.0f}"
    alone = f"Each is decided by itself: if there were nothing to find, {few} of {len(known)} would be decided by chance."
    if len(known) * 2 / (RESAMPLES + 1) > 1 - level:  # the least p-value there is would not pass
        return f"{alone} They are too many to be judged all together by {RESAMPLES} resamples."
    return f"{alone} Judged all together (Holm's correction) there remain: {', '.join(counts)}."
