"""BLEU, CIDEr and CIDEr-D on captions so small that the arithmetic fits beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lib.scoring import bleu
from lib.scoring.cider import Frequencies, References
from lib.scoring.clip import clip_score, clipscore, ref_clipscore

# Three images with one reference each. "a" stands in two of them, all else in one:
# idf(a) = ln 3 - ln 2, idf of any other n-gram = ln 3.
DOCUMENTS = (["a b"], ["a c"], ["d e"])
A, OTHER = math.log(3 / 2), math.log(3)


@pytest.fixture(scope="module")
def frequencies() -> Frequencies:
    return Frequencies.count(DOCUMENTS)


def test_document_frequencies_count_images_not_occurrences() -> None:
    found = Frequencies.count([["a a b", "a c"], ["a"], []])
    assert found.documents == 3
    assert found.counts == {("a",): 2}  # what one image has alone is left out: log max(1, df) = 0
    assert found.idf(("a",)) == pytest.approx(math.log(3) - math.log(2))
    assert found.idf(("b",)) == found.idf(("unheard",)) == pytest.approx(math.log(3))


def test_cider_and_cider_d_of_a_repeated_word(frequencies: Frequencies) -> None:
    # candidate "a b b", reference "a b"
    # 1-grams: candidate (a: A, b: 2 OTHER), reference (a: A, b: OTHER)
    norms = math.sqrt(A**2 + 4 * OTHER**2) * math.sqrt(A**2 + OTHER**2)
    plain = (A**2 + 2 * OTHER**2) / norms
    clipped = (A**2 + OTHER**2) / norms  # b counts as often as in the reference, once
    # 2-grams: candidate (a b, b b), reference (a b), all of weight OTHER: cosine 1 / sqrt 2
    # 3- and 4-grams: the reference has none: 0
    cider, cider_d = References(["a b"], frequencies).score("a b b")
    assert cider == pytest.approx(10 / 4 * (plain + 1 / math.sqrt(2)))
    # the length penalty: 2 bigrams against 1, sigma 6
    penalty = math.exp(-((2 - 1) ** 2) / (2 * 6**2))
    assert cider_d == pytest.approx(10 / 4 * penalty * (clipped + 1 / math.sqrt(2)))


def test_cider_is_averaged_over_references(frequencies: Frequencies) -> None:
    # candidate "d": equal to no reference, but one of the two holds it
    # 1-grams: candidate (d: OTHER), references (d, e: OTHER each) and (a: A, c: OTHER)
    cosine = 1 / math.sqrt(2)
    cider, cider_d = References(["d e", "a c"], frequencies).score("d")
    assert cider == pytest.approx(10 / 4 * cosine / 2)
    assert cider_d == pytest.approx(10 / 4 * cosine / 2 * math.exp(-1 / 72))  # 0 bigrams against 1


def test_an_equal_caption_gets_ten_only_if_it_has_all_orders(frequencies: Frequencies) -> None:
    assert References(["d e f g"], frequencies).score("d e f g") == pytest.approx((10, 10))
    assert References(["d e"], frequencies).score("d e") == pytest.approx((5, 5))


def test_words_that_every_image_has_weigh_nothing() -> None:
    everywhere = Frequencies.count([["a"], ["a"]])
    assert References(["a"], everywhere).score("a") == (0, 0)
    assert References(["a"], everywhere).score("") == (0, 0)


def test_bleu_counts() -> None:
    # "the" is clipped at one, as often as in any one reference; closest length is 3
    [counts] = bleu.statistics(["the the cat"], ["the cat sat", "a cat"])
    assert counts.tolist() == [2, 1, 0, 0, 3, 2, 1, 0, 3, 3]
    scores = bleu.from_statistics(counts)
    assert scores[0] == pytest.approx(2 / 3)
    assert scores[1] == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    assert scores[2] == pytest.approx(0, abs=1e-4)


def test_bleu_takes_the_shorter_of_two_equally_close_references() -> None:
    [counts] = bleu.statistics(["a b c"], ["a b", "a b c d"])
    assert counts[-1] == 2


def test_bleu_punishes_short_captions() -> None:
    [counts] = bleu.statistics(["cat"], ["a cat"])
    assert bleu.from_statistics(counts)[0] == pytest.approx(math.exp(1 - 2 / 1))


def test_corpus_bleu_is_not_the_mean_of_sentence_bleu() -> None:
    first = bleu.statistics(["the the cat"], ["the cat sat", "a cat"])
    second = bleu.statistics(["cat"], ["a cat"])
    total = bleu.from_statistics((first + second)[0])
    # 3 of 4 words are right; 4 words against 3 + 2
    assert total[0] == pytest.approx(3 / 4 * math.exp(1 - 5 / 4))
    mean = (bleu.from_statistics(first)[0, 0] + bleu.from_statistics(second)[0, 0]) / 2
    assert abs(total[0] - mean) > 0.02


def test_an_empty_caption_has_bleu_zero_without_a_warning() -> None:
    with np.errstate(all="raise", under="ignore"):
        scores = bleu.from_statistics(bleu.statistics([""], ["a cat"]))
    assert scores.tolist() == [[0, 0, 0, 0]]


def test_clip_scores() -> None:
    image = np.array([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    text = np.array([[3.0, 4.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert clip_score(image, text) == pytest.approx([0.6, -1.0, 1.0, math.nan], nan_ok=True)
    assert clipscore(image, text) == pytest.approx([1.5, 0.0, 2.5, math.nan], nan_ok=True)
    references = [np.array([[3.0, 4.0], [1.0, 0.0]]), text[:1], np.empty((0, 2)), text[:1]]
    found = ref_clipscore(image, text, references)
    assert found[0] == pytest.approx(2 * 1.5 * 1.0 / (1.5 + 1.0))  # the best cosine is 1
    assert found[1] == 0  # the caption's own part is 0
    assert np.isnan(found[2:]).all()  # no reference; no direction
