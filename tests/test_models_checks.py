"""What is refused when a model loads, in one line, and what happens when memory runs out."""

from __future__ import annotations

import gc
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lib.base import UserError
from lib.models import load_captioner, load_encoder, load_generator
from lib.models.local import LocalModel, pick_device, pick_dtype
from lib.presets import CaptionerSettings, Decoding, EncoderSettings, GeneratorSettings, load_preset
from tests import tiny_models as tiny

MINI = load_preset("mini")
NUCLEUS = Decoding(p=0.9, max_tokens=5)
SEEDS = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
LOADERS = {"captioner": (load_captioner, MINI.captioner), "generator": (load_generator, MINI.generator),
           "encoder": (load_encoder, MINI.encoder)}


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Garbage is collected at every shortage: what was imported need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in SEEDS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"blip": tiny.build_blip(root / "blip"), "clip": tiny.build_clip(root / "clip"),
            "sd": tiny.build_stable_diffusion(root / "sd")}


# --- tokenizer and weights that do not fit ------------------------------------------------------

def change(path, added=(), **values):
    """Set values of a JSON file, of a model's text part or a tokenizer's model; add words to a tokenizer."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data.get("text_config", data.get("model", data)).update(values)
    data.get("added_tokens", []).extend(added)
    path.write_text(json.dumps(data), encoding="utf-8")


def two_choices(folder):
    """A whole file of weights and shards of it."""
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


BEYOND = {"id": 700, "content": "red", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
          "special": False}
FAULTS = [
    ("generator", lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer without a vocabulary"),
    ("captioner", lambda f: (f / "tokenizer.json").unlink(), "tokenizer without a vocabulary"),
    ("encoder", lambda f: (f / "tokenizer.json").unlink(), "tokenizer without a vocabulary"),
    ("encoder", lambda f: change(f / "tokenizer.json", merges=[]), "never uses the words of its vocabulary"),
    ("encoder", lambda f: change(f / "tokenizer.json", added=[BEYOND]), "embeds 636 tokens, its tokenizer has 'red'"),
    ("encoder", lambda f: change(f / "config.json", eos_token_id=49407), "takes token 49407 for the end"),
    ("encoder", lambda f: change(f / "config.json", eos_token_id=2), "its tokenizer's is 1: set eos_token_id"),
    ("generator", lambda f: change(f / "text_encoder/config.json", eos_token_id=7), "takes token 7 for the end"),
    ("captioner", lambda f: change(f / "config.json", sep_token_id=102), "takes token 102 for the end"),
    ("captioner", lambda f: change(f / "config.json", bos_token_id=8), "starts captions with token 8"),
    ("encoder", two_choices, "holds both model.safetensors and the shards"),
    ("generator", lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer without a vocabulary"),
    ("encoder", lambda f: (f / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"), "cannot be loaded"),
    ("encoder", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "cannot be loaded .*model.safetensors"),
]


@pytest.mark.parametrize(("kind", "spoil", "said"), FAULTS)
def test_what_would_give_nonsense_is_refused_when_it_loads(tmp_path, kind, spoil, said):
    load, settings = LOADERS[kind]
    folder = tmp_path / "model"
    shutil.copytree(f"data/models/mini/{kind}", folder)
    spoil(folder)
    with pytest.raises(UserError, match=said) as caught:
        load(settings.model_copy(update={"id": str(folder)}), "cpu")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_tokenizer_that_states_no_length_reads_what_its_text_encoder_reads(tmp_path):
    shutil.copytree(MINI.generator.id, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "model_max_length"}))
    quick = MINI.generator.model_copy(update={"steps": 2})
    made = [load_generator(quick.model_copy(update=update), "cpu").generate(["a red ball", "a " * 40], [1, 1])
            for update in ({}, {"id": str(tmp_path / "model")})]
    assert np.array_equal(made[0].pixels, made[1].pixels)
    assert made[1].truncated.tolist() == [False, True]


def test_a_prompt_longer_than_the_captioner_reads_is_refused_when_it_loads():
    sender = MINI.captioner.sender.model_copy(update={"prompt": "a faithful image of " * 8})
    with pytest.raises(UserError, match="reads 32 tokens, a prompt of .* and max_tokens = 18 need"):
        load_captioner(MINI.captioner.model_copy(update={"sender": sender}), "cpu")
    captioner = load_captioner(MINI.captioner, "cpu")
    with pytest.raises(UserError, match="shorten them"):
        captioner.caption([Image.new("RGB", (8, 8))], [[1]], sender)


def test_steps_that_the_schedule_does_not_have(tmp_path):
    settings = GeneratorSettings(id=str(tiny.build_lcm(tmp_path / "lcm")), size=32, output_size=32, steps=60)
    with pytest.raises(UserError, match="steps = 60, its schedule has 50: use fewer"):
        load_generator(settings, "cpu")


def test_missing_models_are_one_line(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for load, settings, said in [
            (load_captioner, CaptionerSettings(id="data/models/hub/no-such"), "check the id in the preset"),
            (load_generator, GeneratorSettings(id="data/models/mini/no-such"), "restore it with git checkout"),
            (load_encoder, EncoderSettings(id="nobody/no-such"), "HF_HUB_OFFLINE is set; check the id"),
            (load_encoder, EncoderSettings(id="openai/clip-vit-large-patch14", revision="0" * 40), "about 1.7 GB"),
            (load_encoder, EncoderSettings(id=str(tmp_path / "no-such")), "check the id in the preset")]:
        with pytest.raises(UserError, match=said) as caught:
            load(settings, "cpu")
        assert "\n" not in str(caught.value) and "mini needs no download" in str(caught.value)


@pytest.mark.parametrize("adapter", ["blip", "blip2", "chat", "florence2", "git", "clip", "siglip", "dino", "sentence"])
def test_every_adapter_refuses_another_architecture(folders, adapter):
    kind = "encoder" if adapter in ("clip", "siglip", "dino", "sentence") else "captioner"
    (load, settings), other = LOADERS[kind], str(folders["blip" if kind == "encoder" else "clip"])
    with pytest.raises(UserError) as caught:
        load(settings.model_copy(update={"id": other, "adapter": adapter}), "cpu")
    assert other in str(caught.value) and "\n" not in str(caught.value)


def test_a_pipeline_that_takes_no_text_and_a_checkpoint_that_lacks_weights(folders, tmp_path):
    import diffusers
    from safetensors.torch import load_file, save_file

    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                                 down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(UserError, match="DDPMPipeline, which takes no prompt"):
        load_generator(GeneratorSettings(id=str(tmp_path / "ddpm")), "cpu")
    shutil.copytree(folders["clip"], tmp_path / "clip")
    weights = load_file(folders["clip"] / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        load_encoder(EncoderSettings(id=str(tmp_path / "clip")), "cpu")


# --- memory, device, number type ----------------------------------------------------------------

class SmallDevice:
    """A device on which a module's rows do not fit beyond a limit; counts the failures."""

    def __init__(self, module, limit):
        self.limit, self.failures = limit, 0
        module.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, module, args, kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if next(t.shape[0] for t in tensors if t.dim()) > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")


