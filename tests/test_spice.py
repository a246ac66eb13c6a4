"""SPICE (spaCy): one sentence a rule, synonyms, merging, F1, agreement with official SPICE; and the official scorer."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lib.base import UserError
from lib.metrics import References, available, score_captions, spice_official
from lib.metrics.java import Missing
from lib.metrics.scene_graph import Fact, Graph, f_score, merge, same
from lib.metrics.scene_rules import parse

SAMPLE = json.loads((Path(__file__).parent / "data" / "coco_spice_sample.json").read_text(encoding="utf-8"))["captions"]


def graph(caption: str) -> Graph:
    return parse([caption])[caption]


@pytest.mark.parametrize(("caption", "attributes", "relations"), [
    ("two small dogs", {("dog", "two"), ("dog", "small")}, set()),
    ("a red and white hydrant", {("hydrant", "red"), ("hydrant", "white")}, set()),
    ("a blue street sign", {("sign", "blue"), ("sign", "street")}, set()),
    ("the cat is black", {("cat", "black")}, set()),
    ("a sleeping cat", {("cat", "sleep")}, set()),
    ("the cat sleeps", {("cat", "sleep")}, set()),
    ("a cat on a mat", set(), {("cat", "on", "mat")}),
    ("the cat is on the mat", set(), {("cat", "on", "mat")}),
    ("there is a cat under the table", set(), {("cat", "under", "table")}),
    ("a woman riding a horse", set(), {("woman", "ride", "horse")}),
    ("a woman who rides a horse", set(), {("woman", "ride", "horse")}),
    ("a man sits at a table", set(), {("man", "sit at", "table")}),
    ("a tree surrounded by flowers", set(), {("tree", "surround by", "flower")}),
    ("a cat sitting on top of a car", set(), {("cat", "sit on top of", "car")}),
    ("a man standing in front of a house", set(), {("man", "stand in front of", "house")}),
    ("the hydrant is next to a wall", set(), {("hydrant", "next to", "wall")}),
    ("a palm to the left of a tent", set(), {("palm", "left of", "tent")}),
    ("a tiny balloon right of a house", {("balloon", "tiny")}, {("balloon", "right of", "house")}),
    ("a duckling on the right of a tree", set(), {("duckling", "right of", "tree")}),
    ("a woman with her dog", set(), {("woman", "with", "dog"), ("woman", "have", "dog")}),
    ("a man and a boy eating cake", set(), {("man", "eat", "cake"), ("boy", "eat", "cake")}),
    ("a bunch of bananas on a table", {("banana", "a")}, set()),
    ("a table full of food", {("table", "full")}, {("table", "of", "food")}),
    ("a group of people sitting at a table", set(), {("people", "sit at", "table")}),
])
def test_one_rule_at_a_time(
    caption: str, attributes: set[tuple[str, str]], relations: set[tuple[str, str, str]]
) -> None:
    found = graph(caption)
    assert attributes <= set(found.attributes) and relations <= set(found.relations), found


def test_a_word_that_modifies_is_no_object() -> None:
    assert graph("a blue street sign").objects == ("sign",)
    assert graph("each man looks at each other").objects == ("man",)
    assert "riding" not in graph("a woman on a surfboard riding a wave").objects


def test_graphs_do_not_depend_on_the_batch() -> None:
    captions = [f"{count} {colour} {thing} near the {place}" for count in ("two", "three")
                for colour in ("red", "blue") for thing in ("boats", "cats") for place in ("sea", "tree")]
    assert {caption: graph(caption) for caption in captions} == parse(captions)


@pytest.mark.parametrize(("first", "second", "equal"), [
    ("bike", "bicycle", True), ("child", "kid", True), ("couch", "sofa", True),  # synsets
    ("children", "child", True), ("mice", "mouse", True), ("boxes", "box", True),  # nouns
    ("playing", "play", True), ("parked", "park", True), ("riding", "ride", True),  # verbs
    ("bigger", "large", True), ("surfer", "surfboard", True),  # as the official scorer has it
    ("dog", "cat", False), ("dog", "animal", False), ("left", "right", False), ("player", "playing", False),
    ("xyzzy", "xyzzz", False), ("", "cat", False),
])
def test_same(first: str, second: str, equal: bool) -> None:
    assert same(first, second) is same(second, first) is equal


def test_merging_joins_synonyms_into_one_object() -> None:
    first = Graph(("bike", "street"), (("bike", "red"),), (("bike", "on", "street"),))
    second = Graph(("bicycle",), (("bicycle", "red"), ("bicycle", "old")), ())
    bike = ("bike", "bicycle")
    facts = merge([first, second])
    assert set(facts) == {(bike,), (("street",),), (bike, ("red",)), (bike, ("old",)), (bike, ("on",), ("street",))}
    assert len(facts) == 5  # "red" is there once
    graphs = [Graph((word,)) for word in ("toilet", "pot", "bathroom", "table")]
    assert len(merge(graphs)) == len(merge(graphs[::-1])) == 2  # transitive


def test_f_score_by_hand() -> None:
    candidate = merge([Graph(("kid", "bike"), (("kid", "young"),), (("kid", "ride", "bike"),))])
    reference = merge([Graph(("child", "bicycle", "hill"), (), (("child", "ride", "bicycle"),))])
    # 3 of the candidate's 4 facts are among the reference's 4: P = R = 3/4
    assert f_score(candidate, reference) == pytest.approx(3 / 4) and f_score(candidate, candidate) == 1
    # 1 of 2 and 1 of 4: F = 2 * 1/2 * 1/4 / (1/2 + 1/4)
    assert f_score(merge([Graph(("hill", "cloud"))]), reference) == pytest.approx(1 / 3)
    assert f_score([], reference) == f_score(reference, []) == f_score([], []) == 0


def test_given_the_official_tuples_the_score_is_the_official_one() -> None:
    def facts(tuples: list[list[str]]) -> list[Fact]:  # "bike/bicycle" is one object of two names
        return [tuple(tuple(part.split("/")) for part in one) for one in tuples]

    ours = [f_score(facts(one["caption_tuples"]), facts(one["reference_tuples"])) for one in SAMPLE]
    assert ours == pytest.approx([one["spice"] for one in SAMPLE], abs=1e-9)


def agreement(entries: list[dict]) -> tuple[float, float, float]:
    """Pearson's r, mean absolute difference and difference of the means of SPICE (spaCy) and official SPICE."""
    references = References.build({str(number): one["references"] for number, one in enumerate(entries)})
    table = score_captions(range(len(entries)), [one["caption"] for one in entries], references, ["spice_spacy"])
    ours, official = table["spice_spacy"].to_numpy(), np.array([one["spice"] for one in entries])
    return np.corrcoef(ours, official)[0, 1], np.abs(ours - official).mean(), ours.mean() - official.mean()


