"""The paper's three families on tiny random checkpoints: what a caption, an image and an embedding are."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from lib.base import UserError
from lib.models import Images, describe, load_captioner, load_encoder, load_generator, load_models, unknown_words
from lib.presets import CaptionerSettings, Decoding, GeneratorSettings, load_preset
from tests.full_size import build_all
from tests.tiny_models import build_blip, build_stable_diffusion

SMALL = {"size": 32, "output_size": 32, "steps": 1, "guidance": 0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"blip": build_blip(root / "blip"), "sd": build_stable_diffusion(root / "sd")}


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.fixture(scope="module")
def captioner(folders):
    return load_captioner(CaptionerSettings(id=str(folders["blip"]), sender=Decoding(max_tokens=8), batch_size=4), "cpu")


# --- captioner ----------------------------------------------------------------------------------

def test_logprob_is_that_of_a_teacher_forced_pass(captioner, images):
    tokenizer, model = captioner.processor.tokenizer, captioner.model
    read = {caption: tokenizer(caption.text, add_special_tokens=False).input_ids
            for caption in captioner.caption(images[:1], [list(range(7, 17))])[0]}
    # Random weights may draw special tokens, which the text leaves out: then counts differ.
    caption, words = next(pair for pair in read.items() if len(pair[1]) == pair[0].n_tokens)
    ended = caption.n_tokens < 8
    ids = torch.tensor([[5, *words, *([3] if ended else [])]])
    pixels = captioner.processor.image_processor(images[:1], return_tensors="pt").pixel_values
    logits = model(pixel_values=pixels, input_ids=ids).logits
    logprobs = torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None]).sum()
    assert caption.logprob == pytest.approx(logprobs.item(), abs=1e-3)


def test_greedy_is_the_models_own_greedy(captioner, images):
    rows = captioner.caption(images[:2], [[1, 2], [3]], Decoding(strategy="greedy", max_tokens=8))
    assert rows[0][0] == rows[0][1] and len(rows[1]) == 1
    pixels = captioner.processor.image_processor(images[:2], return_tensors="pt").pixel_values
    ids = captioner.model.generate(pixel_values=pixels, max_new_tokens=8, do_sample=False)
    texts = captioner.processor.batch_decode(ids, skip_special_tokens=True)
    assert [row[0].text for row in rows] == [" ".join(text.split()) for text in texts]


def test_beam_top_k_lengths_and_prompt(captioner, images):
    beam = captioner.caption(images, [[0]] * 5, Decoding(strategy="beam", beams=4, max_tokens=6))
    greedy = captioner.caption(images, [[0]] * 5, Decoding(strategy="greedy", max_tokens=6))
    mean = [np.mean([row[0].logprob / (row[0].n_tokens + 1) for row in rows]) for rows in (beam, greedy)]
    assert mean[0] >= mean[1] - 0.05 and all(row[0].n_tokens <= 6 for row in beam)
    decoding = Decoding(strategy="top_k", k=5, min_tokens=4, max_tokens=6, repetition_penalty=1.3,
                        prompt="a picture of")
    seeds = [[1, 2, 3, 4], [5, 6, 7, 8]]
    captions = captioner.caption(images[:2], seeds, decoding)
    assert all(4 <= c.n_tokens <= 6 for row in captions for c in row)
    assert not any(c.text.startswith("a picture of") for row in captions for c in row)
    assert captions != captioner.caption(images[:2], seeds, decoding.model_copy(update={"prompt": ""}))


# --- generator ----------------------------------------------------------------------------------

def test_long_prompts_are_flagged_and_logged_once_and_images_are_resized(folders, caplog):
    generator = load_generator(GeneratorSettings(id=str(folders["sd"]), **SMALL | {"output_size": 20}), "cpu")
    with caplog.at_level(logging.WARNING):
        made = generator.generate(["a cat", "a red cat on the big big sea", "a red cat on the big big sea"], [0, 1, 2])
    assert made.pixels.shape == (3, 20, 20, 3) and made.truncated.tolist() == [False, True, True]
    assert caplog.text.count("cut: a red cat") == 1


def test_overflow_in_float16_is_decoded_in_float32_and_other_overflow_is_an_error(folders, caplog):
    settings = GeneratorSettings(id=str(folders["sd"]), **SMALL)
    made = {}
    for dtype in ("float32", "float16"):
        generator = load_generator(settings.model_copy(update={"dtype": dtype}), "cpu")
        vae = generator.pipeline.vae
        vae.decoder.conv_in.weight.data *= 40_000  # what follows normalises it
        vae.decoder.conv_in.bias.data.zero_()
        made[dtype] = generator.generate(["a cat", "an owl"], [1, 2]).pixels.astype(int)
        assert vae.dtype == generator.dtype == getattr(torch, dtype)
    assert caplog.text.count("overflowed in float16: this batch is decoded in float32") == 1
    assert np.abs(made["float16"] - made["float32"]).max() <= 2 < made["float32"].std()
    generator.pipeline.vae.post_quant_conv.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match='not finite: set dtype = "float32"'):
        generator.generate(["a cat"], [0])


def test_what_compile_compiles(folders, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    load_generator(GeneratorSettings(id=str(folders["sd"]), compile=True, **SMALL), "cpu")
    assert compiled == ["UNet2DConditionModel", "Decoder"]


# --- presets and adapters -----------------------------------------------------------------------

class Squares:
    """A generator of one's own: grey squares, from any options."""

    def __init__(self, settings, device=None):
        self.grey = settings.options["grey"]

    def generate(self, texts, seeds):
        return np.full((len(texts), 4, 4, 3), self.grey, np.uint8)


