"""Do the intervals keep their promise? The share of simulated data sets whose 95 % interval holds the true value.

    python -m tests.benchmarks.coverage [--sets 2000] [--sources 60 120 500] [--only GAIN]

Writes data/expected/coverage.csv, which notebook 90 shows: one line for each estimator in use, as lib/ranking.py and
the notebooks have it (their functions are taken from their cells). A data set is a sample of sources from a population
of 50,000 whose own statistic is the true value. A cell of 2,000 data sets has a standard error of half a percentage
point. The simulation draws fewer resamples than the notebooks, which adds noise to a bound and no bias.

The population resembles the rows of the default run. Sources differ in how easy they are. Similarity is skewed to the
left and varies more where a source is hard; CIDEr is skewed to the right, varies more where it is high, and is a
quarter for one source in eight whose references only name the family; semantic F1 has few levels and most sources near
its upper end. Candidates repeat each other, so that ranks tie and some sources have no rho. Shares of a source's
images are 0 or 1 for most. Components of variance are those of ten captions and eight draws, and differ between
sources by a factor of ten. Half-lives are whole rounds: their intervals hold the true one more often than promised.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import comb

from lib import ranking
from lib.base import ROOT
from lib.metrics import bleu_from_counts
from lib.ranking import difference, interval, relative_gain, share, share_difference, spearman, within_source_rho

TABLE = ROOT / "data" / "expected" / "coverage.csv"
RESAMPLES = 200
K, DRAWS = 10, 8  # candidates of a source; images of a caption in notebook 10
Sample = Mapping[str, np.ndarray]


def of_notebook(number: str, *names: str) -> list[Any]:
    """Return functions that a notebook's cells define."""
    path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    scope = {"np": np, "GOAL": 0.95, "bleu_from_counts": bleu_from_counts}
    exec(compile(ast.Module(wanted, []), path.name, "exec"), scope)
    return [scope[name] for name in names]


