"""Notebook 13 with stand-ins of known loss: a lossless pair, a generator that loses colours, chains made elsewhere."""

import random
import zlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_notebooks_cases import COCO, claims_of, notebook

from lib.models import Caption, Images
from lib.picturebook.annotate import describe_fully
from lib.picturebook.lexicon import COLOUR_WORDS
from lib.picturebook.scenes import Scene
from lib.roundtrip import open_runs

__all__ = ["notebook"]  # the fixture
SIZE = {"DATASET": COCO, "N_SOURCES": 24, "N_CHAINS": 24}


class Book:
    """All models in one: its images carry their caption in the pixels, without the words that are lost."""

    def __init__(self, *lost):
        self.lost, self.seen = lost, {}
        for item in open_runs("mini", COCO, 24).runs[COCO, "image"].dataset.items:
            scene = replace(Scene.from_dict(item.scene), planted=None)
            self.seen[item.image().tobytes()] = describe_fully(scene, "evaluation", random.Random(0))

    def read(self, image):
        pixels = np.asarray(image).tobytes()
        return self.seen.get(pixels) or pixels.rstrip(b"\0").decode()

    def caption(self, images, seeds, decoding):
        return [[Caption(self.read(image), 0.0, 9)] for image in images]

    def generate(self, texts, seeds):
        kept = [" ".join(word for word in text.split() if word not in self.lost) for text in texts]
        return Images.of(np.stack([np.frombuffer(t.encode().ljust(192, b"\0"), np.uint8).reshape(8, 8, 3) for t in kept]))

    def embed_texts(self, texts):
        return np.array([np.bincount([zlib.crc32(w.encode()) % 99 for w in text.split()], minlength=99) for text in texts])

    def embed_images(self, images):
        return self.embed_texts(map(self.read, images))


@pytest.fixture
def telephone(notebook, monkeypatch):
    def run(*lost, **parameters):
        for name in ("load_captioner", "load_generator", "load_encoder"):
            monkeypatch.setattr(f"lib.models.{name}", lambda settings: Book(*lost))
        return notebook("13", **SIZE | parameters)
    return run


def test_a_lossless_pair_survives_twenty_rounds(telephone):
    names = telephone()
    assert names["similar"]["own start"].min() == pytest.approx(1)
    assert len(names["curves"]) == 10 and all((left == 1).all(axis=None) for left in names["curves"].values())
    assert names["lives"]["half-life"].str.startswith("> 20").all() and (names["ends"]["fixed"] == 1).all()
    assert set(claims_of(names, "still more similar to its own start")["verdict"]) == {"supported"}


def test_lost_colours_show_in_their_curve_alone(telephone):
    names = telephone(*sum(COLOUR_WORDS.values(), ()), ROUNDS=3)
    curves = {kind: names["curves"]["images-first", kind].mean().tolist() for kind in names["FACTS"]}
    assert curves.pop("colour") == [1, 1, 0, 0]  # the first caption is of the true image
    assert set(map(tuple, curves.values())) == {(1, 1, 1, 1)}
    assert set(claims_of(names, "objects survive longer than colours")["verdict"]) == {"supported"}


def test_chains_made_elsewhere_are_scored_as_far_as_they_are_whole(telephone, tmp_path, capsys):
    for k, n in ((0, 3), (2, 3), (4, 2)):  # captions only, and one chain lacks its end
        said = {"filename": ["a.png", "b.png", "c.png"], "caption": ["a cat on the beach", "two red balls", "a blue bus"]}
        pd.DataFrame(said)[:n].to_csv(tmp_path / f"gen-{k}.csv", index=False)
    names, told = telephone(CHAINS=str(tmp_path)), capsys.readouterr().out
    assert "2 chains of 2 round trips; 1 incomplete" in told and "no true scenes" in told
    assert names["similar"]["own start"].tolist() == pytest.approx([1] * 6)
