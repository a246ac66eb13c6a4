"""Finished runs as tables to sort and filter: one line a source, one point a candidate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from lib.errors import UserError
from lib.explorer.play import NAN, Candidate
from lib.results import SCORES, Run, runs_root

SORTS = {
    "similarity, lowest first": ("similarity", True),
    "similarity, highest first": ("similarity", False),
    "score, lowest first": ("score", True),
    "score, highest first": ("score", False),
    "disagreement of similarity and score": ("disagreement", False),
    "disagreement of encoder and judge": ("judge_disagreement", False),
    "domain": ("domain", True),
}
ALL = "all"


def finished_runs(root: Path | None = None) -> list[Run]:
    """Finished runs, the newest first."""
    folder = root or runs_root()
    found = [Run(path.parent) for path in folder.glob("*/rows.parquet")]
    return sorted(found, key=lambda run: (run.path / "rows.parquet").stat().st_mtime, reverse=True)


@lru_cache(maxsize=4)
def rows_of(run: Run) -> pd.DataFrame:
    """A run's rows without flagged pictures, read once."""
    rows = run.rows()
    return rows[~rows["flagged"].astype(bool) & rows["similarity"].notna()].reset_index(drop=True)


def scores_of(rows: pd.DataFrame) -> list[str]:
    """The score columns that have values."""
    return [name for name in SCORES if name in rows and rows[name].notna().any()]


def domains_of(rows: pd.DataFrame) -> list[str]:
    """"all" and the domains of the rows."""
    return [ALL, *sorted(rows["domain"].dropna().unique())]


@dataclass(frozen=True)
class View:
    """What to show of a run: a score, a domain, an order, and from where to where.

    low, high: of the similarity; score_low, score_high: of the score as the rows have it, not times
    100; disagreement: its least size, 0 for all.
    """

    score: str
    domain: str = ALL
    low: float = -np.inf
    high: float = np.inf
    sort: str = next(iter(SORTS))
    score_low: float = -np.inf
    score_high: float = np.inf
    disagreement: float = 0.0


def points(rows: pd.DataFrame, view: View) -> pd.DataFrame:
    """The candidates within a view: similarity, score, and disagreement.

    disagreement: percentile of the similarity minus percentile of the score, over the whole run;
    near 1 where a faithful reconstruction comes from a low-scoring message. judge_disagreement:
    the difference of the encoder's and the judge's percentiles, in size.
    """
    if view.score not in rows:
        raise UserError(f"the run has no score {view.score!r}: choose another one")
    known = rows.assign(score=rows[view.score].astype(float))
    place = known["similarity"].rank(pct=True)
    known["disagreement"] = place - known["score"].rank(pct=True)
    known["judge_disagreement"] = (place - known["similarity_judge"].rank(pct=True)).abs()
    inside = known["similarity"].between(view.low, view.high)
    inside &= known["score"].between(view.score_low, view.score_high)  # false where there is no score
    inside &= known["disagreement"].abs() >= view.disagreement
    if view.domain != ALL:
        inside &= known["domain"] == view.domain
    return known[inside]


def sources(shown: pd.DataFrame, view: View) -> pd.DataFrame:
    """One line a source: its selected candidate, or its best one within the view; sorted."""
    best = shown.sort_values(["item", "rank"]).drop_duplicates("item")
    column, ascending = SORTS[view.sort]
    return best.sort_values([column, "item"], ascending=[ascending, True], kind="stable")


def candidates_of(run: Run, item: str) -> list[Candidate]:
    """One source's candidates of a finished run, with their pictures."""
    rows = rows_of(run)
    one = rows[rows["item"] == item]
    if one.empty:
        raise UserError(f"run {run.name} has no item {item!r}: choose another one")
    known = [name for name in SCORES if one[name].notna().any()]
    return [_candidate(run, line, known) for _, line in one.iterrows()]


def _candidate(run: Run, line: pd.Series, known: list[str]) -> Candidate:
    """A row as a candidate."""
    image = line["task"] == "image"
    path, words = ("reconstruction", "message") if image else ("message", "reconstruction")
    judged = line["similarity_judge"]
    return Candidate(
        int(line["candidate"]), int(line["seed"]), line[words], np.asarray(run.image(line[path])),
        float(line["logprob"]), bool(line["flagged"]), bool(line["truncated"]), float(line["similarity"]),
        NAN if pd.isna(judged) else float(judged), {name: float(line[name]) for name in known})
