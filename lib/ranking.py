"""Similarity, ranks and the statistics of the paper's claims: arrays in, arrays out.

Every interval is a 95 % bootstrap interval over sources (2,000 resamples), never over candidates: the candidates of one
source are not independent of each other. Percentiles are expanded for small samples (Hesterberg 2015, section 5.2) and
hold the true value as often as they promise from 60 sources on (tests/benchmarks/coverage.py); BCa came no closer. Below
six sources there is no interval: without any effect, five sources lie on one side of zero once in 16 draws, six once in 32.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special, stats

RESAMPLES = 2000
LEVEL = 0.95
LEAST = 6  # sources that an interval needs
SOURCE = ["task", "dataset", "item"]  # the columns that name a source
Statistic = Callable[..., np.ndarray]  # (..., S) arrays and axis=-1 -> (...)


def cosine(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Return the cosine f(e_x, e_y) of raw embeddings row by row, (N, d), (N, d) -> (N,) in [-1, 1] (paper 3.4).

    The one place where embeddings are normalised. NaN for a zero vector.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.clip(np.sum(a * b, axis=-1) / np.where(norms > 0, norms, np.nan), -1.0, 1.0)


def euclidean(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Return the Euclidean distance of raw embeddings row by row, (N, d), (N, d) -> (N,) (paper 5.3)."""
    return np.linalg.norm(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), axis=-1)


def rank(similarity: ArrayLike, groups: ArrayLike) -> np.ndarray:
    """Return each candidate's rank in its source, (N,) float: 1 = most similar, the first candidate among ties.

    The candidate of rank 1 is the selected one, s = arg max_k f(e_x, e_x'_k) (3.5 writes arg min of the same
    symbol where a distance is meant). NaN where there is no similarity.
    """
    values = pd.Series(np.asarray(similarity, dtype=np.float64))
    return values.groupby(np.asarray(groups)).rank(method="first", ascending=False).to_numpy()


def within_source_rho(table: pd.DataFrame, x: str = "similarity", y: str = "cider", by: Sequence[str] = SOURCE,
                      control: str | None = None) -> pd.Series:
    """Return Spearman's rho of x and y over the candidates of each source, indexed by `by` (Figure 3's claim).

    Ties share their ranks. NaN where x or y is the same for all candidates: such a source says nothing about
    selection. With a control its ranks are partialled out of both (a control that is the same for all changes
    nothing; NaN where it determines x or y). Ranks of ten candidates do not take a control out completely:
    about a tenth of a rho of 0.5 that is due to it alone stays.
    """
    columns, by = [x, y, *([control] if control else [])], list(by)
    values = table.set_index(by)[columns].astype(float)
    values = values.where(values.notna().all(axis=1))
    ranks = values.groupby(level=by).rank()
    deviation = ranks - ranks.groupby(level=by).transform("mean")

    def correlation(a: str, b: str) -> pd.Series:
        products = {"ab": deviation[a] * deviation[b], "aa": deviation[a] ** 2, "bb": deviation[b] ** 2}
        sums = pd.DataFrame(products).groupby(level=by).sum()
        return sums["ab"] / np.sqrt(sums["aa"] * sums["bb"]).where(lambda scale: scale > 1e-9)

    rho = correlation(x, y)
    if control:
        of_x, of_y = correlation(x, control).fillna(0.0), correlation(y, control).fillna(0.0)
        rest = np.sqrt(((1 - of_x**2) * (1 - of_y**2)).clip(lower=0.0))
        rho = ((rho - of_x * of_y) / rest.where(rest > 1e-6)).clip(-1.0, 1.0)
    return rho.rename("rho")