CAPTIONERS = {"blip, decoder": ("blip", tiny.build_blip, lambda m: m.text_decoder, 2),
              "blip, image encoder": ("blip", tiny.build_blip, lambda m: m.vision_model, 1),
              "blip2": ("blip2", tiny.build_blip2, lambda m: m.language_model, 6)}


@pytest.mark.parametrize("name", CAPTIONERS)
def test_captioner_goes_on_with_less(tmp_path, images, caplog, name):
    adapter, build, part, limit = CAPTIONERS[name]
    settings = CaptionerSettings(id=str(build(tmp_path / "model")), adapter=adapter, sender=NUCLEUS, batch_size=12)
    expected = load_captioner(settings, "cpu").caption(images, SEEDS)
    captioner = load_captioner(settings, "cpu")
    device = SmallDevice(part(captioner.model), limit)
    with caplog.at_level(logging.WARNING):
        captions = captioner.caption(images, SEEDS)
    assert [[c.text for c in row] for row in captions] == [[c.text for c in row] for row in expected]
    assert "out of memory with 12 rows, going on with 6" in caplog.text
    failures = device.failures
    assert captioner.caption(images, SEEDS) == captions and device.failures == failures > 0  # found out once


def test_generator_and_encoder_go_on_with_less(folders, images, caplog):
    settings = GeneratorSettings(id=str(folders["sd"]), steps=2, guidance=4.0, size=32, output_size=32, batch_size=8)
    texts = ["a cat", "an owl", "a cat", "a boat", "a tree"]
    expected = load_generator(settings, "cpu").generate(texts, range(5)).pixels
    generator = load_generator(settings, "cpu")
    device = SmallDevice(generator.pipeline.unet, 4)  # with and without the text: two images
    with caplog.at_level(logging.WARNING):
        made = generator.generate(texts, range(5)).pixels
    assert np.abs(made.astype(int) - expected.astype(int)).max() <= 1 and device.failures == 1
    assert "out of memory with 5 rows, going on with 2" in caplog.text
    settings = EncoderSettings(id=str(folders["clip"]), batch_size=4)
    plain, encoder = load_encoder(settings, "cpu"), load_encoder(settings, "cpu")
    device = SmallDevice(encoder.model.vision_model, 2)
    assert np.allclose(encoder.embed_images(images), plain.embed_images(images), atol=1e-5) and device.failures == 1


