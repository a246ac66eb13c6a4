"""The paper's claims as computations: rows in, a verdict with an interval out.

Every verdict is one sentence of the paper, the number that decides it, and what this run says.
Nothing here knows a model or draws a figure; the statistics live in `ranking`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lib import labels, ranking
from lib.errors import UserError
from lib.ranking import Estimate
from lib.seeds import stable_seed


@dataclass(frozen=True)
class Verdict:
    """One claim of the paper, judged on one run.

    direction: +1 if the claim says the statistic is positive, -1 if negative, 0 if it says that
    it is negligible, that is within +-margin.
    """

    claim: str
    task: str
    dataset: str
    statistic: str
    estimate: Estimate
    direction: int = 1
    margin: float = 0.0
    unit: str = ""

    @property
    def finding(self) -> str:
        """holds, reversed, undecided or unknown: decided by the 95 % interval alone."""
        low, high = self.estimate.interval()
        if math.isnan(low):
            return "unknown"
        if self.direction == 0:
            inside = -self.margin < low and high < self.margin
            outside = low > self.margin or high < -self.margin
            return "holds" if inside else "reversed" if outside else "undecided"
        low, high = sorted((low * self.direction, high * self.direction))
        return "holds" if low > 0 else "reversed" if high < 0 else "undecided"

    def sentence(self) -> str:
        """The verdict in words, with the interval where there is one."""
        low, high = self.estimate.interval()
        between = "" if math.isnan(low) else f", 95 % interval {low:.3g} to {high:.3g}{self.unit}"
        left_out = f", {self.estimate.left_out} left out" if self.estimate.left_out else ""
        edge = f"{self.margin:g}{self.unit}" if self.direction == 0 else "zero"
        outcome = {
            "holds": "holds for this run",
            "reversed": "does not hold for this run: the opposite is the case",
            "undecided": f"is not decided by this run: the interval reaches across {edge}",
            "unknown": "cannot be judged on this run: too few sources",
        }[self.finding]
        return (
            f"{labels.TASKS[self.task]}, {labels.dataset_label(self.dataset)}: the claim that "
            f"{self.claim} {outcome}; {self.statistic} = {self.estimate.value:.3g}{self.unit}"
            f"{between} (n = {self.estimate.n}{left_out})."
        )

    def record(self) -> dict:
        """As JSON; a number that does not exist is null. p is two-sided and not corrected."""
        p = self.estimate.p_value(self.margin)
        value, low, high = (
            None if math.isnan(v) else v for v in (self.estimate.value, *self.estimate.interval())
        )
        return {
            "claim": self.claim,
            "task": self.task,
            "dataset": self.dataset,
            "statistic": self.statistic,
            "unit": self.unit,
            "value": value,
            "interval": [low, high],
            "p": None if math.isnan(p) else p,
            "holds": self.finding == "holds",
            "finding": self.finding,
            "n": self.estimate.n,
            "left_out": self.estimate.left_out,
            "sentence": self.sentence(),
        }


def write_verdicts(verdicts: Iterable[Verdict], path: Path) -> None:
    """Write `<name>.verdict.json`, a list of records, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([v.record() for v in verdicts], indent=1, ensure_ascii=False) + "\n"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# rows as matrices


