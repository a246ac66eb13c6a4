"""Verdicts on planted rows, where the right answer is known; Table 1 and the failure rules."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from lib import claims, failures, ranking, tables
from lib.errors import UserError
from lib.ranking import Estimate
from tests.planted import planted_greedy, planted_rows, planted_scenes

NAN = float("nan")


def verdict(samples: list[float], direction: int = 1, margin: float = 0.0) -> claims.Verdict:
    estimate = Estimate(float(np.mean(samples)), np.array(samples), 10)
    return claims.Verdict("it is so", "image", "coco", "x", estimate, direction, margin)


@pytest.mark.parametrize(
    ("samples", "direction", "margin", "finding"),
    [
        ([1.0, 2.0], 1, 0, "holds"),
        ([-1.0, -2.0], 1, 0, "reversed"),
        ([-1.0, 2.0], 1, 0, "undecided"),
        ([0.0, 0.0], 1, 0, "undecided"),
        ([-1.0, -2.0], -1, 0, "holds"),
        ([1.0, 2.0], -1, 0, "reversed"),
        ([-1.0, 1.0], 0, 2.0, "holds"),
        ([-1.0, 3.0], 0, 2.0, "undecided"),
        ([3.0, 4.0], 0, 2.0, "reversed"),
        ([NAN, NAN], 1, 0, "unknown"),
    ],
)
def test_finding_is_decided_by_the_interval(samples, direction, margin, finding) -> None:
    assert verdict(samples, direction, margin).finding == finding


def test_verdict_record_is_json_and_tells_plainly(tmp_path) -> None:
    path = tmp_path / "figures" / "x.verdict.json"
    claims.write_verdicts([verdict([-1.0, -2.0]), verdict([NAN])], path)
    first, second = json.loads(path.read_text())
    assert first["holds"] is False and first["interval"][1] < 0
    assert "does not hold for this run" in first["sentence"]
    assert second["value"] is None and "cannot be judged" in second["sentence"]
    assert "95 % interval" in first["sentence"] and "interval" not in second["sentence"]


@pytest.mark.parametrize(
    ("effect", "finding"), [(0.4, "holds"), (0.0, "undecided"), (-0.4, "reversed")]
)
@pytest.mark.parametrize(("task", "score"), [("image", "cider"), ("text", "clip_score")])
def test_rank_claim_on_planted_rows(effect, finding, task, score) -> None:
    rows = claims.prepare(planted_rows(effect, task=task))
    found = claims.rank_verdicts(rows, score, seed=0)
    assert found[0].finding == finding
    profile = claims.rank_profile(rows, score)
    drop = profile["mean"].iloc[:3].mean() - profile["mean"].iloc[-3:].mean()
    assert (drop > 0.2) == (effect > 0) and (drop < -0.2) == (effect < 0)


def test_trend_between_sources_is_no_evidence_for_selection() -> None:
    rows = claims.prepare(planted_rows(0.0))
    means = claims.source_means(rows, "cider")
    assert claims.correlation_verdicts(means, "image", "coco", 0)[0].finding == "holds"
    assert claims.rank_verdicts(rows, "cider", 0)[0].finding == "undecided"


def test_prepare_drops_flagged_sources_whole_and_ignores_order() -> None:
    rows = planted_rows(0.3, n_sources=5)
    rows.loc[3, "flagged"] = True
    kept = claims.prepare(rows.sample(frac=1, random_state=1))
    assert kept.attrs == {"n_flagged": 1, "n_flagged_rows": 1, "n_candidates": 10}
    assert sorted(kept["item"].unique()) == ["0001", "0002", "0003", "0004"]
    assert kept["candidate"].tolist() == list(range(10)) * 4


def test_unfinished_and_empty_rows_are_one_clear_error() -> None:
    rows = planted_rows(0.3, n_sources=3)
    with pytest.raises(UserError, match="play the run to its end"):
        claims.prepare(rows.iloc[:-1])
    with pytest.raises(UserError, match="empty"):
        claims.prepare(rows.iloc[:0])
    with pytest.raises(UserError, match="no column 'novel'"):
        claims.grid(claims.prepare(rows), "novel")


def _counts(rows: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """Plausible BLEU counts: length 6 captions, more matches where CIDEr is higher."""
    share = np.clip(rows["cider"].to_numpy() / 3, 0, 1)
    guesses = np.array([6, 5, 4, 3])
    matches = rng.binomial(guesses, share[:, None])
    lengths = np.full((len(rows), 2), 6)
    return np.hstack([matches, np.tile(guesses, (len(rows), 1)), lengths])


@pytest.fixture
def systems() -> tables.Systems:
    rows = claims.prepare(planted_rows(0.4, dataset="picturebook-nocaps"))
    greedy = planted_greedy(rows).sample(frac=1, random_state=2)
    rng = np.random.default_rng(0)
    counts = _counts(rows, rng)
    return tables.systems(rows, counts, greedy, counts[:: rows.attrs["n_candidates"]])


def test_table1_values_by_direct_computation(systems) -> None:
    table = tables.selection_table(systems, seed=0)
    everything = table[table["domain"] == "all"].set_index("metric")
    rows = systems.rows
    assert everything.loc["cider", "nucleus"] == pytest.approx(rows["cider"].mean())
    best = rows.loc[rows["rank"] == 1, "cider"].mean()
    assert everything.loc["cider", "selected"] == pytest.approx(best)
    assert everything.loc["cider", "gain"] == pytest.approx(100 * (best / rows["cider"].mean() - 1))
    from lib.metrics import bleu_from_statistics

    each = [bleu_from_statistics(systems.bleu[:, k].sum(axis=0))[3] for k in range(10)]
    assert everything.loc["bleu4", "nucleus"] == pytest.approx(np.mean(each))
    assert everything.loc["cider", "low"] > 0 and everything.loc["cider", "level"] == 0.95
    assert everything.loc["cider", "oracle"] >= everything.loc["cider", "selected"]
    assert everything.loc["cider", "greedy"] == pytest.approx(1.1 * rows["cider"].mean())
    assert "spice" not in everything.index  # all null: no row, and no zero


def test_every_score_counts_gains_and_what_is_sure() -> None:
    block = pd.DataFrame({"dataset": "picturebook-coco", "domain": "all", "gain": [3.0, 2.0, -1.0, -4.0],
                          "low": [1.0, -1.0, -2.0, -6.0], "high": [5.0, 4.0, 1.0, -1.0]})
    said = tables.every_score(block)
    assert "higher on 2 of 4 scores" in said and "zero for 1 of these gains, and for 1 of the losses" in said
    assert "losses" not in tables.every_score(block.iloc[:3].assign(domain="out-domain"))


def test_table1_domains_partition_the_sources(systems) -> None:
    table = tables.selection_table(systems, seed=0)
    cider = table[table["metric"] == "cider"].set_index("domain")
    assert list(cider.index) == ["all", "in-domain", "near-domain", "out-domain"]
    assert cider["n"].iloc[1:].sum() == cider["n"].iloc[0]
    weighted = (cider["nucleus"] * cider["n"]).iloc[1:].sum() / cider["n"].iloc[0]
    assert weighted == pytest.approx(cider["nucleus"].iloc[0])


def test_secondary_scores_have_wider_intervals(systems) -> None:
    block = tables.selection_block(systems, "all", 0).set_index("metric")
    assert (block.drop("cider")["level"] >= 0.95).all() and block["level"].max() > 0.99
    assert (block["p_holm"] >= block["p"]).all()


def test_latex_and_layout(systems) -> None:
    table = tables.selection_table(systems, seed=0)
    latex = tables.to_latex(table)
    assert latex.count(r"\midrule") == 3 and "Gain (\\%)" in latex and "out-of-domain" in latex
    assert latex.count("{") == latex.count("}")
    layout = tables.paper_layout(table[table["domain"] == "all"])
    assert layout.loc["Gain (%)", "CIDEr"].startswith("+")


def test_a_verdict_and_its_row_of_the_table_give_one_interval(systems) -> None:
    row = tables.selection_block(systems, "all", 0).set_index("metric").loc["cider"]
    verdict, equal_length = tables.gain_verdicts(systems, 0)
    assert verdict.estimate.interval() == (row["low"], row["high"])
    assert equal_length.estimate.interval() == (row["gain_length_low"], row["gain_length_high"])


def test_gain_at_equal_length_is_a_verdict_of_its_own(systems) -> None:
    found = tables.gain_verdicts(systems, 0)
    assert [v.finding for v in found] == ["holds", "holds"] and found[0].unit == " %"


def test_euclidean_choice_is_equivalent_when_the_order_is() -> None:
    rows = planted_rows(0.4)
    rows["similarity_euclidean"] = 1 - rows["similarity"]
    prepared = claims.prepare(rows)
    assert claims.agreement(prepared) == 1.0
    assert claims.euclidean_verdict(prepared, "cider", 0).finding == "holds"
    rows["similarity_euclidean"] = rows["similarity"]  # now it selects the worst
    assert claims.euclidean_verdict(claims.prepare(rows), "cider", 0).finding == "reversed"


@pytest.mark.parametrize("loss", [0.0, 0.9])
def test_planted_family_words_are_found(loss: float) -> None:
    scenes = planted_scenes(300, seed=4)
    rows = planted_rows(0.2, n_sources=300, seed=4)
    planted = rows["item"].map(lambda item: scenes[item]["planted"] == "family")
    rows["cider"] = (rows["cider"] - loss * planted).clip(lower=0)
    marked = failures.describe(claims.prepare(rows), scenes)
    rate, lower = failures.imperfection_verdicts(marked, 0)
    assert (rate.finding == "holds") == (loss > 0)
    assert (lower.finding == "holds") == (loss > 0)


@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_planted_generation_bias_is_found(bonus: float) -> None:
    scenes = planted_scenes(400, seed=5)
    rows = planted_rows(0.0, n_sources=400, seed=5)
    marked = failures.describe(claims.prepare(rows), scenes)
    gift = bonus * (marked["silent"] & marked["carries"] & marked["biased"])
    marked["similarity"] = marked["similarity"] + gift
    marked["rank"] = marked.groupby("item")["similarity"].rank(ascending=False, method="first")
    drawn, wins = failures.bias_verdicts(marked, 0)
    assert (drawn.finding == "holds") == (bonus > 0)
    assert (wins.finding == "holds") == (bonus > 0)
    table = failures.counts(marked).set_index(["kind", "group"])
    assert table.loc[("generation bias", "planted"), "sources"] > 0


def test_exact_caption_needs_a_name_and_no_invention() -> None:
    scene = planted_scenes(1)["0000"]  # an owl
    assert failures.is_exact("an owl in a meadow", scene)
    assert not failures.is_exact("a bird in a meadow", scene)
    assert not failures.is_exact("an owl next to a car", scene)
    assert not failures.is_exact("something", scene)


def test_disputed_lists_selected_candidates_by_disagreement() -> None:
    rows = claims.prepare(planted_rows(-0.4, n_sources=30))
    top = failures.disputed(rows, "cider", 5)
    assert len(top) == 5 and (top["rank"] == 1).all()
    assert top["disagreement"].is_monotonic_decreasing


def test_wilson_by_hand() -> None:
    assert failures.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = failures.wilson(5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert np.isnan(failures.wilson(0, 0)).all()


def test_easy_pictures_and_salience() -> None:
    means = pd.DataFrame({"similarity": [0.9, 0.8, 0.1, 0.95], "score": [2.0, 1.0, 0.1, 0.2]})
    means["item"] = list("abcd")
    assert claims.easiness(means).idxmax() == 0  # the only one good in both
    rng = np.random.default_rng(0)
    many = pd.DataFrame({"similarity": rng.random(200), "item": [str(i) for i in range(200)]})
    many["score"] = many["similarity"]
    single = set(many.loc[many["similarity"] > 0.5, "item"])
    assert claims.salient_verdict(many, single.__contains__, "coco", 0).finding == "holds"


def test_repeatable_and_claims_do_not_move_each_other() -> None:
    rows = claims.prepare(planted_rows(0.2, n_sources=40))
    one, two = (claims.rank_verdicts(rows, "cider", 0)[0] for _ in range(2))
    assert one.estimate.interval() == two.estimate.interval()
    plain = ranking.within_source_spearman(
        claims.grid(rows, "similarity"),
        claims.grid(rows, "cider"),
        claims.generator(0, "rank", "picturebook-coco", "image", "cider", "rho"),
    )
    assert plain.interval() == one.estimate.interval()


def test_silence_is_about_the_thing_that_carries() -> None:
    assert failures.speech("a red tower with a flag next to an owl", "tower") == "speaks"
    assert failures.speech("a red tower next to an owl with a red scarf", "tower") == "silent"
    assert failures.speech("a building in the snow", "tower") == "silent"
    assert failures.speech("a red fir tree next to an owl", "tower") == "absent"
    assert failures.speech("a red fir tree", None) == "absent"


def _two_kinds_of_rows(greedy_cider: float, greedy_content: float) -> tables.Systems:
    """Rows whose likeliest candidate is the fourth, and a greedy caption that is so much better or worse."""
    rows = planted_rows(0.4)
    rows["logprob"] = np.where(rows["candidate"] == 3, -1.0, -5.0 - rows["candidate"])
    rows = claims.prepare(rows)
    best = rows[rows["selected"]].set_index("item")
    greedy = pd.DataFrame({"item": best.index, "cider": best["cider"].to_numpy() + greedy_cider,
                           "sem_f": best["sem_f"].to_numpy() + greedy_content})
    return tables.systems(rows, greedy=greedy)


def test_the_likeliest_candidate_is_a_row_of_table_1() -> None:
    systems = _two_kinds_of_rows(0.5, 0.0)
    block = tables.selection_block(systems, "all", 0).set_index("metric")
    fourth = systems.rows.loc[systems.rows["candidate"] == 3, "cider"].mean()
    assert block.loc["cider", "likeliest"] == pytest.approx(fourth)
    assert tables.paper_layout(block.reset_index()).loc["Most probable", "CIDEr"] == f"{100 * fourth:.1f}"
    texts = tables.systems(claims.prepare(planted_rows(0.4, task="text")))
    assert "likeliest" not in tables.selection_block(texts, "all", 0)


@pytest.mark.parametrize(("content", "said"), [
    (0.2, "say more that is true, too"), (0.0, "is not decided"), (-0.2, "say less that is true")])
def test_a_lead_in_cider_need_not_be_one_in_content(content: float, said: str) -> None:
    table = tables.rivals(_two_kinds_of_rows(0.5, content), 0).set_index(["rival", "score"])
    ahead = table.loc[("greedy", "cider")]
    assert ahead["lead"] == pytest.approx(100 * 0.5 / ahead["selected"]) and ahead["low"] > 0
    greedy, likeliest = tables.rival_sentences(table.reset_index())
    assert greedy.endswith(f"{said}.") and "ahead in CIDEr" in greedy
    assert "behind in CIDEr" in likeliest  # a candidate chosen without regard to the planted effect


def test_without_true_scenes_no_word_on_content() -> None:
    systems = _two_kinds_of_rows(0.5, 0.0)
    systems.rows["sem_f"] = np.nan
    table = tables.rivals(systems, 0)
    assert set(table["score"]) == {"cider"}
    assert "cannot be judged" in tables.rival_sentences(table)[0]


def test_what_the_captioner_knew_is_taken_out() -> None:
    """Similarity and score both follow the probability and share nothing else: nothing is left."""
    rows = planted_rows(0.0, seed=3)
    rng = np.random.default_rng(3)
    rows["logprob"] = -rng.uniform(4, 12, len(rows)) * rows["n_words"]
    known = rows["logprob"] / rows["n_words"]
    rows["similarity"] = 0.05 * known + rng.normal(scale=0.1, size=len(rows))
    rows["cider"] = 2 + 0.1 * known + rng.normal(scale=0.2, size=len(rows))
    rows["rank"] = rows.groupby("item")["similarity"].rank(ascending=False).astype(int)
    found = claims.controlled(claims.prepare(rows), "cider", 0)
    assert list(found) == ["nothing", "number of words", "log-probability", "log-probability per word"]
    assert found["nothing"].interval()[0] > 0.2 and found["number of words"].interval()[0] > 0.2
    assert abs(found["log-probability per word"].value) < found["nothing"].value / 3  # midranks leave a little
    verdicts = claims.rank_verdicts(claims.prepare(rows), "cider", 0)
    assert found["nothing"].interval() == verdicts[0].estimate.interval()
    assert found["number of words"].interval() == verdicts[1].estimate.interval()


def test_reasons_of_a_wide_spread_are_told_apart() -> None:
    """Good pictures score high and a few of them are vague: without these and by scale nothing is left."""
    rng = np.random.default_rng(9)  # not that of the planted rows: noise must not follow ease
    rows = planted_rows(0.0, n_sources=300, n_candidates=4)
    order = rows.groupby("item")["similarity"].transform("mean").rank(pct=True)
    vague = {item for place, item in enumerate(rows["item"].unique()) if place % 10 == 0}
    noise = rows["item"].map(dict(zip(rows["item"].unique(), rng.normal(1, 0.2, 300), strict=True)))
    rows["cider"] = np.where(order > 0.5, 3, 1) * noise * np.where(rows["item"].isin(vague) & (order > 0.5), 0.2, 1.0)
    found = claims.spread_reasons(claims.prepare(rows), vague.__contains__, 0)
    plain, relative, clear, both, semantic = found.values()
    assert plain.interval()[0] > 0 and relative.value > 0.2
    assert clear.interval()[0] > 0 and clear.n == 270
    assert abs(both.value) < 0.25 < clear.value < plain.value
    assert list(found)[-1] == "Semantic F1" and semantic.n == 300
    prepared = claims.prepare(rows)
    verdict = claims.correlation_verdicts(claims.source_means(prepared, "cider"), "image", "picturebook-coco", 0)
    assert plain.interval() == verdict[1].estimate.interval()
    assert len(claims.spread_reasons(prepared.assign(sem_f=np.nan), lambda item: False, 0)) == 2
