"""Similarity, ranks, selection and the statistics of the paper's claims: arrays in, arrays out.

No model, no table library and no file is touched here.  Axes: S sources, K candidates of a
source, B bootstrap resamples, d embedding width.  Rank 1 is the most similar candidate.
Every random draw comes from a generator that the caller passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lib.errors import UserError

RESAMPLES = 2000
LEVEL = 0.95
# Sources that an interval needs. If nothing were there, five sources would all lie on one side of zero
# once in 16 tries, six once in 32: only from six on can 5 % be kept at all.
LEAST = 6


@dataclass(frozen=True)
class Estimate:
    """A statistic with its bootstrap distribution.

    value: the statistic on the whole sample; samples: (B,) its value on each resample, NaN
    where a resample left it undefined; n: sources used; left_out: sources that could not be used.
    """

    value: float
    samples: np.ndarray
    n: int
    left_out: int = 0

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Percentile interval, (nan, nan) where no resample is defined or too few sources were used.

        Of some twenty sources or fewer it is still too narrow: it misses the truth about twice as
        often as it says (`tests/test_ranking.py`); from fifty on it keeps its promise.
        """
        defined = self._defined()
        if defined.size == 0:
            return float("nan"), float("nan")
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def p_value(self, margin: float = 0.0) -> float:
        """Two-sided bootstrap p against zero; never below 2 / (B + 1), NaN if undefined.

        margin > 0: of the surer of two statements, that the statistic lies within +-margin or outside.
        """
        defined = self._defined()
        if defined.size == 0:
            return float("nan")
        outside = min(np.sum(defined <= margin), np.sum(defined >= -margin))
        inside = max(np.sum(defined <= -margin), np.sum(defined >= margin))
        return float(min(1.0, 2 * (min(outside, inside) + 1) / (defined.size + 1)))

    def _defined(self) -> np.ndarray:
        """The usable resamples: none of so few sources that an interval would promise what it cannot keep."""
        return self.samples[np.isfinite(self.samples)] if self.n >= LEAST else self.samples[:0]

    def scaled(self, factor: float) -> Estimate:
        """The same estimate in another unit."""
        return replace(self, value=self.value * factor, samples=self.samples * factor)


# similarity and selection (paper 3.4, 3.5, 3.6)


def cosine_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine f(e_x, e_y) of paper 3.4 along the last axis; broadcasts.

    a, b: (..., d) raw embeddings.  Returns (...) in [-1, 1]; NaN for a zero vector, because a
    direction that does not exist is similar to nothing.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    products = np.sum(a * b, axis=-1)
    safe = np.where(norms > 0, norms, np.nan)
    return np.clip(products / safe, -1.0, 1.0)


def euclidean_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distance along the last axis on raw embeddings (paper 5.3); broadcasts.

    On unit vectors it orders candidates exactly as the cosine does; on raw ones it need not.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return np.linalg.norm(difference, axis=-1)


def ordinal_ranks(similarity: np.ndarray) -> np.ndarray:
    """Ranks 1..K along the last axis, 1 = most similar, the first candidate among ties.

    similarity: (..., K).  NaN ranks after every number.  Returns int64 (..., K).
    """
    keyed = np.where(np.isnan(similarity), np.inf, -np.asarray(similarity, dtype=np.float64))
    order = np.argsort(keyed, axis=-1, kind="stable")
    ranks = np.empty(order.shape, dtype=np.int64)
    positions = np.broadcast_to(np.arange(1, order.shape[-1] + 1), order.shape)
    np.put_along_axis(ranks, order, positions, axis=-1)
    return ranks


def midranks(values: np.ndarray) -> np.ndarray:
    """Ascending ranks with ties shared, along the last axis; NaN stays NaN."""
    from scipy.stats import rankdata  # half of the time that importing the game would take

    return rankdata(values, method="average", axis=-1, nan_policy="omit")


def select(similarity: np.ndarray) -> np.ndarray:
    """Index of the best candidate, s = arg max_k f(e_x, e_x'_k), first among ties.

    The paper writes arg min of the same symbol (3.5), where a distance is meant.
    similarity: (..., K) with at least one number in each row.  Returns int64 (...).
    """
    values = np.asarray(similarity, dtype=np.float64)
    if values.shape[-1] == 0 or np.isnan(values).all(axis=-1).any():
        raise UserError("similarity: a source has no candidate with a number, drop it first")
    return np.nanargmax(values, axis=-1)