def candidates(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return similarity by two encoders, score, F1 and words of n sources with K candidates, each (n, K)."""
    ease, z, noise = rng.normal(size=(n, 1)), rng.normal(size=(n, K)), rng.normal(size=(n, K))
    words = np.clip(np.round(10.7 + 2.0 * rng.normal(size=(n, 1)) + 2.3 * rng.normal(size=(n, K))), 5, 18)
    vague = np.where(rng.random((n, 1)) < 1 / 8, 0.25, 1.0)
    found = {"similarity": np.maximum(-0.1, 1 - np.exp(-2.3 - 0.6 * ease - 0.75 * z)),
             "second": np.maximum(-0.1, 1 - np.exp(-2.3 - 0.6 * ease - 0.7 * z - 0.3 * rng.normal(size=(n, K)))),
             "cider": vague * np.maximum(0, np.exp(1 + 0.2 * ease + 0.08 * z + 0.01 * words + 0.35 * noise) - 0.5),
             "f1": np.round(8 * np.clip(0.95 + 0.12 * ease + 0.1 * z + 0.12 * rng.normal(size=(n, K)), 0, 1)) / 8,
             "words": words}
    again = rng.random((n, K)) < rng.beta(0.4, 3, (n, 1))  # equal to the source's first candidate
    return {name: np.where(again, values[:, :1], values) for name, values in found.items()}


def population(n: int = 50_000, seed: int = 0) -> dict[str, np.ndarray]:
    """Return what the estimators take of each source, one array a column."""
    rng = np.random.default_rng(seed)
    found = candidates(n, rng)
    rows = pd.DataFrame({name: values.ravel() for name, values in found.items()}).assign(item=np.repeat(np.arange(n), K))
    order, best = np.argsort(-found["similarity"], axis=1, kind="stable"), found["similarity"].argmax(axis=1)
    by_rank, every = np.take_along_axis(found["cider"], order, axis=1), np.arange(n)
    columns = {name: values.mean(axis=1) for name, values in found.items()}
    columns |= {f"best {name}": values[every, best] for name, values in found.items()}
    columns["rho"] = within_source_rho(rows, by=["item"]).to_numpy()
    columns["partial"] = within_source_rho(rows, by=["item"], control="words").to_numpy()
    loss = of_notebook("03", "loss_per_rank")[0]
    columns["contrast"] = loss(by_rank[:, K // 2:]) - loss(by_rank[:, : K // 2])
    columns["best of three"] = by_rank @ (comb(K - np.arange(1, K + 1), 2) / comb(K, 3))  # notebook 11
    centred = {name: found[name] - found[name].mean(axis=1, keepdims=True) for name in ("cider", "words")}
    columns["cross"] = (centred["words"] * centred["cider"]).sum(axis=1)
    columns["square"] = (centred["words"] ** 2).sum(axis=1)
    columns["change"], columns["longer"] = (columns[f"best {c}"] - columns[c] for c in ("cider", "words"))
    columns["planted"] = rng.random(n) < 0.3
    columns["added"] = np.round(K * np.where(columns["planted"], rng.beta(4, 0.6, n), rng.beta(0.3, 3, n))) / K
    columns["failed"] = rng.random(n) < np.where(columns["planted"], 0.6, 0.08)
    hard = rng.gamma(1.5, size=n) / 1.5  # hard sources vary more, by caption and by noise
    rest, caption = 0.01 * hard * rng.gamma(3, size=n) / 3, 0.02 * hard * rng.gamma(3, size=n) / 3
    measured = rest * rng.chisquare(K * (DRAWS - 1), n) / (K * (DRAWS - 1))
    of_means = (caption + rest / DRAWS) * rng.chisquare(K - 1, n) / (K - 1)
    columns |= {"caption": of_means - measured / DRAWS, "rest": measured}
    columns |= {name: bleu_counts(columns[words], columns[score], rng)
                for name, words, score in (("counts", "words", "cider"), ("best counts", "best words", "best cider"))}
    lost = rng.geometric(rng.beta(1.2, 12, n))  # the round in which a chain loses a fact
    columns |= {f"round {k}": (lost > k).astype(float) for k in range(21)}
    cells = np.array([0.3, 0.0, -0.3]) + 0.8 * rng.standard_t(5, (n, 3))  # three generators, in SD over sources
    return columns | {f"generator {k}": effect for k, effect in enumerate((cells - cells.mean(axis=1, keepdims=True)).T)}


def bleu_counts(words: np.ndarray, score: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return counts of BLEU, (n, 10), of captions with these numbers of words: the higher the score, the more matches."""
    guessed = np.stack([np.round(words) - k for k in range(4)], axis=1).clip(1)
    chance = np.clip(0.35 + 0.15 * score[:, None], 0, 0.95) ** np.arange(1, 5)
    matched = rng.binomial(guessed.astype(int), chance)
    closest = np.round(words + rng.normal(size=len(words)))
    return np.column_stack([matched, guessed, guessed[:, 0], closest]).astype(int)


def estimators() -> dict[str, tuple[str, Callable[[Sample], dict[str, float]]]]:
    """Return the notebooks that use an estimator and its result on a sample, by the estimator's name."""
    (_, log_ratio), (margin,), (icc,) = (of_notebook("04", "spread", "log_ratio"), of_notebook("11", "margin"),
                                         of_notebook("10", "icc"))
    (equal_length, bleu_gain), (circular,) = of_notebook("05", "equal_length", "bleu_gain"), of_notebook("14", "circular")
    (half_life,), (spread,) = of_notebook("13", "half_life"), of_notebook("12", "spread")

    def over(statistic: Callable[..., np.ndarray], *columns: str, **options: int) -> Callable[[Sample], dict[str, float]]:
        return lambda sample: interval([sample[column] for column in columns], statistic, **options)

    def groups(sample: Sample, column: str) -> tuple[np.ndarray, np.ndarray]:
        return sample[column][sample["planted"]], sample[column][~sample["planted"]]

    def bleu(sample: Sample) -> dict[str, float]:
        statistic = bleu_gain(sample["counts"][:, None], sample["best counts"], 3)
        return interval(np.arange(len(sample["counts"])), statistic)

    def trends(sample: Sample) -> dict[str, float]:
        halves = [np.stack([sample["similarity"], sample["cider"]])[:, k::2] for k in (0, 1)]
        return difference(*halves, spearman)

    return {
        "mean of within-source rho": ("03, 14", over(np.mean, "rho")),
        "the same, length partialled out": ("03", over(np.mean, "partial")),
        "mean difference of slopes": ("03", over(np.mean, "contrast")),
        "mean difference of scores": ("03, 08, 10", over(np.mean, "change")),
        "gain in percent, CIDEr": ("05, 09, 11, 14", over(relative_gain, "best cider", "cider")),
        "gain in percent, semantic F1": ("09, 11, 14", over(relative_gain, "best f1", "f1")),
        "gain in percent, corpus BLEU-4": ("05", bleu),
        "gain in percent at equal length": ("05", over(equal_length, "change", "longer", "cross", "square", "cider")),
        "gain with few images less 0.95 x the full gain": ("11", over(margin, "best of three", "best cider", "cider")),
        "circularity: gain by one encoder less the other's": (
            "14", over(circular, "best similarity", "best second", "similarity", "second")),
        "Spearman's rho between sources": ("04", over(spearman, "similarity", "cider")),
        "difference of two such rhos, half of the sources each": ("04", trends),
        "log ratio of spreads in thirds of the sources": ("04", over(log_ratio, "similarity", "cider")),
        "intraclass correlation": ("10", over(icc, "caption", "rest")),
        "spread of the effects of three generators": ("12", over(spread, *(f"generator {k}" for k in range(3)))),
        "half-life in whole rounds": ("13", over(half_life, *(f"round {k}" for k in range(21)))),
        "difference of means, three in ten sources planted": ("08", lambda s: difference(*groups(s, "added"))),
        "share of sources (Jeffreys)": ("07, 08", lambda s: share(int(s["failed"].sum()), len(s["failed"]))),
        "difference of shares, three in ten sources planted": (
            "07, 08", lambda s: share_difference(*(count for g in groups(s, "failed") for count in (g.sum(), len(g))))),
    }


def coverage(estimate: Callable[[Sample], dict[str, float]], whole: Sample, n: int, sets: int, seed: int = 1) -> float:
    """Return the percentage of data sets of n sources whose interval holds the estimate on the whole population."""
    rng, size = np.random.default_rng(seed), len(next(iter(whole.values())))
    ranking.RESAMPLES = 2
    truth, ranking.RESAMPLES, held = estimate(whole)["estimate"], RESAMPLES, 0
    for _ in range(sets):
        drawn = rng.integers(0, size, n)
        found = estimate({name: values[drawn] for name, values in whole.items()})
        held += found["low"] <= truth <= found["high"]
    return 100 * held / sets


def main() -> None:
    """Simulate each estimator at each number of sources and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=2000, help="data sets of each cell")
    parser.add_argument("--sources", type=int, nargs="+", default=[60, 120, 500])
    parser.add_argument("--only", default="", help="estimators with this in their name; the other lines stay as they are")
    flags = parser.parse_args()
    whole, known = population(), estimators()
    table = pd.read_csv(TABLE, index_col="estimator", dtype={"notebooks": str}) if flags.only else pd.DataFrame()
    for name, (notebooks, estimate) in known.items():
        if flags.only in name:
            table.loc[name, "notebooks"] = notebooks
            for n in flags.sources:
                table.loc[name, f"{n} sources"] = round(coverage(estimate, whole, n, flags.sets), 1)
            print(name, *table.loc[name], sep="  ", flush=True)
    table.reindex(list(known)).rename_axis("estimator").to_csv(TABLE)


if __name__ == "__main__":
    main()