def relative_gain(selected: np.ndarray, baseline: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return 100 * (mean selected / mean baseline - 1) in percent (Table 1's last row)."""
    return 100 * (np.mean(selected, axis=axis) / np.mean(baseline, axis=axis) - 1)


def spearman(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return Spearman's rho of x and y along the last axis, (..., S), (..., S) -> (...), NaN if one is constant."""
    a, b = (stats.rankdata(values, axis=axis) for values in (x, y))
    a, b = (ranks - ranks.mean(axis=axis, keepdims=True) for ranks in (a, b))
    scale = np.sqrt(np.sum(a**2, axis=axis) * np.sum(b**2, axis=axis))
    return np.sum(a * b, axis=axis) / np.where(scale > 0, scale, np.nan)


def _resampled(values: ArrayLike, statistic: Statistic, seed: int) -> tuple[float, np.ndarray, int]:
    """Return (statistic, (B,) its values on the resamples, sources used) of (S,) or (V, S) values."""
    columns = np.atleast_2d(np.asarray(values, dtype=np.float64))
    columns = columns[:, np.isfinite(columns).all(axis=0)]
    n = columns.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):  # resamples without a value are dropped below
        estimate = float(statistic(*columns, axis=-1)) if n else np.nan
        if n < 2:
            return estimate, np.empty(0), n
        rng, batch = np.random.default_rng(seed), max(1, 100_000 // n)
        sources = (rng.integers(0, n, (size, n)) for size in np.diff([*range(0, RESAMPLES, batch), RESAMPLES]))
        drawn = np.concatenate([statistic(*(column[some] for column in columns), axis=-1) for some in sources])
    return estimate, drawn[np.isfinite(drawn)], n


def _summary(estimate: float, drawn: np.ndarray, n: int, smallest: int, least: int = LEAST) -> dict[str, float]:
    """Return estimate, low, high, n and the two-sided p of resamples; smallest: sources of the smallest group."""
    low = high = p = np.nan
    if smallest >= least and drawn.size and np.isfinite(estimate):
        widen, df = np.sqrt(smallest / (smallest - 1)), smallest - 1
        tail = special.ndtr(widen * special.stdtrit(df, (1 - LEVEL) / 2))  # expanded percentiles
        low, high = (float(v) for v in np.quantile(drawn, [tail, 1 - tail], method="weibull"))
        beyond = (min(np.sum(drawn <= 0), np.sum(drawn >= 0)) + 1) / (drawn.size + 1)
        p = float(min(1.0, 2 * special.stdtr(df, special.ndtri(min(0.5, beyond)) / widen)))
    return {"estimate": estimate, "low": low, "high": high, "n": n, "p": p}


def interval(values: ArrayLike, statistic: Statistic = np.mean, seed: int = 0, least: int = LEAST) -> dict[str, float]:
    """Return estimate, low, high, n and p of a statistic over sources (95 % bootstrap over sources).

    values: (S,), or (V, S) for a statistic of V columns of the same sources, e.g. `spearman`; a source with a
    NaN is left out. low, high and p are NaN below `least` sources. p is two-sided against zero.
    """
    estimate, drawn, n = _resampled(values, statistic, seed)
    return _summary(estimate, drawn, n, n, least)


def gain(selected: ArrayLike, baseline: ArrayLike, seed: int = 0) -> dict[str, float]:
    """Return the relative gain in percent of selected over baseline as `interval` does, paired by source.

    NaN where the mean of the baseline may be zero: a percentage of it says nothing.
    """
    result = interval([selected, baseline], relative_gain, seed)
    base = interval([baseline, selected], lambda base, _, axis=-1: np.mean(base, axis=axis), seed)
    return result | dict.fromkeys(("estimate", "low", "high", "p"), np.nan) if base["low"] <= 0 <= base["high"] else result


def difference(a: ArrayLike, b: ArrayLike, statistic: Statistic = np.mean, seed: int = 0) -> dict[str, float]:
    """Return statistic(a) - statistic(b) of disjoint sources, six or more each, as `interval` does; n counts both."""
    one, two = (_resampled(values, statistic, seed + k) for k, values in enumerate((a, b)))
    kept = min(len(one[1]), len(two[1]))
    return _summary(one[0] - two[0], one[1][:kept] - two[1][:kept], one[2] + two[2], min(one[2], two[2]))


def share(k: int, n: int) -> dict[str, float]:
    """Return estimate, low, high and n of a share k of n, 95 % Jeffreys interval (Brown et al. 2001)."""
    low = high = np.nan
    if n >= LEAST:
        low, high = stats.beta.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], k + 0.5, n - k + 0.5)
        low, high = float(low) if k else 0.0, float(high) if k < n else 1.0
    return {"estimate": k / n if n else np.nan, "low": low, "high": high, "n": n}


def share_difference(k1: int, n1: int, k2: int, n2: int, seed: int = 0) -> dict[str, float]:
    """Return k1 / n1 - k2 / n2 of disjoint sources, six or more each, as `share` does (draws of both posteriors)."""
    low = high = np.nan
    if min(n1, n2) >= LEAST:
        rng = np.random.default_rng(seed)
        one, two = (rng.beta(k + 0.5, n - k + 0.5, 100 * RESAMPLES) for k, n in ((k1, n1), (k2, n2)))
        low, high = (float(v) for v in np.quantile(one - two, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    estimate = k1 / n1 - k2 / n2 if n1 and n2 else np.nan
    return {"estimate": estimate, "low": low, "high": high, "n": n1 + n2}


def holm(p: ArrayLike) -> np.ndarray:
    """Return Holm's adjusted p-values, (M,) -> (M,); NaN stays NaN and is not counted."""
    p = np.asarray(p, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


def detectable(low: float, high: float, power: float = 0.8) -> float:
    """Return the smallest true effect that would exclude zero with that power, from a 95 % interval's width."""
    z = stats.norm.ppf((1 + LEVEL) / 2)
    return (high - low) / 2 * (z + stats.norm.ppf(power)) / z


def verdict(low: float, high: float, direction: int = 1, margin: float | None = None) -> str:
    """Return supported, contradicted, inconclusive or insufficient data for a 95 % interval.

    direction: +1 if the claim says positive, -1 if negative. margin: the claim says "within +-margin of zero".
    """
    if pd.isna(low) or pd.isna(high):
        return "insufficient data"
    if margin is not None:
        inside, outside = -margin < low and high < margin, low > margin or high < -margin
    else:
        inside, outside = (low > 0, high < 0) if direction > 0 else (high < 0, low > 0)
    return "supported" if inside else "contradicted" if outside else "inconclusive"