def prepare(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows sorted by item and candidate, without sources that have a flagged picture.

    A safety checker's black picture says nothing about a caption; the whole source goes, so that
    both rows of every comparison keep the same sources.  To leave out the candidate alone would
    make another baseline (nucleus sampling without what the checker dislikes), another ranking
    (9 ranks beside 10) and another corpus for each k.  `attrs` hold K, n_flagged (sources left out)
    and n_flagged_rows.
    """
    if rows.empty:
        raise UserError("rows: the table is empty, play the game first (notebooks 01 and 02)")
    marked = rows.loc[rows["flagged"].fillna(False).astype(bool), "item"]
    flagged = marked.unique()
    kept = rows[~rows["item"].isin(flagged)].sort_values(["item", "candidate"])
    if kept.empty:
        raise UserError(f"rows: the safety checker flagged pictures of all {len(flagged)} sources, nothing "
                        "is left to compare; set safety_checker = false in the preset's generator")
    sizes = kept.groupby("item").size()
    if sizes.nunique() != 1:
        raise UserError(
            f"rows: {len(sizes)} sources have {sorted(sizes.unique().tolist())} candidates, "
            "not one equal number; play the run to its end (notebooks 01 and 02)"
        )
    kept = kept.reset_index(drop=True)
    kept.attrs = {"n_flagged": len(flagged), "n_flagged_rows": len(marked),
                  "n_candidates": int(sizes.iloc[0])}
    return kept


def grid(rows: pd.DataFrame, column: str) -> np.ndarray:
    """A score column of prepared rows as a float matrix (S, K), candidates in order."""
    if column not in rows:
        raise UserError(f"rows: no column {column!r}; play this run again (notebooks 01 and 02)")
    values = pd.to_numeric(rows[column]).to_numpy(dtype=np.float64, na_value=np.nan)
    return values.reshape(-1, rows.attrs["n_candidates"])


def has(rows: pd.DataFrame, column: str) -> bool:
    """Whether a score could be computed for any row."""
    return column in rows and bool(rows[column].notna().any())


def chosen(rows: pd.DataFrame) -> np.ndarray:
    """(S,) index of the selected candidate."""
    return grid(rows, "rank").argmin(axis=1)


def generator(seed: int, *parts: str) -> np.random.Generator:
    """The bootstrap's own generator: one claim's interval does not move with another's."""
    return np.random.default_rng(stable_seed(seed, "bootstrap", *parts))


def identity(rows: pd.DataFrame) -> tuple[str, str]:
    """(task, dataset) of the rows of one run."""
    return str(rows["task"].iloc[0]), str(rows["dataset"].iloc[0])


# Figure 3: within a source


def rank_profile(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """Mean, standard error and SD of the score over sources at each rank of similarity.

    The standard error is that of the paper's point, the mean over sources at one rank; the SD is
    the spread of single sources, most of which is easy pictures against hard ones.
    """
    by_rank = ranking.order_by_rank(grid(rows, score), grid(rows, "rank"))
    n = np.isfinite(by_rank).sum(axis=0)
    sd = np.nanstd(by_rank, axis=0, ddof=1) if len(by_rank) > 1 else np.full(len(n), np.nan)
    ranks = np.arange(1, len(n) + 1)
    mean = np.nanmean(by_rank, axis=0)
    return pd.DataFrame({"rank": ranks, "mean": mean, "se": sd / np.sqrt(n), "sd": sd, "n": n})


def rank_verdicts(rows: pd.DataFrame, score: str, seed: int) -> list[Verdict]:
    """Figure 3's claims: better reconstruction, better message; and slower among good ones."""
    task, dataset = identity(rows)
    similarity, scores = grid(rows, "similarity"), grid(rows, score)
    name = labels.metric_label(score)
    message = {"image": "caption", "text": "image"}[task]

    def draw(part: str) -> np.random.Generator:
        return generator(seed, "rank", dataset, task, score, part)

    verdicts = [
        Verdict(
            f"the better the reconstruction, the better the {message} (Figure 3)",
            task,
            dataset,
            f"mean within-source Spearman rho of similarity and {name}",
            ranking.within_source_spearman(similarity, scores, draw("rho")),
        )
    ]
    if task == "image":  # in the other task the words are the receiver's, not the message's
        length = grid(rows, "n_words")
        verdicts.append(
            Verdict(
                "this is not only because longer captions are selected (3.5)",
                task,
                dataset,
                "the same rho with the number of words partialled out",
                ranking.within_source_spearman(similarity, scores, draw("length"), length),
            )
        )
    by_rank = ranking.order_by_rank(scores, grid(rows, "rank"))
    verdicts.append(
        Verdict(
            "quality changes slower among good reconstructions than among bad ones (5.1)",
            task,
            dataset,
            f"loss of {name} per rank, worse half minus better half",
            ranking.slope_contrast(by_rank, draw("slope")),
        )
    )
    return verdicts


def controlled(rows: pd.DataFrame, score: str, seed: int) -> dict[str, ranking.Estimate]:
    """Figure 3's rho of the image task with something else that is known of a caption taken out.

    The captioner's log-probability is known before anything is drawn: what is left then is what the
    reconstruction adds to it, and what `ranking.row_partial_spearman` cannot take out.
    """
    dataset = identity(rows)[1]
    words = grid(rows, "n_words")
    controls = {"nothing": None, "number of words": words}
    if has(rows, "logprob"):
        probability = grid(rows, "logprob")
        each = np.divide(probability, words, out=np.full(words.shape, np.nan), where=words > 0)
        controls |= {"log-probability": probability, "log-probability per word": each}
    parts = {"nothing": "rho", "number of words": "length"}  # the verdicts' own draws
    return {
        name: ranking.within_source_spearman(
            grid(rows, "similarity"), grid(rows, score),
            generator(seed, "rank", dataset, "image", score, parts.get(name, name)), control)
        for name, control in controls.items()
    }


# Figure 4: between sources


def source_means(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """One row a source: item, domain, mean similarity, mean score (Figure 4's dots)."""
    first = rows.drop_duplicates("item")
    return pd.DataFrame(
        {
            "item": first["item"].to_numpy(),
            "domain": first["domain"].to_numpy(),
            "similarity": grid(rows, "similarity").mean(axis=1),
            "score": grid(rows, score).mean(axis=1),
        }
    )


def correlation_verdicts(means: pd.DataFrame, task: str, dataset: str, seed: int) -> list[Verdict]:
    """Figure 4's claims about one panel: the trend, and the spread among good reconstructions."""
    x, y = means["similarity"].to_numpy(), means["score"].to_numpy()
    name = labels.metric_label(labels.PRIMARY[task])
    return [
        Verdict(
            "sources that are reconstructed better have better messages (Figure 4)",
            task,
            dataset,
            f"Spearman's rho between sources of mean similarity and mean {name}",
            ranking.between_source_spearman(x, y, generator(seed, "between", dataset, task)),
        ),
        Verdict(
            "where reconstruction is good, quality varies little (5.1)",
            task,
            dataset,
            f"log ratio of the SD of {name}, best third over worst third of similarity",
            ranking.spread_log_ratio(x, y, generator(seed, "spread", dataset, task)),
            direction=-1,
        ),
    ]


def spread_reasons(rows: pd.DataFrame, vague: Callable[[str], bool], seed: int) -> dict[str, ranking.Estimate]:
    """The spread of 5.1 measured otherwise, to see what a reversed verdict comes from (image task).

    vague: whether all references of an item only name the family; such a right caption scores low
    however well it is reconstructed.  The semantic score has no wording in it, and an upper end, near
    which it cannot spread; it is left out where no true scene is known.
    """
    dataset = identity(rows)[1]
    score = labels.PRIMARY["image"]
    name = labels.metric_label(score)
    clear = rows[[not vague(item) for item in rows["item"]]].reset_index(drop=True)
    clear.attrs = rows.attrs
    plain, relative = ranking.spread_log_ratio, ranking.relative_spread_log_ratio
    measured = {name: (rows, score, plain), f"{name}, in units of its mean there": (rows, score, relative)}
    if 0 < len(clear) < len(rows):
        without = "without pictures whose annotators only name the family"
        measured |= {f"{name}, {without}": (clear, score, plain),
                     f"{name}, both": (clear, score, relative)}
    if has(rows, "sem_f"):
        measured[labels.metric_label("sem_f")] = (rows, "sem_f", plain)
    found = {}
    for label, (table, column, spread) in measured.items():
        means = source_means(table, column)
        draws = generator(seed, "spread", dataset, "image")  # the verdict's own: its row repeats it
        found[label] = spread(means["similarity"].to_numpy(), means["score"].to_numpy(), draws)
    return found


def clearer_verdict(nocaps: Verdict, coco: Verdict) -> Verdict:
    """5.2: the trend of the text task is clearer on NoCaps than on COCO."""
    return Verdict(
        f"the trend is clearer here than on {labels.dataset_label(coco.dataset)} (5.2)",
        nocaps.task,
        nocaps.dataset,
        "difference of the two Spearman's rhos",
        ranking.difference(nocaps.estimate, coco.estimate),
    )


# 5.3: cosine against Euclidean distance


def euclidean_verdict(rows: pd.DataFrame, score: str, seed: int, margin: float = 2.0) -> Verdict:
    """5.3: selecting by Euclidean distance makes no substantial difference.

    margin: percent of the score that counts as substantial; the paper gives no number.
    """
    task, dataset = identity(rows)
    scores, distance = grid(rows, score), grid(rows, "similarity_euclidean")
    usable = np.isfinite(distance).any(axis=1)
    by_cosine = ranking.pick(scores, chosen(rows))[usable]
    by_distance = ranking.pick(scores[usable], ranking.select(-distance[usable]))
    rng = generator(seed, "euclidean", dataset, task, score)
    return Verdict(
        "selecting by Euclidean distance instead makes no substantial difference (5.3)",
        task,
        dataset,
        f"change of the selected messages' {labels.metric_label(score)}, margin ±{margin:g} %",
        ranking.paired_gain(by_cosine, by_distance, rng),
        direction=0,
        margin=margin,
        unit=" %",
    )


def agreement(rows: pd.DataFrame) -> float:
    """Share of sources for which both similarities select an equally similar candidate."""
    similarity, distance = grid(rows, "similarity"), grid(rows, "similarity_euclidean")
    usable = np.isfinite(distance).any(axis=1) & np.isfinite(similarity).any(axis=1)
    other = ranking.select(-distance[usable])
    return float((ranking.pick(similarity[usable], other) == similarity[usable].max(axis=1)).mean())


# Figure 6: which pictures are easy


def salient_verdict(
    means: pd.DataFrame, is_single: Callable[[str], bool], dataset: str, seed: int
) -> Verdict:
    """5.1: easy pictures mainly show one salient object.

    Compares the share of single-object pictures in the top quarter (by the worse of the two
    percentiles, similarity and score) with the share in the rest.
    """
    easy = easiness(means)
    single = np.array([bool(is_single(item)) for item in means["item"]])
    top = (easy >= np.quantile(easy, 0.75)).to_numpy()
    draws = [generator(seed, "salient", dataset, part) for part in ("top", "rest")]
    parts = [ranking.share(single[m], g) for m, g in zip((top, ~top), draws, strict=True)]
    return Verdict(
        "what is reconstructed and described well is mainly one salient object (5.1)",
        "image",
        dataset,
        "share of single-object pictures, easiest quarter minus the rest",
        ranking.difference(*parts),
    )


def easiness(means: pd.DataFrame) -> pd.Series:
    """The worse of a source's two percentiles: good in similarity and in score, or not easy."""
    return means[["similarity", "score"]].rank(pct=True).min(axis=1)
