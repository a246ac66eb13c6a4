"""Every model family that issue and README name, exercised on a tiny random checkpoint of its own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from lib.errors import UserError
from lib.models import load_captioner, load_encoder, load_generator
from lib.presets import REPO_ROOT, Decoding, GeneratorSpec, get_preset
from tests import tiny_families as tiny
from tests.tiny_models import build_stable_diffusion


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (48, 40), (64, 30)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


CAPTIONERS = [
    ("blip2", tiny.build_blip2, lambda m: m.vision_model),
    ("blip2", lambda f: tiny.build_blip2(f, "t5"), lambda m: m.vision_model),
    ("idefics3", tiny.build_chat, lambda m: m.model.vision_model),
    ("idefics3", lambda f: tiny.build_chat(f, "smolvlm"), lambda m: m.model.vision_model),
    ("florence2", tiny.build_florence2, lambda m: m.model.vision_tower),
    ("git", tiny.build_git, None),
]


def preset_of(name):
    """A family's preset file, which names a published model."""
    return get_preset(REPO_ROOT / "data" / "presets" / f"{name}.toml")


@pytest.mark.parametrize(("name", "build", "tower"), CAPTIONERS,
                         ids=["blip2-opt", "blip2-t5", "idefics3", "smolvlm", "florence2", "git"])
def test_captioner_family(tmp_path, images, name, build, tower):
    published = preset_of(name).captioner
    assert published.sender.p == 0.9 and published.receiver.deterministic
    prompt, short = published.sender.prompt, {"min_tokens": 0, "max_tokens": 6}
    sender = dataclasses.replace(published.sender, **short)
    spec = dataclasses.replace(published, id=str(build(tmp_path / "model")), sender=sender, batch_size=9)
    captioner = load_captioner(spec, "cpu")
    encoded = []
    if tower is not None:
        tower(captioner.model).register_forward_hook(
            lambda module, args, kwargs, output: encoded.append(_rows(args, kwargs)),
            with_kwargs=True)
    seeds = [[1, 2, 3], [4, 5, 6], [7, 8]]
    captions = captioner.caption(images, seeds)
    assert tower is None or sum(encoded) == 3  # each picture once, not once a caption
    assert [len(row) for row in captions] == [3, 3, 2]
    flat = [c for row in captions for c in row]
    assert len({c.text for c in flat}) > 3 and all(c.n_tokens <= 6 and c.logprob < 0 for c in flat)
    assert all(len(c.text.split()) <= c.n_tokens for c in flat), "a prompt is no part of its caption"
    small = load_captioner(dataclasses.replace(spec, batch_size=1), "cpu")
    again = small.caption(images[::-1], seeds[::-1])[::-1]
    for row, other in zip(captions, again, strict=True):
        assert [c.text for c in row] == [c.text for c in other]
        assert np.allclose([c.logprob for c in row], [c.logprob for c in other], atol=1e-3)
    for decoding in (Decoding("greedy", max_tokens=5, prompt=prompt),
                     Decoding("beam", beams=3, max_tokens=5, prompt=prompt)):
        rows = captioner.caption(images[:2], [[0, 1], [2]], decoding)
        assert rows[0][0] == rows[0][1] and len(rows[1]) == 1
        assert rows[0][0].n_tokens <= 5 and rows[0][0].logprob < 0


def _rows(args, kwargs) -> int:
    """How many pictures a vision tower was given."""
    return (args[0] if args else kwargs["pixel_values"]).shape[0]


