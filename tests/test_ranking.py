"""Ranking and claim statistics against values worked by hand and against planted effects."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from lib import ranking
from lib.errors import UserError

NAN = float("nan")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_cosine_by_hand() -> None:
    a = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    b = np.array([[4.0, 3.0], [0.0, 5.0], [-1.0, 0.0]])
    # (12 + 12) / (5 * 5), orthogonal, opposite
    assert ranking.cosine_similarity(a, b) == pytest.approx([0.96, 0.0, -1.0])


def test_cosine_of_a_zero_vector_is_missing_not_zero() -> None:
    assert np.isnan(ranking.cosine_similarity(np.zeros(2), np.ones(2)))


def test_euclidean_by_hand_and_its_order_on_unit_vectors(rng: np.random.Generator) -> None:
    assert ranking.euclidean_distance(np.array([1.0, 1.0]), np.array([4.0, 5.0])) == 5.0
    units = rng.normal(size=(11, 6))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    cosine = ranking.cosine_similarity(units[0], units[1:])
    distance = ranking.euclidean_distance(units[0], units[1:])
    assert (ranking.ordinal_ranks(cosine) == ranking.ordinal_ranks(-distance)).all()


def test_euclidean_on_raw_vectors_may_order_otherwise() -> None:
    source = np.array([1.0, 0.0])
    candidates = np.array([[10.0, 0.0], [1.0, 0.5]])  # the same direction, but far; close, but turned
    assert ranking.select(ranking.cosine_similarity(source, candidates)) == 0
    assert ranking.select(-ranking.euclidean_distance(source, candidates)) == 1


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [
        ([0.1, 0.9, 0.5], [3, 1, 2]),
        ([0.5, 0.9, 0.5], [2, 1, 3]),  # ties: the first candidate first
        ([0.5, 0.5, 0.5], [1, 2, 3]),  # all equal
        ([0.7], [1]),
        ([NAN, 0.2, 0.4], [3, 2, 1]),  # a missing value ranks last
    ],
)
def test_ordinal_ranks(similarity: list[float], expected: list[int]) -> None:
    assert ranking.ordinal_ranks(np.array(similarity)).tolist() == expected


def test_midranks_share_ties_and_keep_nan() -> None:
    ranks = ranking.midranks(np.array([[2.0, 1.0, 2.0, 5.0], [NAN, 1.0, 3.0, 2.0]]))
    np.testing.assert_array_equal(ranks, [[2.5, 1.0, 2.5, 4.0], [NAN, 1.0, 3.0, 2.0]])


def test_select_takes_the_first_best_and_ignores_nan() -> None:
    similarity = np.array([[0.2, 0.8, 0.8], [NAN, 0.1, 0.3], [0.5, 0.5, 0.5]])
    assert ranking.select(similarity).tolist() == [1, 2, 0]


@pytest.mark.parametrize("similarity", [np.array([[NAN, NAN]]), np.empty((1, 0))])
def test_select_without_a_candidate_is_an_error(similarity: np.ndarray) -> None:
    with pytest.raises(UserError, match="no candidate"):
        ranking.select(similarity)


def test_selection_agrees_with_rank_one(rng: np.random.Generator) -> None:
    similarity = rng.integers(0, 4, size=(50, 10)) / 4
    ranks = ranking.ordinal_ranks(similarity)
    assert (ranking.pick(ranks, ranking.select(similarity)) == 1).all()


def test_order_by_rank() -> None:
    scores = np.array([[10.0, 20.0, 30.0]])
    assert ranking.order_by_rank(scores, np.array([[3, 1, 2]])).tolist() == [[20.0, 30.0, 10.0]]


def test_row_spearman_by_hand() -> None:
    x = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 2], [5, 5, 5, 5], [1, 2, NAN, 4]])
    y = np.array([[1.0, 2, 3, 4], [4, 3, 2, 1], [1, 2, 1, 2], [1, 2, 3, 4], [1, 9, 7, 3]])
    # the last: ranks 1,2,3 against 1,3,2, that is 1 - 6 * (0 + 1 + 1) / (3 * 8) = 0.5
    np.testing.assert_allclose(ranking.row_spearman(x, y), [1, -1, 0, NAN, 0.5])


@pytest.mark.parametrize("pair", [([1.0], [2.0]), ([NAN, NAN], [1.0, 2.0])])
def test_row_spearman_without_pairs_is_missing(pair: tuple[list, list]) -> None:
    assert np.isnan(ranking.row_spearman(np.array([pair[0]]), np.array([pair[1]]))).all()


def test_row_spearman_equals_scipy_with_ties(rng: np.random.Generator) -> None:
    x, y = rng.integers(0, 5, (20, 10)), rng.integers(0, 5, (20, 10))
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ranking.row_spearman(x, y), expected)


def test_partial_spearman_by_hand() -> None:
    x, y, z = (np.array([v], float) for v in ([1, 2, 3, 4], [2, 1, 4, 3], [1, 3, 2, 4]))
    # rho_xy = 0.6, rho_xz = 0.8, rho_yz = 0: 0.6 / sqrt(1 - 0.64) = 1
    np.testing.assert_allclose(ranking.row_partial_spearman(x, y, z), [1.0])
    np.testing.assert_allclose(ranking.row_partial_spearman(x, y, np.ones((1, 4))), [0.6])
    assert np.isnan(ranking.row_partial_spearman(x, y, x)).all()


def test_equal_candidates_are_left_out_and_counted(rng: np.random.Generator) -> None:
    similarity = np.array([[1.0, 2, 3], [1, 1, 1], [3, 2, 1]])
    score = np.array([[1.0, 2, 3], [1, 2, 3], [1, 2, 3]])
    estimate = ranking.within_source_spearman(similarity, score, rng)
    assert (estimate.value, estimate.n, estimate.left_out) == (0.0, 2, 1)


def _planted(effect: float, rng: np.random.Generator, shape=(150, 10)) -> tuple:
    similarity = rng.normal(size=shape)
    easy = rng.normal(size=(shape[0], 1))
    score = 5 + easy + effect * similarity + rng.normal(size=shape)
    return similarity, score


@pytest.mark.parametrize("effect", [0.5, 0.0, -0.5])
def test_planted_within_source_effect(effect: float, rng: np.random.Generator) -> None:
    similarity, score = _planted(effect, rng)
    low, high = ranking.within_source_spearman(similarity, score, rng).interval()
    chosen = ranking.pick(score, ranking.select(similarity))
    gain = ranking.paired_gain(score.mean(axis=1), chosen, rng).interval()
    for interval in ((low, high), gain):
        assert (interval[0] > 0) == (effect > 0)
        assert (interval[1] < 0) == (effect < 0)


def test_length_explains_a_planted_length_effect(rng: np.random.Generator) -> None:
    words = rng.integers(6, 17, size=(200, 10)).astype(float)
    score = 10 + 0.3 * words + rng.normal(scale=0.5, size=words.shape)
    similarity = words + rng.normal(scale=3.0, size=words.shape)
    chosen = ranking.select(similarity)
    raw = ranking.paired_gain(score.mean(axis=1), ranking.pick(score, chosen), rng)
    adjusted = ranking.length_adjusted_gain(score, words, chosen, rng)
    partial = ranking.within_source_spearman(similarity, score, rng, control=words)
    assert raw.interval()[0] > 0
    assert adjusted.interval()[0] < 0 < adjusted.interval()[1]
    assert partial.interval()[0] < 0 < partial.interval()[1]


def test_length_adjustment_by_hand(rng: np.random.Generator) -> None:
    scores, words = np.array([[1.0, 3.0], [2.0, 4.0]]), np.array([[5.0, 6.0], [5.0, 6.0]])
    # all of the score is length (two points a word), so nothing is left of the gain
    estimate = ranking.length_adjusted_gain(scores, words, np.array([1, 1]), rng)
    assert estimate.value == pytest.approx(0.0)
    equal = ranking.length_adjusted_gain(scores, np.full((2, 2), 5.0), np.array([1, 1]), rng)
    assert equal.value == pytest.approx(100 * (3.5 / 2.5 - 1))


def test_paired_gain_by_hand_and_shared_exclusion(rng: np.random.Generator) -> None:
    estimate = ranking.paired_gain(np.array([1.0, 3.0, 9.0]), np.array([2.0, 3.0, NAN]), rng)
    assert estimate.value == pytest.approx(25.0)  # 5 against 4
    assert (estimate.n, estimate.left_out) == (2, 1)


def test_paired_gain_on_nothing_is_missing(rng: np.random.Generator) -> None:
    estimate = ranking.paired_gain(np.array([NAN]), np.array([1.0]), rng)
    assert np.isnan(estimate.value) and np.isnan(estimate.interval()).all()
    assert np.isnan(estimate.p_value())


def test_bootstrap_interval_matches_the_normal_one(rng: np.random.Generator) -> None:
    values = rng.normal(size=400)
    low, high = ranking.bootstrap_mean(values, rng).interval()
    half = 1.96 * values.std(ddof=1) / 20
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)


def test_bootstrap_is_repeatable_and_counts_sum_up() -> None:
    one, two = (ranking.bootstrap_counts(7, np.random.default_rng(5), 30) for _ in range(2))
    assert (one == two).all() and (one.sum(axis=1) == 7).all()


def test_slope_contrast_by_hand(rng: np.random.Generator) -> None:
    flat_then_steep = np.array([[10.0, 10, 10, 8, 6, 4]])
    good, bad = ranking.half_slopes(flat_then_steep)
    assert (good.tolist(), bad.tolist()) == ([0.0], [2.0])
    assert ranking.slope_contrast(flat_then_steep, rng).value == pytest.approx(2.0)
    assert ranking.slope_contrast(np.array([[5.0, 4, 3, 2, 1]]), rng).value == pytest.approx(0.0)
    assert np.isnan(ranking.slope_contrast(np.ones((3, 3)), rng).value)


def test_between_source_equals_scipy_and_resamples_rank_anew(rng: np.random.Generator) -> None:
    x = rng.integers(0, 8, size=60).astype(float)
    y = x + rng.normal(scale=3, size=60)
    estimate = ranking.between_source_spearman(x, y, np.random.default_rng(1), resamples=50)
    assert estimate.value == pytest.approx(spearmanr(x, y).statistic)
    drawn = np.random.default_rng(1).integers(0, 60, size=(50, 60))
    slow = [spearmanr(x[i], y[i]).statistic for i in drawn]
    np.testing.assert_allclose(estimate.samples, slow)


def test_between_source_needs_three_sources(rng: np.random.Generator) -> None:
    estimate = ranking.between_source_spearman(np.array([1.0, 2.0, NAN]), np.ones(3), rng)
    assert np.isnan(estimate.value) and (estimate.n, estimate.left_out) == (2, 1)


def test_equal_width_bins_by_hand() -> None:
    edges, index = ranking.equal_width_bins(np.array([0.0, 0.4, 0.5, 1.0, NAN]), 2)
    assert edges.tolist() == [0.0, 0.5, 1.0] and index.tolist() == [0, 0, 1, 1, -1]
    edges, index = ranking.equal_width_bins(np.array([3.0, 3.0]), 2)
    assert edges.tolist() == [2.5, 3.0, 3.5] and index.tolist() == [1, 1]


@pytest.mark.parametrize(("best", "sign"), [(0.2, -1), (1.0, 0), (5.0, 1)])
def test_planted_spread(best: float, sign: int, rng: np.random.Generator) -> None:
    x = np.linspace(0, 1, 300)
    y = 4 * x + rng.normal(size=300) * np.where(x > 2 / 3, best, 1.0)
    low, high = ranking.spread_log_ratio(x, y, rng).interval()
    assert (high < 0) == (sign < 0) and (low > 0) == (sign > 0)


def test_difference_of_groups(rng: np.random.Generator) -> None:
    a, b = (ranking.bootstrap_mean(rng.normal(m, 1, 200), rng) for m in (1.0, 0.0))
    gap = ranking.difference(a, b)
    assert gap.interval()[0] > 0 and gap.n == 400 and 0.7 < gap.value < 1.3


def test_too_few_sources_have_no_interval() -> None:
    """All of five agree once in 16 tries by chance: no verdict at 5 % can rest on them."""
    for n in (1, 2, 5):
        few = ranking.paired_gain(np.ones(n), np.full(n, 1.4), np.random.default_rng(0))
        assert few.value == pytest.approx(40.0) and np.isnan(few.interval()).all() and np.isnan(few.p_value())
    six = ranking.paired_gain(np.ones(6), np.full(6, 1.4), np.random.default_rng(0))
    assert np.isfinite(six.interval()).all() and np.isfinite(six.p_value())


@pytest.mark.parametrize("n", [1, 5])
def test_one_side_of_a_difference_with_too_few_sources_has_no_interval(n: int) -> None:
    """A single picture of a kind has no spread: as resampled it would be certain."""
    many = ranking.bootstrap_mean(np.arange(20.0), np.random.default_rng(0))
    few, six = (ranking.bootstrap_mean(100 + np.arange(float(k)), np.random.default_rng(1)) for k in (n, 6))
    for gap in (ranking.difference(few, many), ranking.difference(many, few)):
        assert gap.n == 20 + n and np.isfinite(gap.value) and np.isnan(gap.interval()).all()
    assert ranking.difference(six, many).interval()[0] > 0


def test_p_value_is_two_sided_and_never_zero() -> None:
    always = ranking.Estimate(1.0, np.ones(1999), 10)
    assert always.p_value() == pytest.approx(2 / 2000)
    even = ranking.Estimate(0.0, np.array([-1.0, 1.0]), 10)
    assert even.p_value() == 1.0


def test_p_value_of_a_margin_counts_what_crosses_it() -> None:
    samples = np.array([-3.0, *np.linspace(-1, 1, 96), 1.5, 2.5])  # 99 resamples
    estimate = ranking.Estimate(0.0, samples, 10)
    assert estimate.p_value(2.0) == pytest.approx(2 * (1 + 1) / 100)  # inside: one beyond each margin
    outside = ranking.Estimate(6.0, samples + 6, 10)
    assert outside.p_value(2.0) == pytest.approx(2 * (0 + 1) / 100)  # all of them lie above the margin
    assert estimate.p_value(0.0) == estimate.p_value() > 0.9


def test_shuffled_similarities_are_decided_as_seldom_as_chance_allows(rng: np.random.Generator) -> None:
    """Where similarity knows nothing, about 5 % of the intervals exclude zero, on both sides."""
    _, score = _planted(0.0, rng, (40, 10))
    similarity = rng.integers(0, 6, score.shape).astype(float)  # with ties, as in the text task
    decided = {"rho": [], "gain": [], "slope": []}
    for _ in range(200):
        shuffled = rng.permuted(similarity, axis=1)
        by_rank = ranking.order_by_rank(score, ranking.ordinal_ranks(shuffled))
        for name, estimate in (
            ("rho", ranking.within_source_spearman(shuffled, score, rng, resamples=300)),
            ("gain", ranking.paired_gain(score.mean(axis=1), by_rank[:, 0], rng, resamples=300)),
            ("slope", ranking.slope_contrast(by_rank, rng, resamples=300)),
        ):
            low, high = estimate.interval()
            decided[name].append((low > 0) - (high < 0))
    for found in decided.values():  # Binomial(200, 0.05): beyond 24 once in 3,000 tries
        assert 1 <= np.count_nonzero(found) <= 24 and abs(np.sum(found)) < 16


@pytest.mark.parametrize(("noise", "plain", "most"), [(2.0, 0.18, 0.03), (1.0, 0.44, 0.07)])
def test_what_a_partial_rho_leaves_where_nothing_should_be_left(
    noise: float, plain: float, most: float, rng: np.random.Generator
) -> None:
    """As the docstring says: about a tenth of the plain rho."""
    control = rng.normal(size=(4000, 10))
    x, y = (control + rng.normal(scale=noise, size=control.shape) for _ in range(2))
    assert ranking.row_spearman(x, y).mean() == pytest.approx(plain, abs=0.03)
    assert 0 < np.nanmean(ranking.row_partial_spearman(x, y, control)) < most


def test_share_is_not_certain_at_zero(rng: np.random.Generator) -> None:
    none = ranking.share(np.zeros(10, dtype=bool), rng)
    low, high = none.interval()
    assert none.value == 0 and low < 0.01 and 0.15 < high < 0.3
    half = ranking.share(np.arange(100) % 2 == 0, rng)
    assert half.value == 0.5 and half.interval() == pytest.approx((0.404, 0.596), abs=0.015)
    assert np.isnan(ranking.share(np.empty(0, dtype=bool), rng).interval()).all()


def test_spread_in_units_of_the_mean(rng: np.random.Generator) -> None:
    """SD and mean both three times as large on the right: a wider spread, and no wider a relative one."""
    x = np.linspace(0, 1, 900)
    y = np.where(x > 0.5, 3.0, 1.0) * (2 + rng.normal(scale=0.5, size=900))
    plain = ranking.spread_log_ratio(x, y, np.random.default_rng(1))
    assert plain.value == pytest.approx(np.log(3), abs=0.2)
    relative = ranking.relative_spread_log_ratio(x, y, np.random.default_rng(1))
    assert abs(relative.value) < 0.15 < plain.interval()[0]
    best, worst = y[x >= 2 / 3].mean(), y[x <= 1 / 3].mean()
    assert relative.value == pytest.approx(plain.value - np.log(best / worst))


@pytest.mark.parametrize(("n", "least", "most"), [(12, 0.06, 0.18), (120, 0.02, 0.09)])
def test_how_often_an_interval_misses(n: int, least: float, most: float, rng: np.random.Generator) -> None:
    """Percentile intervals of a dozen sources are too narrow, as `Estimate.interval` says; of many they are not."""
    intervals = [ranking.bootstrap_mean(rng.normal(size=n), rng, 300).interval() for _ in range(400)]
    missed = np.mean([low > 0 or high < 0 for low, high in intervals])
    assert least < missed < most