def test_own_adapter_with_options_and_plain_pixels():
    settings = GeneratorSettings(id="mine", adapter="tests.test_models:Squares",
                                 options={"grey": 7, "eos_token": "x", "sort_key": "y"})
    generator = load_generator(settings)
    made = Images.of(generator.generate(["a", "b"], [1, 2]))
    assert made.pixels.max() == 7 and made.flagged.tolist() == [False, False] and describe(generator) == {}
    assert Images.of(made) is made
    with pytest.raises(TypeError, match="uint8"):
        Images.of(np.zeros((1, 4, 4, 3)))
    with pytest.raises(UserError, match="unknown generator adapter 'brush'"):
        load_generator(settings.model_copy(update={"adapter": "brush"}))
    with pytest.raises(UserError, match="cannot be imported"):
        load_generator(settings.model_copy(update={"adapter": "nowhere:Squares"}))


def test_mini_names_words_that_it_does_not_know():
    preset = load_preset("mini")
    models = load_models(preset, "cpu")
    assert json.loads(json.dumps(describe(models.encoder)))["dtype"] == "float32"
    for model in (models.captioner, models.generator, models.encoder):
        assert unknown_words(model, "A red ball near the zebra's two trees, 象") == ["zebra", "象"]
        assert unknown_words(model, "a small black bus in the snow") == []
    captions = models.captioner.caption([Image.new("RGB", (64, 64), "red")], [[1, 2]])
    assert all(6 <= c.n_tokens <= 18 for c in captions[0])
    assert unknown_words(object(), "anything") == []


def test_paper_preset_end_to_end_at_a_sixteenth_of_its_width(tmp_path):
    """The same at full size: python -m tests.slow.full_size (by hand)."""
    preset = load_preset(build_all(tmp_path, width=16))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    models = load_models(preset, "cpu")
    captions = models.captioner.caption([photo], [[1, 2]])[0]
    assert all(10 <= c.n_tokens <= 30 for c in captions)
    made = models.generator.generate([c.text for c in captions], [3, 4])
    assert made.pixels.shape == (2, 64, 64, 3) and not made.flagged.any()
    # 30 word pieces of a made-up vocabulary are many more letters: the prompt is cut, and told
    assert made.truncated.all() and not models.generator.generate(["a red cat"], [1]).truncated.any()
    for encoder, width in ((models.encoder, 48), (models.second_encoder, 32)):
        assert encoder.embed_images([photo, *made.pixels]).shape == (3, width)
        assert encoder.embed_texts([c.text for c in captions]).shape == (2, width)
    plain = load_encoder(preset.second_encoder.model_copy(update={"projected": False}), "cpu")  # as in ``official``
    assert plain.embed_images([photo]).shape == (1, 48) and plain.embed_texts(["a cat"]).shape == (1, 32)
