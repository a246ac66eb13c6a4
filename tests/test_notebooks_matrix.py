"""Notebook 12 with models whose effects are planted, and the two captioners that it compares."""

import numpy as np
import pytest
from test_notebooks_cases import COCO, claims_of, notebook, own_folder, own_texts, text_of

from lib.base import stable_seed
from lib.data import load_dataset
from lib.models import Caption, load_captioner
from lib.presets import load_preset
from lib.ranking import interval

__all__ = ["notebook"]  # the fixture
SIZE = {"DATASET": COCO, "N_SOURCES": 24, "N_SOURCES_MATRIX": 24}


class Blind:
    """A captioner that never looks, a generator that draws a brightness, an encoder whose cosine is the brightness.

    It depends on the captioner (red or green), the generator (its steps) and noise; pair: more for green and two steps.
    """

    def __init__(self, settings, pair=0):
        self.settings, self.pair = settings, pair

    def caption(self, images, seeds, decoding):
        own, things = "green" if self.settings.adapter == "git" else "red", ("owl", "cat", "car", "duck")
        return [[Caption(f"a {own} {things[s % 4]} in the snow {s % 999}", -1.0, 6) for s in row] for row in seeds]

    def generate(self, texts, seeds):
        steps, more = self.settings.steps, 20 + self.pair * (self.settings.steps == 2)
        level = [100 + 4 * steps + more * ("green" in text) + stable_seed(text, steps) % 40 for text in texts]
        return np.ones((len(texts), 4, 4, 3), np.uint8) * np.array(level, np.uint8)[:, None, None, None]

    def embed_images(self, images):
        x = np.array([np.asarray(i)[0, 0, 0] / 255 if isinstance(images, np.ndarray) else 1.0 for i in images])
        return np.stack([x, np.sqrt(1 - x**2)], axis=1)


@pytest.fixture
def matrix(notebook, monkeypatch):
    def run(pair=0, **parameters):
        for part in ("captioner", "generator", "encoder"):
            monkeypatch.setattr(f"lib.models.load_{part}", lambda settings: Blind(settings, pair))
        return notebook("12", **parameters)
    return run


def test_a_captioner_that_ignores_the_image_has_no_rho_and_no_gain(matrix):
    names = matrix(**SIZE)
    for measure in ("rho", "gain"):
        found = interval(names["values"][measure].groupby(["dataset", "item"]).mean())
        assert found["low"] < 0 < found["high"]
    assert claims_of(names, "understand each other")["verdict"].tolist().count("supported") <= 1  # of six, by chance
    assert names["order"] == {"captioner": ["mini-git", "mini"], "generator": ["mini-teacher", "mini", "mini-weak"]}


@pytest.mark.parametrize(("pair", "verdict"), [(0, "inconclusive"), (40, "supported")])
def test_additive_effects_are_no_interaction(matrix, pair, verdict):
    names = matrix(pair, **SIZE, SCORE="sem_f")
    assert claims_of(names, "pair changes similarity")["verdict"].tolist() == [verdict]
    assert (names["split"].query("measure == 'similarity' and part in ('captioner', 'generator')")["low"] > 0).all()


@pytest.mark.parametrize("make", [own_folder, own_texts])
def test_own_data_say_what_is_missing(matrix, tmp_path, capsys, make):
    dataset, reason = make(tmp_path)
    told = text_of(matrix(DATASET=dataset)) + capsys.readouterr().out
    assert all(words in told for words in (reason, "no caption has a CIDEr", "no true scenes"))


def test_both_captioners_name_what_they_see():
    item = load_dataset(COCO).items[0]
    for settings in (load_preset(name).captioner for name in ("mini", "mini-git")):
        said = load_captioner(settings, "cpu").caption([item.image()], [[0]], settings.receiver)[0][0].text
        assert item.scene["entities"][0]["category"] in said
