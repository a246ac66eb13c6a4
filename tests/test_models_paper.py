"""The ``paper`` preset through its own loaders: its architectures a sixteenth as wide.

The same at full size: ``python tests/slow/full_size.py`` (by hand; minutes and 15 GB of memory).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from lib.models import load_captioner, load_encoder, load_generator
from lib.presets import get_preset
from tests.full_size import build_all


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return get_preset(build_all(tmp_path_factory.mktemp("paper"), width=16))


def test_paper_preset_end_to_end(preset):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8))
    captioner = load_captioner(preset.captioner, "cpu")
    captions = captioner.caption([photo], [[1, 2]])[0]
    assert all(10 <= c.n_tokens <= 30 for c in captions)
    assert captioner.caption([photo], [[2]])[0][0].text == captions[1].text
    generator = load_generator(preset.generator, "cpu")
    made = generator.generate([c.text for c in captions], [3, 4])
    assert made.pixels.shape == (2, 64, 64, 3) and not made.flagged.any()
    # 30 word pieces of a made-up vocabulary are many more letters: the prompt is cut, and told
    assert made.truncated.all()
    assert not generator.generate(["a red cat"], [1]).truncated.any()
    for spec, width in ((preset.encoder, 48), (preset.judge, 32)):
        encoder = load_encoder(spec, "cpu")
        assert encoder.embed_images([photo, *made.pixels]).shape == (3, width)
        assert encoder.embed_texts([c.text for c in captions]).shape == (2, width)


def test_unprojected_features_of_the_official_preset(preset):
    spec = dataclasses.replace(preset.judge, projected=False)
    encoder = load_encoder(spec, "cpu")
    assert encoder.embed_images([Image.new("RGB", (30, 30))]).shape == (1, 768 // 16)
    assert encoder.embed_texts(["a cat"]).shape == (1, 512 // 16)
