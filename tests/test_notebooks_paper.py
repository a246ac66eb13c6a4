"""Notebooks 03, 04 and 05 on rows with a planted answer: their tables, figures and claims show it; parameters change it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import spearmanr
from test_notebooks_cases import claims_of, notebook  # noqa: F401

from lib import ranking
from lib.metrics import CAPTION_SCORES, SEMANTIC_SCORES

COCO, NOCAPS = "picturebook-coco", "picturebook-nocaps"
Notebook = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples, and figures are made but not rendered."""
    monkeypatch.setattr(ranking, "RESAMPLES", 300)
    monkeypatch.setattr(Figure, "savefig", lambda figure, stream, **_: Image.new("RGB", (1, 1)).save(stream, "PNG"))
    plt.close("all")


def record(names: dict[str, Any], figure: str) -> dict[str, Any]:
    """What is stored beside a figure."""
    return json.loads((names["runs"].figures / f"{figure}.json").read_text(encoding="utf-8"))


def without_captions(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(**dict.fromkeys([*CAPTION_SCORES, *SEMANTIC_SCORES, "ref_clipscore"], np.nan))


def drawn(figure: Any) -> list[str]:
    """Titles and axis labels of a figure."""
    return [text for ax in figure.axes for text in (ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel())]


# --- Figure 3 -------------------------------------------------------------------------------------


def test_figure_3_shows_the_planted_correlation_and_follows_its_parameters(notebook: Notebook) -> None:  # noqa: F811
    runs = planted.write(n_sources=24, n_candidates=5, effect=0.4)
    planted.write(n_sources=24, n_candidates=5, effect=-0.4, seed=3)
    size = {"N_SOURCES": 24, "N_CANDIDATES": 5}
    names = notebook("03", **size, OTHER_SEEDS="3")

    rows = runs.rows("image")
    by_source = rows[rows["dataset"] == COCO].groupby("item")[["similarity", "cider"]]
    by_hand = np.mean([spearmanr(part["similarity"], part["cider"]).statistic for _, part in by_source])
    tested = names["tested"].set_index(["task", "dataset"])
    assert tested.loc[("image", COCO), "estimate"] == pytest.approx(by_hand) and by_hand > 0.5
    assert (tested["n"] + tested["tied"] == 24).all()

    curve = pd.DataFrame(record(names, "figure3")["data"]).set_index(["task", "dataset", "rank"])["mean"]
    expected = 100 * rows.groupby(["dataset", "rank"])["cider"].mean()
    assert curve.loc["image"].to_dict() == pytest.approx(expected.to_dict(), abs=1e-4)
    claims = claims_of(names, "the better the reconstruction")
    assert claims["verdict"].tolist() == ["supported"] * 4 and claims["n"].tolist() == [24] * 4
    assert names["ends"].set_index(["task", "dataset"]).loc[("image", NOCAPS), "paper"] == pytest.approx(6.5)
    compared = pd.concat(names["compared"]).set_index(["seed", "task", "dataset"])["estimate"]
    assert compared[0, "image", COCO] == pytest.approx(by_hand) and compared[3, "image", COCO] < -0.5

    other = notebook("03", **size, IMAGE_SCORE="sem_f", DOMAIN="out-domain", ERRORBAR="sd")
    assert set(other["rows"]["domain"]) == {"out-domain"} and set(other["tested"]["dataset"]) == {NOCAPS}
    texts = drawn(other["fig"])
    assert "(a) Image reconstruction, out-domain" in texts and "Mean Semantic F1 (× 100)" in texts
    assert "standard deviation" in other["fig"].get_supxlabel() and "2.2" not in other["fig"].get_supxlabel()
    assert record(other, "figure3_sem_f_out-domain_sd")["data"] != record(names, "figure3")["data"]
    with pytest.raises(AssertionError, match="choose all or one of"):
        notebook("03", **size, DOMAIN="nowhere")


@pytest.mark.parametrize(("effect", "verdict"), [(0.0, "inconclusive"), (-0.4, "contradicted")])
def test_figure_3_reports_the_sign_that_it_finds(notebook: Notebook, effect: float, verdict: str) -> None:  # noqa: F811
    planted.write("mini", COCO, 24, 5, effect=effect)
    names = notebook("03", DATASET=COCO, N_SOURCES=24, N_CANDIDATES=5)
    claims = claims_of(names, "the better the reconstruction")
    assert claims["verdict"].tolist() == [verdict] * 2
    assert claims["detectable"].notna().all() == (verdict == "inconclusive")


# --- Figure 4 -------------------------------------------------------------------------------------


def test_figure_4_is_there_without_selection_and_says_that_it_is_no_evidence(notebook: Notebook) -> None:  # noqa: F811
    runs = planted.write(n_sources=24, n_candidates=5, effect=0.0)
    size = {"N_SOURCES": 24, "N_CANDIDATES": 5}
    names = notebook("04", **size)
    means = runs.rows("image").groupby(["dataset", "item"])[["similarity", "cider"]].mean().loc[NOCAPS]
    by_hand = spearmanr(means["similarity"], means["cider"]).statistic
    assert names["trend"].loc[("image", NOCAPS), "estimate"] == pytest.approx(by_hand) and by_hand > 0.7
    claims = claims_of(names, "Figure 4")
    assert claims["verdict"].tolist() == ["supported"] * 4
    assert claims["note"].str.contains("no evidence for selection").all()
    assert "No evidence for selection" in names["fig"].get_supxlabel()
    assert drawn(names["fig"])[0].startswith("(a) Image reconstruction, NoCaps-like\nρ = ")

    bins = pd.DataFrame(record(names, "figure4")["data"])
    assert bins.groupby(["task", "dataset"])["count"].agg(["size", "sum"]).to_numpy().tolist() == [[8, 24]] * 4
    inside = pd.cut(means["similarity"], 8, labels=False)
    expected = 100 * means["cider"].groupby(inside).mean()
    found = bins[(bins["task"] == "image") & (bins["dataset"] == NOCAPS)].reset_index()["mean"].dropna()
    assert found.to_dict() == pytest.approx(expected.to_dict(), abs=1e-3)

    other = notebook("04", **size, BINS=4, IMAGE_SCORE="meteor")
    assert len(record(other, "figure4_meteor_4-bins")["data"]) == 16
    assert "Mean METEOR (× 100)" in drawn(other["fig"])


def test_bins_of_one_or_two_sources_have_neither_box_nor_mean(notebook: Notebook) -> None:  # noqa: F811
    planted.write("mini", COCO, 24, 4)
    names = notebook("04", DATASET=COCO, N_SOURCES=24, N_CANDIDATES=4)
    for (_, panel), ax in zip(names["panels"].items(), names["fig"].axes, strict=False):
        bins = names["in_bins"](panel)
        curve = next(line for line in ax.get_lines() if line.get_marker() == "o")
        assert (np.isnan(curve.get_ydata().astype(float)) == (bins["count"] < 3)).all()
        boxes = [line for line in ax.get_lines() if len(line.get_xdata()) == 5]
        assert len(boxes) == (bins["count"] >= 5).sum()


# --- Table 1 --------------------------------------------------------------------------------------


def test_table_1_is_what_direct_computation_gives_beside_the_papers_numbers(notebook: Notebook) -> None:  # noqa: F811
    runs = planted.write(n_sources=24, n_candidates=4, effect=0.4)
    size = {"N_SOURCES": 24, "N_CANDIDATES": 4}
    names = notebook("05", **size)
    rows = runs.rows("image")
    rows = rows[rows["dataset"] == COCO]
    table, printed = names["table1"].loc[COCO], names["printed"].loc["COCO-like"]
    nucleus, chosen = rows["cider"].mean(), rows.loc[rows["rank"] == 1, "cider"].mean()
    oracle = rows.groupby("item")["cider"].max().mean()
    expected = {"Nucleus": nucleus, "Selected": chosen, "Greedy": 1.1 * nucleus, "Oracle": oracle}
    assert table["CIDEr"].drop("Most probable").to_dict() == pytest.approx({k: 100 * v for k, v in expected.items()})
    assert printed.loc["Gain (%)", "CIDEr"] == pytest.approx(100 * (chosen / nucleus - 1))
    assert printed.loc["Selected, paper", "CIDEr"] == 100.4 and printed.loc["Gain (%), paper", "SPICE"] == 2.2

    gained = names["gained"].loc[COCO]
    assert gained["estimate"].to_dict() == pytest.approx(printed.loc["Gain (%)"].dropna().to_dict())
    assert gained.loc["CIDEr", "low"] > 0 and np.isnan(gained.loc["CIDEr", "p (Holm)"]), "the primary score stands alone"
    secondary = gained.drop(index="CIDEr")
    assert (secondary["p (Holm)"] >= secondary["p"]).all()
    assert names["by_domain"]["n"].sum() == 24 and len(names["by_domain"]) > 1

    claims = claims_of(names, "beats nucleus sampling").set_index("dataset")
    assert claims["paper"].to_dict() == {COCO: "+2.2 %", NOCAPS: "+7.6 %"} and set(claims["verdict"]) == {"supported"}
    assert set(claims_of(names, "Euclidean")["verdict"]) == {"supported"}, "the planted distance orders as the cosine"
    points = pd.DataFrame(record(names, "table1_gains")["data"]).set_index(["dataset", "score"])
    expected = [gained.loc["CIDEr", "estimate"], 2.2]
    assert points.loc[(COCO, "CIDEr"), ["estimate", "paper"]].tolist() == pytest.approx(expected)

    other = notebook("05", **size, SCORES="cider_d, rouge_l", SIMILARITY="similarity_second")
    assert other["primary"] == "cider_d" and (other["runs"].figures / "table1_cider_d_similarity_second.tex").is_file()
    assert other["table1"].loc[(COCO, "Selected"), "CIDEr-D"] != table.loc["Selected", "CIDEr-D"]


def test_corpus_bleu_is_made_of_counts_and_resampled(notebook: Notebook) -> None:  # noqa: F811
    planted.write("mini", COCO, 8, 3)
    names = notebook("05", DATASET=COCO, N_SOURCES=8, N_CANDIDATES=3)
    counts, bleu = names["COUNTS"], names["bleu_from_counts"]
    by_k = [bleu(part[counts].sum()) for _, part in names["sampled"].groupby("candidate")]
    assert names["table1"].loc[(COCO, "Nucleus"), "BLEU-4"] == pytest.approx(100 * np.mean(by_k, axis=0)[3])
    greedy = names["greedy"]
    assert names["table1"].loc[(COCO, "Greedy"), "BLEU-1"] == pytest.approx(100 * bleu(greedy[counts].sum())[0])
    assert np.isfinite(names["gained"].loc[(COCO, "BLEU-1"), "low"])


def test_the_gain_at_equal_length_leaves_out_what_length_explains(notebook: Notebook) -> None:  # noqa: F811
    def by_length(rows: pd.DataFrame) -> pd.DataFrame:
        """The score is the number of words and so is the similarity."""
        if rows["task"].iloc[0] == "text":
            return rows
        words = rows["candidate"] + 5
        rows = rows.assign(n_words=words, cider=words / 10.0, similarity=words / 20.0, clip_score=words / 20.0)
        return planted.ranked(rows)

    planted.write("mini", COCO, 8, 4, change=by_length)
    names = notebook("05", DATASET=COCO, N_SOURCES=8, N_CANDIDATES=4)
    assert names["gained"].loc[(COCO, "CIDEr"), "estimate"] == pytest.approx(100 * (8 / 6.5 - 1))
    assert names["at_equal_length"][COCO]["estimate"] == pytest.approx(0, abs=1e-9)


# --- whatever was run -----------------------------------------------------------------------------


@pytest.fixture
def own_images(tmp_path: Path) -> str:
    """Six images of one's own in a folder with a name that LaTeX and file systems mind."""
    folder = tmp_path / "my_100% own & very long folder of images"
    folder.mkdir()
    for k in range(6):
        Image.new("RGB", (32, 32), (40 * k, 90, 120)).save(folder / f"image {k}.png")
    return f"folder:{folder}"


def test_images_without_captions_are_judged_by_clipscore(
    notebook: Notebook, own_images: str, capsys: pytest.CaptureFixture  # noqa: F811
) -> None:
    planted.write("mini", own_images, 6, 3, change=without_captions)
    parameters = {"DATASET": own_images, "N_SOURCES": 6, "N_CANDIDATES": 3}
    names = notebook("03", **parameters)
    assert "Mean CLIPScore (× 100)" in drawn(names["fig"]) and np.isfinite(names["tested"]["low"]).all()
    assert "text reconstruction: " in capsys.readouterr().out, "what was skipped is said"
    assert "Mean CLIPScore (× 100)" in drawn(notebook("04", **parameters)["fig"])
    names = notebook("05", **parameters)
    systems = names["printed"].index.get_level_values("system")
    assert names["scores"] == ["clipscore"] and not any("paper" in system for system in systems)
    for line in (names["runs"].figures / "table1_clipscore.tex").read_text().splitlines():
        assert not re.search(r"(?<!\\)[%_#$]", line) and line.count("&") - line.count(r"\&") in (0, 2)


def test_prompts_without_images_leave_nothing_to_judge_and_that_is_said(
    notebook: Notebook, tmp_path: Path, capsys: pytest.CaptureFixture  # noqa: F811
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red ball number {k}" for k in range(6)))
    prompts = f"texts:{tmp_path / 'prompts.txt'}"
    planted.write("mini", prompts, 6, 3, change=lambda rows: rows.assign(
        clip_score=np.nan, clip_score_second=np.nan, clipscore=np.nan))
    for number in ("03", "04", "05"):
        names = notebook(number, DATASET=prompts, N_SOURCES=6, N_CANDIDATES=3)
        assert "image reconstruction: " in capsys.readouterr().out
        assert not list(names["runs"].figures.glob("*.png")), "an empty figure is not stored"
        assert list((names["runs"].figures / "claims").glob(f"{number}_*.csv"))


def test_few_sources_have_estimates_and_no_verdict(notebook: Notebook) -> None:  # noqa: F811
    planted.write("mini", COCO, 4, 2)
    for number in ("03", "04", "05"):
        names = notebook(number, DATASET=COCO, N_SOURCES=4, N_CANDIDATES=2)
        found = pd.read_csv(next((names["runs"].figures / "claims").glob(f"{number}_*.csv")))
        assert set(found["verdict"]) == {"insufficient data"} and found["low"].isna().all()


def test_a_source_with_a_flagged_image_is_left_out_whole_and_counted(
    notebook: Notebook, capsys: pytest.CaptureFixture  # noqa: F811
) -> None:
    def flag(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(flagged=(rows["item"] == rows["item"].min()) & (rows["candidate"] == 1))

    planted.write("mini", COCO, 8, 3, change=flag)
    names = notebook("05", DATASET=COCO, N_SOURCES=8, N_CANDIDATES=3)
    assert "sources left out for flagged images: 2" in capsys.readouterr().out, "one in each task"
    assert set(names["gained"]["n"]) == {7} and names["systems"]["Greedy"]["item"].nunique() == 7