def test_a_device_that_holds_nothing_is_told_in_one_line(folders, images):
    captioner = load_captioner(CaptionerSettings(id=str(folders["blip"]), sender=NUCLEUS, batch_size=4), "cpu")
    SmallDevice(captioner.model.text_decoder, 0)
    with pytest.raises(UserError, match="out of memory even with one row .*2.00 GiB.* use a smaller model") as caught:
        captioner.caption(images, SEEDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("error", "said"), [
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling\nmore"), "CUBLAS.*out of memory, set .*COMPENDIUM_DEVICE"),
    (ValueError("`tiktoken` is required to read a `tiktoken` file."), "needs the package sentencepiece"),
    (KeyError("scale"), "cannot be loaded .KeyError: 'scale'.: check its files")])
def test_whatever_goes_wrong_while_loading_is_one_line(error, said):
    class Broken(LocalModel):
        def _load(self):
            raise error

    with pytest.raises(UserError, match=said) as caught:
        Broken(MINI.encoder, "cpu")
    assert "\n" not in str(caught.value)


def test_device_and_dtype(monkeypatch):
    assert pick_device("cpu").type == "cpu"
    assert pick_dtype("auto", torch.device("cpu"), True) is torch.float32
    assert pick_dtype("auto", torch.device("mps"), True) is torch.float16
    assert pick_dtype("bfloat16", torch.device("cpu"), False) is torch.bfloat16
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, n=native: n)
        card, better = torch.device("cuda"), torch.bfloat16 if native else torch.float16
        assert pick_dtype("auto", card, True) is better and pick_dtype("auto", card, False) is torch.float32
        assert pick_dtype("auto", card, True, may_overflow=False) is torch.float16
    with pytest.raises(UserError, match="abacus"):
        pick_device("abacus")
    absent = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
    monkeypatch.setenv("COMPENDIUM_DEVICE", absent)
    with pytest.raises(UserError, match=f"{absent}.* cannot be used by torch"):
        pick_device()
    monkeypatch.setenv("COMPENDIUM_DEVICE", " ")  # empty is unset
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