GENERATORS = {
    "sdxl-turbo": tiny.build_sdxl, "lcm": tiny.build_lcm, "pixart": tiny.build_pixart,
    "sd3": tiny.build_sd3, "flux-schnell": tiny.build_flux, "sdxl-turbo, guided": tiny.build_sdxl,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_family(tmp_path, name):
    build, guided = GENERATORS[name], name.endswith(", guided")
    published = preset_of(name.removesuffix(", guided")).generator
    steps, guidance = (2, 5.0) if guided else (min(published.steps, 2), published.guidance)
    folder = build(tmp_path / "model")
    spec = dataclasses.replace(published, id=str(folder), steps=steps, guidance=guidance, size=32,
                               output_size=32, batch_size=3, variant=None)
    generator = load_generator(spec, "cpu")
    towers = [getattr(generator.pipeline, name, None)
              for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    counts = [0] * 3
    for i, tower in enumerate(towers):
        if tower is not None:
            tower.register_forward_hook(_counter(counts, i))
    texts, seeds = ["a red owl", "a cat", "a red owl", "a boat"], [1, 2, 3, 4]
    made = generator.generate(texts, seeds).pixels
    assert made.shape == (4, 32, 32, 3) and made.std() > 1
    assert max(counts) <= 3 + 2  # distinct texts once, the empty prompt at most twice
    alone = np.concatenate([generator.generate([t], [s]).pixels
                            for t, s in zip(texts, seeds, strict=True)])
    assert np.abs(made.astype(int) - alone.astype(int)).max() <= 2
    assert (made[0] != made[2]).any()
    plain = generator.pipeline(
        "a red owl", num_inference_steps=steps, guidance_scale=guidance, height=32, width=32,
        generator=_cpu_generator(1), **({"use_resolution_binning": False}
                                        if build is tiny.build_pixart else {})).images[0]
    assert np.abs(made[0].astype(int) - np.asarray(plain).astype(int)).max() <= 2
    scheduler = generator.pipeline.scheduler
    del scheduler.step, scheduler.set_timesteps  # as diffusers has it: the same pixels
    assert np.array_equal(generator.generate(texts, seeds).pixels, made)


def test_every_preset_file_is_tried():
    tried = {*(name for name, *_ in CAPTIONERS), *GENERATORS, "lcm-lora", "siglip", "dinov2", "sentence", "remote"}
    files = sorted((REPO_ROOT / "data" / "presets").glob("*.toml"))
    assert {file.stem for file in files} == tried - {"sdxl-turbo, guided"}
    for file in files:
        preset = get_preset(file)
        assert preset.name == file.stem and preset.generator.output_size == 256
        checked = preset.generator.id.startswith("stable-diffusion-v1-5/")  # the others have no checker
        assert preset.generator.safety_checker == checked


def test_options_are_arguments_of_the_pipeline(tmp_path):
    folder = tiny.build_flux(tmp_path / "flux")
    spec = GeneratorSpec(str(folder), steps=1, guidance=0.0, size=32, output_size=32,
                         options={"max_sequence_length": 5})
    generator, texts = load_generator(spec, "cpu"), ["a red owl on a boat", "a red owl on a tree"]
    lengths = []
    generator.pipeline.text_encoder_2.register_forward_hook(
        lambda module, args, output: lengths.append(output[0].shape[1]))
    generator.generate(texts, [1, 1])
    assert lengths == [5]
    assert generator._limit("tokenizer_2", generator.pipeline.tokenizer_2) == 5
    wrong = dataclasses.replace(spec, options={"max_tokens": 5})
    with pytest.raises(UserError, match="options has 'max_tokens', which is no argument of a FluxPipeline"):
        load_generator(wrong, "cpu")
    for name, remedy in (("num_inference_steps", "set steps in its place"), ("prompt", "the game sets it")):
        with pytest.raises(UserError, match=f"options cannot have '{name}': {remedy}"):
            load_generator(dataclasses.replace(spec, options={name: 5}), "cpu")


def _counter(counts, i):
    """A hook that counts a text tower's rows."""
    def hook(module, args, output):
        counts[i] += output[0].shape[0]

    return hook


def _cpu_generator(seed):
    """A torch generator."""
    return torch.Generator("cpu").manual_seed(seed)


def test_lora_is_fused(tmp_path):
    peft = pytest.importorskip("peft")
    import diffusers
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    folder = build_stable_diffusion(tmp_path / "sd")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights="gaussian",
                                              target_modules=["to_q", "to_v"]))
    layers = get_peft_model_state_dict(pipeline.unet)
    layers = {name: value + 0.5 for name, value in layers.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora", unet_lora_layers=convert_state_dict_to_diffusers(layers))
    arguments = {"steps": 2, "guidance": 1.0, "size": 32, "output_size": 32,
                 "scheduler": "LCMScheduler"}
    published = preset_of("lcm-lora").generator
    assert all(getattr(published, name) == arguments[name] for name in ("guidance", "scheduler"))
    base = load_generator(GeneratorSpec(str(folder), **arguments), "cpu")
    tuned = load_generator(GeneratorSpec(str(folder), lora=str(tmp_path / "lora"), **arguments), "cpu")
    assert (base.generate(["a cat"], [0]).pixels != tuned.generate(["a cat"], [0]).pixels).any()


def test_weights_of_a_variant(tmp_path):
    import diffusers

    folder = build_stable_diffusion(tmp_path / "sd")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    spec = GeneratorSpec(str(tmp_path / "half"), variant="fp16", steps=1, guidance=0.0, size=32,
                         output_size=32)
    assert load_generator(spec, "cpu").generate(["a cat"], [0]).pixels.std() > 1
    plain = GeneratorSpec(str(tmp_path / "half"), steps=1, guidance=0.0, size=32, output_size=32)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_generator(plain, "cpu")


def test_safety_checker_flags(tmp_path):
    folder = tiny.build_checked_stable_diffusion(tmp_path / "checked")
    arguments = {"steps": 1, "guidance": 0.0, "size": 32, "output_size": 32}
    on = load_generator(GeneratorSpec(str(folder), safety_checker=True, **arguments), "cpu")
    made = on.generate(["a cat", "an owl"], [0, 1])
    assert made.flagged.all() and made.pixels.max() == 0
    off = load_generator(GeneratorSpec(str(folder), **arguments), "cpu")
    assert not off.generate(["a cat"], [0]).flagged.any() and off.pipeline.safety_checker is None


def test_siglip(tmp_path, images):
    encoder = load_encoder(dataclasses.replace(preset_of("siglip").encoder, id=str(tiny.build_siglip(tmp_path)),
                                               batch_size=2), "cpu")
    pictures, texts = encoder.embed_images(images), encoder.embed_texts(["a cat", "an owl on the sea"])
    assert pictures.shape == (3, 32) and texts.shape == (2, 32)
    assert np.allclose(encoder.embed_images(images[2:])[0], pictures[2], atol=1e-5)
    assert np.allclose(encoder.embed_texts(["an owl on the sea"])[0], texts[1], atol=1e-5)


def test_dino_embeds_images_only(tmp_path, images):
    encoder = load_encoder(dataclasses.replace(preset_of("dinov2").judge, id=str(tiny.build_dinov2(tmp_path))), "cpu")
    assert encoder.embed_images(images).shape == (3, 32)
    with pytest.raises(UserError, match="images only"):
        encoder.embed_texts(["a cat"])


@pytest.mark.parametrize("class_token", [False, True])
def test_sentence_encoder_embeds_texts_only(tmp_path, images, class_token):
    encoder = load_encoder(dataclasses.replace(
        preset_of("sentence").encoder, id=str(tiny.build_sentence(tmp_path, class_token))), "cpu")
    texts = encoder.embed_texts(["a cat", "two red owls on the beach and a boat"])
    assert texts.shape == (2, 32)
    assert np.allclose(encoder.embed_texts(["a cat"])[0], texts[0], atol=1e-5)
    with pytest.raises(UserError, match="texts only"):
        encoder.embed_images(images)