def test_agreement_with_official_spice_on_the_committed_sample() -> None:
    pearson, error, bias = agreement(SAMPLE)
    assert pearson == pytest.approx(0.876, abs=0.005) and error <= 0.04 and abs(bias) <= 0.02


# --- the official scorer -----------------------------------------------------------------------


def jar(path: Path, *members: str) -> None:
    with zipfile.ZipFile(path, "w") as packed:
        for member in ("META-INF/MANIFEST.MF", *members):
            packed.writestr(member, "")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the scorer's jars, empty."""
    monkeypatch.setattr(spice_official, "FOLDER", tmp_path / "jars")
    monkeypatch.setattr(spice_official, "SYSTEM_JARS", tmp_path / "none")
    monkeypatch.setattr(spice_official, "ROOT", tmp_path)
    (tmp_path / "jars").mkdir()
    return tmp_path / "jars"


def test_what_the_official_scorer_lacks_is_named_with_the_remedy(folder: Path) -> None:
    assert "stanford-corenlp-3.6.0.jar and" in available()["spice"] and "fetch-spice" in available()["spice"]
    for name in spice_official.CORENLP:
        jar(folder / name)
    jar(folder / "rhino-runtime.jar")  # Rhino without its script engine does not do
    assert "needs a JavaScript engine" in available()["spice"]
    jar(folder / "rhino-all.jar", "META-INF/services/javax.script.ScriptEngineFactory")
    assert available()["spice"] is None
    # the real scorer starts, and misses the classes that the empty jars do not hold
    found = score_captions(["1"], ["a cat"], References.build({"1": ["a dog"]}), ["spice", "bleu1"])
    assert found["bleu1"].notna().all() and found["spice"].isna().all()
    assert "NoClassDefFoundError: edu/stanford/nlp" in found.attrs["missing"]["spice"]


def test_real_output_is_read_and_unreadable_output_is_told() -> None:
    output = [{"image_id": row, "scores": {"All": {"f": one["spice"] or math.nan}}} for row, one in enumerate(SAMPLE)]
    assert spice_official.read_scores(json.dumps(output[::-1]), len(SAMPLE)) == [one["spice"] for one in SAMPLE]
    for bad in ("", "[{]", "{}", "[]", '[{"image_id": 0}]'):
        with pytest.raises(Missing, match="official SPICE left"):
            spice_official.read_scores(bad, 1)


def test_fetching_checks_the_hash_and_keeps_what_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / f"{spice_official.ARCHIVE}.zip"
    with zipfile.ZipFile(source, "w") as packed:
        for name in spice_official.CORENLP:
            packed.writestr(f"{spice_official.ARCHIVE}/{name}", name * 10)
    monkeypatch.setattr("pooch.HTTPDownloader.__call__", lambda self, url, target, *_: shutil.copy(source, target))
    with pytest.raises(UserError, match="hash"):
        spice_official.fetch()
    monkeypatch.setattr(spice_official, "SHA1", hashlib.sha1(source.read_bytes(), usedforsecurity=False).hexdigest())
    spice_official.fetch()
    assert sorted(path.name for path in folder.iterdir()) == sorted(spice_official.CORENLP)
    source.unlink()
    assert len(spice_official.fetch()) == 2  # nothing is fetched twice