def pick(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """values (S, K, ...), index (S,) -> the chosen candidate of each source, (S, ...)."""
    return values[np.arange(len(values)), index]


def order_by_rank(values: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Reorder (S, K) values from candidate order to rank order; column 0 is rank 1."""
    return np.take_along_axis(values, np.argsort(ranks, axis=-1, kind="stable"), axis=-1)


# the bootstrap


def bootstrap_counts(n: int, rng: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """(B, n) how often each of n sources occurs in each resample with replacement."""
    if n == 0:
        return np.zeros((resamples, 0))
    drawn = rng.integers(0, n, size=(resamples, n))
    flat = drawn + n * np.arange(resamples)[:, None]
    return np.bincount(flat.ravel(), minlength=resamples * n).reshape(resamples, n).astype(float)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(
        numerator,
        denominator,
        out=np.full(np.broadcast(numerator, denominator).shape, np.nan),
        where=np.abs(denominator) > 1e-12,
    )


def bootstrap_mean(values: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES) -> Estimate:
    """Mean of (S,) values over sources; NaN values are left out and counted."""
    values = np.asarray(values, dtype=np.float64)
    used = values[np.isfinite(values)]
    counts = bootstrap_counts(len(used), rng, resamples)
    samples = _divide(counts @ used, counts.sum(axis=1))
    value = float(used.mean()) if used.size else float("nan")
    return Estimate(value, samples, used.size, values.size - used.size)


def share(flags: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES) -> Estimate:
    """Share of true flags, (S,) bool, with draws from its Jeffreys posterior, Beta(k+1/2, n-k+1/2).

    A bootstrap of 0 in n would claim certainty; this stays sensible there (Brown et al., 2001).
    """
    n, k = len(flags), int(np.sum(flags))
    if n == 0:
        return Estimate(float("nan"), np.full(resamples, np.nan), 0)
    return Estimate(k / n, rng.beta(k + 0.5, n - k + 0.5, size=resamples), n)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b for two estimates on disjoint samples, resampled independently of each other.

    No interval where one side has fewer sources than an interval needs: with three beside twenty it
    would miss the truth in a fifth of the cases, with six it still does in a tenth.
    """
    samples = a.samples - b.samples
    if min(a.n, b.n) < LEAST:
        samples = np.full_like(samples, np.nan)
    return Estimate(a.value - b.value, samples, a.n + b.n, a.left_out + b.left_out)


def paired_gain(
    baseline: np.ndarray, selected: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Estimate:
    """Gain in percent, 100 * (mean selected / mean baseline - 1), Table 1's last row.

    baseline, selected: (S,) scores of the same sources.  A source without a number in one
    column is left out of both.
    """
    baseline, selected = np.asarray(baseline, float), np.asarray(selected, float)
    both = np.isfinite(baseline) & np.isfinite(selected)
    counts = bootstrap_counts(int(both.sum()), rng, resamples)
    change = selected[both] - baseline[both]
    samples = 100 * _divide(counts @ change, counts @ baseline[both])
    value = float(100 * _divide(change.sum(), baseline[both].sum()))
    return Estimate(value, samples, int(both.sum()), int((~both).sum()))


def length_adjusted_gain(
    scores: np.ndarray, lengths: np.ndarray, chosen: np.ndarray, rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Gain in percent of the chosen candidate over the source's mean, length partialled out.

    scores, lengths: (S, K); chosen: (S,) index.  The slope of score on length is fitted within
    sources (both centred by source) and anew in each resample; what the chosen caption owes to
    being longer than its rivals is subtracted (paper 3.5: more words convey more).
    """
    usable = np.isfinite(scores).all(axis=1) & np.isfinite(lengths).all(axis=1)
    scores, lengths, chosen = scores[usable], lengths[usable], chosen[usable]
    centred = lengths - lengths.mean(axis=1, keepdims=True)
    cross = np.sum(centred * scores, axis=1)  # (S,)
    square = np.sum(centred**2, axis=1)
    change = pick(scores, chosen) - scores.mean(axis=1)
    longer = pick(centred, chosen)

    def gain(weights: np.ndarray) -> np.ndarray:  # (B, S) -> (B,)
        slope = np.nan_to_num(_divide(weights @ cross, weights @ square))
        return 100 * _divide(
            weights @ change - slope * (weights @ longer), weights @ scores.mean(axis=1)
        )

    samples = gain(bootstrap_counts(len(scores), rng, resamples))
    value = float(gain(np.ones((1, len(scores))))[0])
    return Estimate(value, samples, len(scores), int((~usable).sum()))


# within a source: the claim of Figure 3


def _pearson_rows(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation along the last axis over finite pairs; NaN where one is constant."""
    dx = x - np.nanmean(x, axis=-1, keepdims=True)
    dy = y - np.nanmean(y, axis=-1, keepdims=True)
    scale = np.sqrt(np.nansum(dx**2, axis=-1) * np.nansum(dy**2, axis=-1))
    return _divide(np.nansum(dx * dy, axis=-1), scale)


def _paired_ranks(*arrays: np.ndarray) -> list[np.ndarray]:
    """Midranks of (S, K) arrays, each blanked wherever any of them has no number."""
    arrays = tuple(np.atleast_2d(np.asarray(a, dtype=np.float64)) for a in arrays)
    missing = np.any([~np.isfinite(a) for a in arrays], axis=0)
    # A source without any pair would make nanmean warn: give it a constant row instead, whose
    # correlation is undefined all the same.
    empty = missing.all(axis=-1, keepdims=True)
    return [np.where(empty, 0.0, midranks(np.where(missing, np.nan, a))) for a in arrays]


def row_spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rho of each source, midranks for ties: (S, K), (S, K) -> (S,).

    NaN where either side is constant or fewer than two pairs have numbers.
    """
    return _pearson_rows(*_paired_ranks(x, y))


def row_partial_spearman(x: np.ndarray, y: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Spearman's rho of x and y with the control partialled out, by source: (S, K) -> (S,).

    A constant control has nothing to give or take: the plain rho stands.  NaN where the
    control determines x or y completely.  Ranks of few candidates do not take a control out
    completely: where it explains all there is, about a tenth of a plain rho of 0.5 stays, less of a
    smaller one, more of a larger one and where the control itself is measured with noise.
    """
    rx, ry, rz = _paired_ranks(x, y, control)
    xy, xz, yz = _pearson_rows(rx, ry), _pearson_rows(rx, rz), _pearson_rows(ry, rz)
    constant = np.isnan(_pearson_rows(rz, rz))
    xz, yz = np.where(constant, 0.0, xz), np.where(constant, 0.0, yz)
    rest = np.sqrt(np.clip((1 - xz**2) * (1 - yz**2), 0.0, None))
    return np.clip(_divide(xy - xz * yz, np.where(rest > 1e-6, rest, 0.0)), -1.0, 1.0)


def within_source_spearman(
    similarity: np.ndarray,
    score: np.ndarray,
    rng: np.random.Generator,
    control: np.ndarray | None = None,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean over sources of Spearman's rho between similarity and score (Figure 3's claim).

    similarity, score, control: (S, K).  Sources whose candidates are all equal say nothing
    about selection: they are left out and counted.
    """
    if control is None:
        rho = row_spearman(similarity, score)
    else:
        rho = row_partial_spearman(similarity, score, control)
    return bootstrap_mean(rho, rng, resamples)


def _slopes(values: np.ndarray) -> np.ndarray:
    """Least-squares change per rank along the last axis: (S, K) -> (S,)."""
    steps = np.arange(values.shape[-1]) - (values.shape[-1] - 1) / 2
    return values @ steps / np.sum(steps**2)


def half_slopes(by_rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss of score per rank among the better and among the worse half of the ranks.

    by_rank: (S, K) scores in rank order, K >= 4; an odd K gives its middle rank to both halves.
    Returns two (S,) arrays, positive where the score falls as the rank worsens.
    """
    half = (by_rank.shape[-1] + 1) // 2
    if by_rank.shape[-1] < 4:
        nothing = np.full(len(by_rank), np.nan)
        return nothing, nothing
    return -_slopes(by_rank[:, :half]), -_slopes(by_rank[:, -half:])


def slope_contrast(
    by_rank: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Estimate:
    """Worse half's loss of score per rank minus the better half's, mean over sources.

    Positive: quality changes slower among good reconstructions than among bad ones (5.1).
    """
    good, bad = half_slopes(by_rank)
    return bootstrap_mean(bad - good, rng, resamples)


# between sources: the claims of Figure 4


def _weighted_midranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Midrank of each source in each resample: (S,), (B, S) counts -> (B, S).

    Sorting once and accumulating counts over groups of equal values ranks all resamples.
    """
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(distinct)))
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)  # (B, groups)
    last = np.cumsum(sizes, axis=1)
    return (last - (sizes - 1) / 2)[:, group]


def _weighted_spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    rx, ry = _weighted_midranks(x, counts), _weighted_midranks(y, counts)
    total = counts.sum(axis=1, keepdims=True)
    dx = rx - (counts * rx).sum(axis=1, keepdims=True) / total
    dy = ry - (counts * ry).sum(axis=1, keepdims=True) / total
    scale = np.sqrt((counts * dx**2).sum(axis=1) * (counts * dy**2).sum(axis=1))
    return _divide((counts * dx * dy).sum(axis=1), scale)


def between_source_spearman(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Estimate:
    """Spearman's rho over sources of two per-source means, (S,), (S,) (Figure 4).

    It compares easy sources with hard ones and is no evidence for selecting a candidate.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    both = np.isfinite(x) & np.isfinite(y)
    n, left_out = int(both.sum()), int((~both).sum())
    if n < 3:
        return Estimate(float("nan"), np.full(resamples, np.nan), n, left_out)
    x, y = x[both], y[both]
    value = float(_weighted_spearman(x, y, np.ones((1, n)))[0])
    samples = _weighted_spearman(x, y, bootstrap_counts(n, rng, resamples))
    return Estimate(value, samples, n, left_out)


def equal_width_bins(x: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the x-axis into bins of equal length (paper 5.1).

    x: (S,).  Returns edges (bins + 1,) and the bin 0..bins-1 of each source, -1 for NaN.  The
    last bin is closed on both sides; where all x are equal the axis is one unit wide.
    """
    finite = x[np.isfinite(x)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    index = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, bins - 1)
    return edges, np.where(np.isfinite(x), index, -1)


def _residual_variance(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted variance of y around its weighted line on x: (S,), (S,), (B, S) -> (B,)."""
    total = weights.sum(axis=1)
    mx, my = _divide(weights @ x, total), _divide(weights @ y, total)
    vx = _divide(weights @ x**2, total) - mx**2
    vy = _divide(weights @ y**2, total) - my**2
    cov = _divide(weights @ (x * y), total) - mx * my
    return np.clip(vy - np.nan_to_num(_divide(cov**2, vx)), 0.0, None)


def _third_contrast(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, resamples: int,
    variance: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
) -> Estimate:
    """Half the log ratio of a variance, the third of highest x over the third of lowest x.

    variance: (S,), (S,), (B, S) weights -> (B,).  Both arrays reach it without their means.
    """
    both = np.isfinite(x) & np.isfinite(y)
    x, y = np.asarray(x, float)[both], np.asarray(y, float)[both]
    n, left_out = len(x), int((~both).sum())
    if n < 12:  # fewer than four sources a third: a line fits them almost exactly
        return Estimate(float("nan"), np.full(resamples, np.nan), n, left_out)
    x, y = x - x.mean(), y - y.mean()
    low, high = np.quantile(x, [1 / 3, 2 / 3])

    def log_ratio(weights: np.ndarray) -> np.ndarray:
        best, worst = (variance(x, y, weights * third) for third in (x >= high, x <= low))
        ratio = _divide(best, worst)
        return 0.5 * np.log(np.where(ratio > 0, ratio, np.nan))

    value = float(log_ratio(np.ones((1, n)))[0])
    return Estimate(value, log_ratio(bootstrap_counts(n, rng, resamples)), n, left_out)


def spread_log_ratio(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Estimate:
    """log(SD of y in the third of highest x / SD in the third of lowest x), (S,), (S,).

    Negative: variance is low where reconstruction is good (5.1).  The spread is taken around a
    line fitted within each third, so that a steep trend does not pass for a wide spread.
    """
    return _third_contrast(x, y, rng, resamples, _residual_variance)


def relative_spread_log_ratio(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Estimate:
    """`spread_log_ratio` of the SD in units of the mean of y in the same third; for y >= 0.

    A score that starts at 0 spreads more where it is high; this asks whether it does beyond that.
    """
    middle = np.mean(y[np.isfinite(x) & np.isfinite(y)])

    def variance(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
        mean = middle + _divide(weights @ y, weights.sum(axis=1))
        return _divide(_residual_variance(x, y, weights), mean**2)

    return _third_contrast(x, y, rng, resamples, variance)
