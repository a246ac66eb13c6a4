"""Out of memory on the device: every kind of model halves its batch, says so, and gives the same."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from lib.errors import UserError
from lib.models import load_captioner, load_encoder, load_generator
from lib.presets import CaptionerSpec, Decoding, EncoderSpec, GeneratorSpec
from lib.weights import loading
from tests import tiny_families as tiny
from tests.tiny_models import build_blip, build_clip, build_stable_diffusion

pytestmark = pytest.mark.usefixtures("frozen")  # garbage is collected at every shortage
NUCLEUS = Decoding("nucleus", p=0.9, max_tokens=5)
SEEDS = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in SEEDS]


class SmallDevice:
    """A device on which a module's rows do not fit beyond a limit; counts the failures."""

    def __init__(self, module: torch.nn.Module, limit: int) -> None:
        self.limit, self.failures = limit, 0
        module.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, module, args, kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if next(t.shape[0] for t in tensors if t.dim()) > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")


CAPTIONERS = {
    "blip, decoder": ("blip", build_blip, lambda m: m.text_decoder, 2),
    "blip, image encoder": ("blip", build_blip, lambda m: m.vision_model, 1),
    "blip2": ("blip2", tiny.build_blip2, lambda m: m.language_model, 6),
    "chat": ("chat", tiny.build_chat, lambda m: m.model.text_model, 3),
    "florence2, one row": ("florence2", tiny.build_florence2, lambda m: m, 1),
    "git, two rows": ("git", tiny.build_git, lambda m: m, 2),
}


@pytest.mark.parametrize("name", CAPTIONERS)
def test_captioner_goes_on_with_less(tmp_path, images, caplog, name):
    adapter, build, part, limit = CAPTIONERS[name]
    spec = CaptionerSpec(str(build(tmp_path / "model")), adapter=adapter, sender=NUCLEUS, batch_size=12)
    expected = load_captioner(spec, "cpu").caption(images, SEEDS)
    captioner = load_captioner(spec, "cpu")
    device = SmallDevice(part(captioner.model), limit)
    with caplog.at_level(logging.WARNING):
        captions = captioner.caption(images, SEEDS)
    assert [[c.text for c in row] for row in captions] == [[c.text for c in row] for row in expected]
    assert device.failures > 0 and "out of memory with" in caplog.text
    assert f"captioner {spec.id}" in caplog.text and "going on with" in caplog.text
    failures = device.failures
    assert captioner.caption(images, SEEDS) == captions
    assert device.failures == failures  # found out once, not at every call


def test_generator_goes_on_with_less(tmp_path, caplog):
    spec = GeneratorSpec(str(build_stable_diffusion(tmp_path / "sd")), steps=2, guidance=4.0, size=32,
                         output_size=32, batch_size=8, scheduler="DPMSolverMultistepScheduler")
    texts = ["a cat", "an owl", "a cat", "a boat", "a tree"]
    expected = load_generator(spec, "cpu").generate(texts, range(5)).pixels
    generator = load_generator(spec, "cpu")
    device = SmallDevice(generator.pipeline.unet, 4)  # with and without the text: two pictures
    with caplog.at_level(logging.WARNING):
        made = generator.generate(texts, range(5)).pixels
    assert np.abs(made.astype(int) - expected.astype(int)).max() <= 1
    assert device.failures == 1 and "out of memory with 5 images, going on with 2" in caplog.text
    generator.generate(texts, range(5))
    assert device.failures == 1


def test_encoder_goes_on_with_less(tmp_path, images, caplog):
    spec = EncoderSpec(str(build_clip(tmp_path / "clip")), batch_size=4)
    plain, encoder = load_encoder(spec, "cpu"), load_encoder(spec, "cpu")
    pictures = SmallDevice(encoder.model.vision_model, 2)
    texts = SmallDevice(encoder.model.text_model, 1)
    with caplog.at_level(logging.WARNING):
        assert np.allclose(encoder.embed_images(images), plain.embed_images(images), atol=1e-5)
        assert np.allclose(encoder.embed_texts(["a cat", "an owl"]), plain.embed_texts(["a cat", "an owl"]),
                           atol=1e-5)
    assert (pictures.failures, texts.failures) == (1, 1)
    assert "out of memory with 4 inputs, going on with 2" in caplog.text


@pytest.mark.parametrize("adapter", ["blip", "git"])
def test_a_device_that_holds_nothing_is_told_in_one_line(tmp_path, images, adapter):
    build = {"blip": build_blip, "git": tiny.build_git}[adapter]
    captioner = load_captioner(CaptionerSpec(str(build(tmp_path / "model")), adapter=adapter,
                                             sender=NUCLEUS, batch_size=4), "cpu")
    SmallDevice(captioner.model.text_decoder if adapter == "blip" else captioner.model, 0)
    with pytest.raises(UserError) as caught:
        captioner.caption(images, SEEDS)
    message = str(caught.value)
    assert message.count("out of memory even with one") == 1 and "use a smaller model" in message
    assert "Tried to allocate 2.00 GiB" in message and "\n" not in message


def test_a_model_that_does_not_fit_says_so_and_not_that_its_files_are_wrong():
    for words in ("CUDA out of memory. Tried to allocate 2.00 GiB", "CUBLAS_STATUS_ALLOC_FAILED when calling",
                  "Invalid buffer size: 12.00 GiB"):
        with pytest.raises(UserError, match="does not fit into the device's memory.*COMPENDIUM_DEVICE") as caught, \
                loading("some/model"):
            raise RuntimeError(f"{words}\nmore")
        assert "\n" not in str(caught.value) and words in str(caught.value)


def test_a_tokenizer_that_needs_another_package_names_it():
    with pytest.raises(UserError, match="only the package sentencepiece reads: install it with"), \
            loading("some/model"):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with ...")
