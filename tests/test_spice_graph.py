"""The scoring half of SPICE (spaCy): synonyms, merging, F1; and the official scorer's own tuples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lib
from lib.scoring.spice_graph import Fact, Graph, f_score, merge
from lib.scoring.wordnet import WordNet, load_wordnet

OFFICIAL = Path(lib.__file__).parent.parent.parent / "shared" / "data" / "spice" / "spice_scores.json"


@pytest.fixture(scope="module")
def wordnet() -> WordNet:
    return load_wordnet()


@pytest.mark.parametrize(("first", "second"), [
    ("bike", "bicycle"), ("child", "kid"), ("couch", "sofa"),  # synsets
    ("children", "child"), ("mice", "mouse"), ("dogs", "dog"), ("boxes", "box"),  # nouns
    ("playing", "play"), ("parked", "park"), ("riding", "ride"),  # verbs
    ("bigger", "large"), ("surfer", "surfboard"),  # as the official scorer has it
    ("in front of", "in front of"),
])
def test_same(wordnet: WordNet, first: str, second: str) -> None:
    assert wordnet.same(first, second) and wordnet.same(second, first)


@pytest.mark.parametrize(("first", "second"), [
    ("dog", "cat"), ("dog", "animal"), ("red", "blue"), ("left", "right"), ("on", "under"),
    ("player", "playing"), ("passing", "top"), ("xyzzy", "xyzzz"), ("", "cat"),
])
def test_not_the_same(wordnet: WordNet, first: str, second: str) -> None:
    assert not wordnet.same(first, second) and not wordnet.same(second, first)


def test_merging_joins_synonyms_into_one_object(wordnet: WordNet) -> None:
    first = Graph(("bike", "street"), (("bike", "red"),), (("bike", "on", "street"),))
    second = Graph(("bicycle",), (("bicycle", "red"), ("bicycle", "old")), ())
    facts = merge([first, second], wordnet)
    bike = ("bike", "bicycle")
    assert set(facts) == {
        (bike,), (("street",),), (bike, ("red",)), (bike, ("old",)), (bike, ("on",), ("street",)),
    }
    assert len(facts) == 5  # "red" is told once


def test_merging_is_transitive_and_keeps_the_number_of_facts_in_any_order(wordnet: WordNet) -> None:
    graphs = [Graph((word,)) for word in ("toilet", "pot", "bathroom", "table")]
    assert len(merge(graphs, wordnet)) == len(merge(graphs[::-1], wordnet)) == 2


def test_f_score_by_hand(wordnet: WordNet) -> None:
    candidate = merge([Graph(("kid", "bike"), (("kid", "young"),), (("kid", "ride", "bike"),))], wordnet)
    reference = merge([Graph(("child", "bicycle", "hill"), (), (("child", "ride", "bicycle"),))], wordnet)
    # 3 of the candidate's 4 facts are among the reference's 4: P = R = 3/4
    assert f_score(candidate, reference, wordnet) == pytest.approx(3 / 4)
    assert f_score(candidate, candidate, wordnet) == 1
    # 1 of 2 and 1 of 4: F = 2 * 1/2 * 1/4 / (1/2 + 1/4)
    other = merge([Graph(("hill", "cloud"))], wordnet)
    assert f_score(other, reference, wordnet) == pytest.approx(1 / 3)


def test_an_empty_graph_scores_zero(wordnet: WordNet) -> None:
    some = merge([Graph(("cat",))], wordnet)
    assert merge([], wordnet) == merge([Graph()], wordnet) == []
    assert f_score([], some, wordnet) == f_score(some, [], wordnet) == f_score([], [], wordnet) == 0


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="needs ../shared/data/spice/spice_scores.json")
def test_given_the_official_tuples_the_score_is_the_official_one(wordnet: WordNet) -> None:
    entries = json.loads(OFFICIAL.read_text(encoding="utf-8"))
    agree = sum(
        abs(
            f_score(facts(entry["test_tuples"]), facts(entry["ref_tuples"]), wordnet)
            - (entry["scores"]["All"]["f"] or 0.0)
        ) < 1e-9
        for entry in entries
    )
    assert agree / len(entries) >= 0.99


def facts(tuples: list[dict]) -> list[Fact]:
    """Tuples as the official scorer prints them: "bike/bicycle" is one object of two names."""
    return [tuple(tuple(part.split("/")) for part in one["tuple"]) for one in tuples]
