"""The parsing half of SPICE (spaCy): one sentence a rule, and the agreement with official SPICE."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lib
from lib.scoring import spice_spacy
from lib.scoring.spice_graph import Graph, f_score, merge
from lib.scoring.spice_spacy import from_json, parse, to_json
from lib.scoring.wordnet import load_wordnet

SHARED = Path(lib.__file__).parent.parent.parent / "shared" / "data" / "spice"


def graph(caption: str) -> Graph:
    return parse([caption])[0]


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
    ("a woman is riding a horse", set(), {("woman", "ride", "horse")}),
    ("a woman who rides a horse", set(), {("woman", "ride", "horse")}),
    ("a man sits at a table", set(), {("man", "sit at", "table")}),
    ("a tree surrounded by flowers", set(), {("tree", "surround by", "flower")}),
    ("a cat sitting on top of a car", set(), {("cat", "sit on top of", "car")}),
    ("a man standing in front of a house", set(), {("man", "stand in front of", "house")}),
    ("a boat next to a pier", set(), {("boat", "next to", "pier")}),
    ("the hydrant is next to a wall", set(), {("hydrant", "next to", "wall")}),
    ("a palm to the left of a tent", set(), {("palm", "left of", "tent")}),
    ("a tiny balloon right of a house", {("balloon", "tiny")}, {("balloon", "right of", "house")}),
    ("a duckling on the right of a tree", set(), {("duckling", "right of", "tree")}),
    ("a woman with her dog", set(), {("woman", "with", "dog"), ("woman", "have", "dog")}),
    ("a man and a boy eating cake", set(), {("man", "eat", "cake"), ("boy", "eat", "cake")}),
    ("a bunch of bananas on a table", {("banana", "a")}, set()),
    ("a table full of food", {("table", "full")}, {("table", "of", "food")}),
])
def test_one_rule_at_a_time(
    caption: str, attributes: set[tuple[str, str]], relations: set[tuple[str, str, str]]
) -> None:
    found = graph(caption)
    assert attributes <= set(found.attributes), found
    assert relations <= set(found.relations), found


def test_a_word_that_modifies_is_no_object() -> None:
    assert graph("a blue street sign").objects == ("sign",)
    assert graph("each man looks at each other").objects == ("man",)


def test_a_verb_that_the_tagger_took_for_a_noun_is_given_back() -> None:
    found = graph("a woman on a surfboard riding a wave")
    assert "surfboard" in found.objects and "riding" not in found.objects


def test_group_members_act() -> None:
    assert ("people", "sit at", "table") in graph("a group of people sitting at a table").relations


@pytest.mark.parametrize("caption", ["", "a", "the of and", "一艘 红色 的 船", "boat " * 1000, "12 34"])
def test_odd_captions_have_a_graph(caption: str) -> None:
    assert isinstance(graph(caption.strip()), Graph)


def test_graphs_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [f"{count} {colour} {thing} near the {place}" for count in ("two", "three")
                for colour in ("red", "blue") for thing in ("boats", "cats") for place in ("sea", "tree")]
    whole = parse(captions)
    monkeypatch.setattr(spice_spacy, "_BATCH", 3)
    assert parse(captions[::-1])[::-1] == whole
    assert [graph(caption) for caption in captions] == whole


def test_graphs_survive_the_cache() -> None:
    found = graph("two small dogs and a man sit next to a red house")
    assert from_json(json.loads(json.dumps(to_json(found)))) == found


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/spice")
def test_agreement_with_official_spice() -> None:
    entries = json.loads((SHARED / "captions.json").read_text(encoding="utf-8"))
    scores = json.loads((SHARED / "spice_scores.json").read_text(encoding="utf-8"))
    assert [one["image_id"] for one in entries] == [one["image_id"] for one in scores]
    official = np.array([one["scores"]["All"]["f"] or 0.0 for one in scores])
    captions = sorted({caption for one in entries for caption in (one["test"], *one["refs"])})
    graphs = dict(zip(captions, parse(captions), strict=False))
    wordnet = load_wordnet()
    ours = np.array([
        f_score(
            merge([graphs[one["test"]]], wordnet),
            merge([graphs[caption] for caption in one["refs"]], wordnet), wordnet,
        )
        for one in entries
    ])
    assert np.corrcoef(ours, official)[0, 1] >= 0.85
    assert np.abs(ours - official).mean() <= 0.04
    assert abs(ours.mean() - official.mean()) <= 0.01
