"""The safety checker from end to end: marked in the row, no score, the same sources in every arm."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lib import claims, figures, report, results, tables
from lib.errors import UserError
from lib.labels import PRIMARY
from lib.metrics import Corpus, bleu_statistics
from lib.models import load_generator
from lib.presets import GeneratorSpec
from lib.study import summarise
from tests.standins import stand_ins
from tests.test_roundtrip import MINI, paint, play
from tests.tiny_families import build_checked_stable_diffusion

CHECKED = dataclasses.replace(
    MINI, name="checked", generator=dataclasses.replace(MINI.generator, safety_checker=True))
N, K = 8, 3


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return f"folder:{paint(tmp_path_factory.mktemp('captioned') / 'pictures', captions=True, n=N)}"


@pytest.fixture(scope="module", params=["image", "text"])
def run(request, captioned, tmp_path_factory):
    """A run in which the pictures of red things are flagged."""
    return play(captioned, tmp_path_factory.mktemp(request.param), request.param,
                models=stand_ins(flag="red"), preset=CHECKED, n=N, k=K)


def kept_items(rows) -> list[str]:
    """The sources without a flagged picture, by the plainest way there is."""
    return [item for item, source in rows.groupby("item") if not source["flagged"].any()]


def test_sources_with_a_flagged_picture_are_left_out_whole_and_counted(run):
    rows = run.rows()
    kept, prepared = kept_items(rows), claims.prepare(rows)
    assert 2 < len(kept) < N and sorted(prepared["item"].unique()) == kept
    assert not prepared["flagged"].any() and prepared["similarity"].notna().all()
    counts = run.info()["counts"]
    assert counts["flagged"] == rows["flagged"].sum() == prepared.attrs["n_flagged_rows"]
    assert counts["flagged_sources"] == N - len(kept) == prepared.attrs["n_flagged"]
    said = summarise(prepared, PRIMARY[prepared["task"].iloc[0]])
    assert said["flagged by the safety checker"] == counts["flagged"]
    assert said["sources left out for that"] == N - len(kept) and said["sources"] == len(kept)
    if prepared["task"].iloc[0] == "text":  # every picture of "a red thing" is flagged
        assert (rows.groupby("item")["flagged"].sum() == K).any()


def test_both_arms_of_table_1_hold_the_same_sources(run):
    rows = run.rows()
    kept, prepared = kept_items(rows), claims.prepare(rows)
    task = prepared["task"].iloc[0]
    score, greedy = PRIMARY[task], run.baselines() if task == "image" else None
    table = tables.selection_table(tables.systems(prepared, greedy=greedy), seed=0)
    row = table[table["metric"] == score].iloc[0]
    inside = rows[rows["item"].isin(kept)]
    assert row["n"] == len(kept)
    assert row["nucleus"] == pytest.approx(inside.groupby("item")[score].mean().mean())
    assert row["selected"] == pytest.approx(inside.loc[inside["selected"], score].mean())
    if task == "image":
        assert row["greedy"] == pytest.approx(greedy.loc[greedy["item"].isin(kept), score].mean())


@pytest.mark.parametrize("run", ["image"], indirect=True)  # of texts there is no corpus score
def test_corpus_bleu_of_both_arms_holds_the_same_sources(run):
    rows = run.rows()
    prepared, greedy = claims.prepare(rows), run.baselines()
    references = {item: ["a red thing", "a blue thing on a page"] for item in rows["item"].unique()}
    corpus = Corpus.build(references)

    def counts(table, column):
        return bleu_statistics(table["item"].tolist(), table[column].tolist(), corpus)

    systems = tables.systems(prepared, counts(prepared, "message"), greedy, counts(greedy, "caption"))
    inside = greedy[greedy["item"].isin(kept_items(rows))]
    assert systems.bleu.shape[:2] == (prepared["item"].nunique(), K)
    assert (systems.greedy_bleu.sum(axis=0) == counts(inside, "caption").sum(axis=0)).all()


def test_claims_use_the_kept_sources_only(run):
    prepared = claims.prepare(run.rows())
    n = prepared["item"].nunique()
    for verdict in claims.rank_verdicts(prepared, PRIMARY[prepared["task"].iloc[0]], seed=0):
        assert verdict.estimate.n + verdict.estimate.left_out == n
    assert len(claims.source_means(prepared, PRIMARY[prepared["task"].iloc[0]])) == n


def test_report_tells_how_many(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPENDIUM_FIGURES", str(tmp_path))
    monkeypatch.setenv("COMPENDIUM_RUNS", str(run.path.parent))
    from matplotlib.figure import Figure

    figures.save_figure(Figure(), "figure3", figures.Origin(CHECKED, (run,), 0, "03"), "t", "a")
    text = report.build_report(CHECKED).read_text(encoding="utf-8")
    counts = run.info()["counts"]
    assert f"on: {counts['flagged']} of {N * K} rows flagged, {counts['flagged_sources']} sources" in text
    assert "the paper, NVIDIA T4" in text and "sources per hour" in text


@pytest.mark.parametrize("task", ["image", "text"])
def test_a_run_of_flagged_pictures_only_ends_and_says_so(captioned, tmp_path, capfd, task):
    run = play(captioned, tmp_path, task, models=stand_ins(flag=""), preset=CHECKED, n=2, k=2,
               progress=True)
    rows = run.rows()
    assert rows["flagged"].all() and rows[["similarity", "rank", *results.SCORES]].isna().all(None)
    said = capfd.readouterr().err
    assert "flagged by the safety checker: 4 of 4 rows; the 2 of 2 sources that have such a row" in said
    assert f"cost of {run.name}: 2 sources" in said and "TFLOP not counted" in said
    with pytest.raises(UserError, match="the safety checker flagged pictures of all 2 sources"):
        claims.prepare(rows)


def test_a_real_checker_marks_the_rows(captioned, tmp_path):
    folder = build_checked_stable_diffusion(tmp_path / "checked")
    arguments = {"steps": 1, "guidance": 0.0, "size": 32, "output_size": 32}
    for wanted in (True, False):
        spec = GeneratorSpec(str(folder), safety_checker=wanted, **arguments)
        models = dataclasses.replace(stand_ins(), generator=load_generator(spec, "cpu"))
        run = play(captioned, tmp_path / str(wanted), models=models, preset=CHECKED, n=2, k=2)
        rows = run.rows()
        assert (rows["flagged"] == wanted).all() and (rows["similarity"].isna() == wanted).all()
        cost = json.loads((run.path / "cost.json").read_text())
        checked = cost["network_passes"].get("generator: safety checker", 0)
        assert checked == (cost["passes"]["images_generated"] if wanted else 0)
        assert cost["flop"]["generate"] > 0 and cost["tflop"] is None  # stand-ins are not counted
