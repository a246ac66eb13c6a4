"""Similarity, ranks and statistics: values worked by hand, scipy's where it has them, and planted data."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lib import ranking
from lib.ranking import (
    cosine,
    detectable,
    difference,
    euclidean,
    gain,
    holm,
    interval,
    rank,
    share,
    share_difference,
    spearman,
    verdict,
    within_source_rho,
)
from tests.benchmarks import coverage


def table(similarity: list, score: list, **more: list) -> pd.DataFrame:
    """Rows of sources that are given as lists of candidates."""
    item = np.repeat(np.arange(len(similarity)), [len(s) for s in similarity])
    columns = {"similarity": np.concatenate(similarity), "cider": np.concatenate(score)}
    return pd.DataFrame({"task": "image", "dataset": "d", "item": item, **columns}
                        | {name: np.concatenate(values) for name, values in more.items()})


def test_cosine_and_euclidean_by_hand() -> None:
    a, b = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), np.array([[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]])
    assert cosine(a, b)[:2].tolist() == pytest.approx([24 / 25, -1.0])
    assert np.isnan(cosine(a, b)[2]), "a zero vector has no direction: missing, not 0"
    assert euclidean(a, b).tolist() == pytest.approx([2**0.5, 3.0, 2**0.5])


def test_ranks_within_sources_first_among_ties_and_none_without_a_similarity() -> None:
    found = rank([0.2, 0.9, 0.9, np.nan, 0.5, 0.7], ["a", "a", "a", "a", "b", "b"])
    assert found[[0, 1, 2, 4, 5]].tolist() == [3, 1, 2, 2, 1]
    assert np.isnan(found[3])


def test_rho_of_each_source_is_scipys_with_ties() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 5, (20, 10)).astype(float), rng.integers(0, 5, (20, 10)).astype(float)
    rho = within_source_rho(table(list(x), list(y)))
    assert rho.tolist() == pytest.approx([stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])
    assert rho.index.names == ["task", "dataset", "item"]


def test_a_tied_source_has_no_rho_and_a_missing_score_is_left_out_of_its_source() -> None:
    rows = table([[1, 2, 3], [1, 1, 1], [1, 2, 3, 4]], [[3, 2, 1], [1, 2, 3], [1, 2, np.nan, 3]])
    rho = within_source_rho(rows).to_numpy()
    assert rho[0] == pytest.approx(-1) and np.isnan(rho[1]) and rho[2] == pytest.approx(1)
    assert interval(rho)["n"] == 2


def test_partial_rho_by_hand() -> None:
    rows = table([[1, 2, 3, 4]], [[1, 2, 4, 3]], n_words=[[2, 1, 3, 4]])
    xy, xz, yz = 0.8, 0.8, 0.6
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert within_source_rho(rows, control="n_words").iloc[0] == pytest.approx(expected)
    constant = within_source_rho(rows.assign(n_words=7), control="n_words").iloc[0]
    assert constant == pytest.approx(xy), "a control that is the same for all changes nothing"
    same = rows.assign(n_words=rows["similarity"])
    assert np.isnan(within_source_rho(same, control="n_words").iloc[0]), "it determines x"


def test_length_takes_a_planted_length_effect_out() -> None:
    rng = np.random.default_rng(2)
    words = rng.normal(size=(300, 10))
    similarity, score = (words + rng.normal(size=words.shape) for _ in range(2))
    rows = table(list(similarity), list(score), n_words=list(words))
    plain, partial = within_source_rho(rows).mean(), within_source_rho(rows, control="n_words").mean()
    assert plain > 0.4 and abs(partial) < 0.12 * plain + 0.03  # ranks of ten leave about a tenth


@pytest.mark.parametrize("effect", [0.5, 0.0, -0.5])
def test_a_planted_effect_within_sources_has_its_sign(effect: float) -> None:
    rng = np.random.default_rng(3)
    ease, z = rng.normal(size=(100, 1)), rng.normal(size=(100, 10))
    score = 5 * ease + effect * z + rng.normal(size=z.shape)  # easy sources are similar and score high, whatever the effect
    found = interval(within_source_rho(table(list(3 * ease + z), list(score))))
    assert verdict(found["low"], found["high"]) == {0.5: "supported", 0.0: "inconclusive", -0.5: "contradicted"}[effect]
    assert interval(np.stack([ease[:, 0], score.mean(axis=1)]), spearman)["low"] > 0.9, "between sources it is there anyway"


@pytest.mark.parametrize("n", [8, 40])
def test_an_interval_keeps_its_promise(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "RESAMPLES", 200)
    rng, tries = np.random.default_rng(4), 150
    found = [interval(rng.normal(1, 2, n), seed=k) for k in range(tries)]
    missed = np.mean([not f["low"] <= 1 <= f["high"] for f in found])
    assert 0.01 <= missed <= 0.1


def test_coverage_is_the_share_of_intervals_that_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "RESAMPLES", 200)
    monkeypatch.setattr(ranking, "RESAMPLES", 200)
    whole = {"rho": np.random.default_rng(9).gumbel(size=5000)}

    def half_as_wide(sample: dict) -> dict:
        found = interval(sample["rho"])
        return found | {end: (found[end] + found["estimate"]) / 2 for end in ("low", "high")}

    assert 91 <= coverage.coverage(lambda sample: interval(sample["rho"]), whole, 40, 300) <= 98
    assert 60 <= coverage.coverage(half_as_wide, whole, 40, 300) <= 75


def test_every_estimator_in_use_keeps_its_promise_in_the_committed_table() -> None:
    table = pd.read_csv(coverage.TABLE, index_col="estimator")
    assert list(table.index) == list(coverage.estimators())  # else run python -m tests.benchmarks.coverage
    cells = table[["60 sources", "120 sources", "500 sources"]].stack()
    assert (cells >= 93).all() and (cells.drop("half-life in whole rounds") <= 97).all()


def test_interval_of_many_sources_is_the_normal_one_and_repeatable() -> None:
    values = np.random.default_rng(5).normal(3, 2, 400)
    found, error = interval(values, seed=1), values.std() / 20
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.03)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.03)
    assert found == interval(values, seed=1) != interval(values, seed=2)
    assert found["estimate"] == pytest.approx(values.mean()) and found["n"] == 400


@pytest.mark.parametrize(("n", "known"), [(0, False), (1, False), (5, False), (6, True)])
def test_below_six_sources_there_is_no_interval(n: int, known: bool) -> None:
    found = interval(np.r_[np.arange(n, dtype=float), np.nan])
    assert found["n"] == n and np.isfinite(found["low"]) == np.isfinite(found["p"]) == known
    assert np.isfinite(found["estimate"]) == (n > 0)
    assert np.isnan(interval(np.arange(17.0), least=18)["low"]), "a statistic of thirds needs six in each"


def test_gain_is_relative_and_paired_and_drops_a_source_from_both_sides() -> None:
    found = gain([2.0, 4, 6, 8, 10, 12, np.nan], [1.0, 2, 3, 4, 5, 6, 99])
    assert (found["estimate"], found["low"], found["high"], found["n"]) == pytest.approx((100, 100, 100, 6))
    assert gain([1.1, 2.2], [1.0, 2.0])["estimate"] == pytest.approx(10)
    assert np.isnan(gain([2.0, 1, 3, 2, 1, 2], [-1.0, 1, -2, 2, -3, 3.5])["estimate"])  # percent of about nothing


def test_difference_needs_six_sources_on_each_side() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(1, 1, 200), rng.normal(0, 1, 100)
    found, error = difference(a, b), np.hypot(a.std() / 200**0.5, b.std() / 10)
    assert found["estimate"] == pytest.approx(a.mean() - b.mean()) and found["n"] == 300
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert np.isnan(difference(a, b[:5])["low"]) and np.isfinite(difference(a[:6], b[:6])["low"])


def test_spearman_of_resamples_ranks_anew() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.integers(0, 6, (2, 30, 25)).astype(float)
    assert spearman(x, y).tolist() == pytest.approx([stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])
    assert np.isnan(spearman(np.ones(9), np.arange(9.0)))


def test_share_and_its_difference_are_never_certain() -> None:
    assert share(0, 20)["low"] == 0 and 0.05 < share(0, 20)["high"] < 0.2
    low, high = stats.beta.ppf([0.025, 0.975], 3.5, 17.5)
    assert share(3, 20) == pytest.approx({"estimate": 0.15, "low": low, "high": high, "n": 20})
    assert np.isnan(share(2, 5)["low"]) and np.isnan(share(0, 0)["estimate"])
    found = share_difference(20, 20, 0, 20)
    assert found["estimate"] == 1 and 0.6 < found["low"] < found["high"] < 1
    assert np.isnan(share_difference(3, 5, 4, 20)["low"])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, np.nan, 0.03]) == pytest.approx([0.03, 0.06, np.nan, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_p_agrees_with_the_interval() -> None:
    rng = np.random.default_rng(8)
    for shift in (0.0, 0.2, 0.4, 0.6):
        found = interval(rng.normal(shift, 1, 25))
        assert (found["p"] < 0.05) == (found["low"] > 0 or found["high"] < 0) or abs(found["p"] - 0.05) < 0.01
        assert 0 < found["p"] <= 1


@pytest.mark.parametrize(("low", "high", "options", "said"), [
    (0.1, 0.3, {}, "supported"), (-0.3, -0.1, {}, "contradicted"), (-0.1, 0.3, {}, "inconclusive"),
    (-0.3, -0.1, {"direction": -1}, "supported"), (0.1, 0.3, {"direction": -1}, "contradicted"),
    (-1.5, 0.2, {"margin": 2}, "supported"), (2.1, 4.0, {"margin": 2}, "contradicted"),
    (-1.5, 2.2, {"margin": 2}, "inconclusive"), (np.nan, np.nan, {}, "insufficient data"),
    (None, None, {}, "insufficient data"),
])  # fmt: skip
def test_verdicts(low: float, high: float, options: dict, said: str) -> None:
    assert verdict(low, high, **options) == said


def test_detectable_effect_is_found_with_its_power() -> None:
    error = 1.0  # a 95 % interval of +-1.96 standard errors
    smallest = detectable(-1.96 * error, 1.96 * error)
    assert smallest == pytest.approx(2.80, abs=0.01)
    assert stats.norm.sf(1.96, loc=smallest) == pytest.approx(0.8, abs=0.01)
