"""Every model family of ``data/presets``, exercised on a tiny random checkpoint of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lib.base import UserError
from lib.models import load_captioner, load_encoder, load_generator, weights_fingerprint
from lib.presets import PRESETS, Decoding, GeneratorSettings, load_preset
from tests import tiny_models as tiny

SMALL = {"steps": 1, "guidance": 0.0, "size": 32, "output_size": 32}


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in [(32, 32), (48, 40), (64, 30)]]


CAPTIONERS = {
    "paper": (tiny.build_blip, lambda m: m.vision_model),
    "blip2": (tiny.build_blip2, lambda m: m.vision_model),
    "blip2, T5": (lambda folder: tiny.build_blip2(folder, "t5"), lambda m: m.vision_model),
    "idefics3": (tiny.build_chat, lambda m: m.model.vision_model),
    "florence2": (tiny.build_florence2, lambda m: m.model.vision_tower),
    "git": (tiny.build_git, None)}


@pytest.mark.parametrize("name", CAPTIONERS)
def test_captioner_family(tmp_path, images, name):
    build, tower = CAPTIONERS[name]
    published = load_preset(name.split(",")[0]).captioner
    assert published.sender.p == 0.9 and published.receiver.deterministic
    sender = published.sender.model_copy(update={"min_tokens": 0, "max_tokens": 6})
    settings = published.model_copy(update={"id": str(build(tmp_path / "model")), "sender": sender, "batch_size": 9})
    captioner, encoded = load_captioner(settings, "cpu"), []
    if tower is not None:
        tower(captioner.model).register_forward_hook(lambda module, args, kwargs, output: encoded.append(
            (args[0] if args else kwargs["pixel_values"]).shape[0]), with_kwargs=True)
    seeds = [[1, 2, 3], [4, 5, 6], [7, 8]]
    captions = captioner.caption(images, seeds)
    assert tower is None or sum(encoded) == 3  # each image once, not once a caption
    assert [len(row) for row in captions] == [3, 3, 2]
    flat = [c for row in captions for c in row]
    assert len({c.text for c in flat}) > 3 and all(c.n_tokens <= 6 and c.logprob < 0 for c in flat)
    assert all(len(c.text.split()) <= c.n_tokens for c in flat), "a prompt is no part of its caption"
    small = load_captioner(settings.model_copy(update={"batch_size": 1}), "cpu")
    again = small.caption([np.asarray(image) for image in images[::-1]], seeds[::-1])[::-1]  # an array is an image too
    for row, other in zip(captions, again, strict=True):
        assert [(c.text, c.n_tokens) for c in row] == [(c.text, c.n_tokens) for c in other]
        assert np.allclose([c.logprob for c in row], [c.logprob for c in other], atol=1e-3)
    for strategy in ("greedy", "beam"):
        decoding = Decoding(strategy=strategy, beams=3, max_tokens=5, prompt=sender.prompt)
        rows = captioner.caption(images, [[0, 1], [], [2]], decoding)
        assert rows[0][0] == rows[0][1] and [len(row) for row in rows] == [2, 0, 1]
        assert rows[0][0].n_tokens <= 5 and rows[0][0].logprob < 0


GENERATORS = {"paper": tiny.build_stable_diffusion, "sdxl-turbo": tiny.build_sdxl, "lcm": tiny.build_lcm,
              "pixart": tiny.build_pixart, "sd3": tiny.build_sd3, "flux-schnell": tiny.build_flux,
              "sdxl-turbo, guided": tiny.build_sdxl}


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_family(tmp_path, name):
    published = load_preset(name.split(",")[0]).generator
    guidance = 5.0 if name.endswith("guided") else published.guidance
    steps = 2 if name.endswith("guided") else min(published.steps, 2)
    settings = published.model_copy(update=SMALL | {
        "id": str(GENERATORS[name](tmp_path / "model")), "steps": steps, "guidance": guidance, "batch_size": 3,
        "variant": None, "revision": None, "safety_checker": False})
    generator = load_generator(settings, "cpu")
    texts, seeds = ["a red owl", "a cat", "a red owl", "a boat"], [1, 2, 3, 4]
    made = generator.generate(texts, seeds).pixels
    assert made.shape == (4, 32, 32, 3) and made.dtype == np.uint8 and made.std() > 1
    assert (made[0] != made[2]).any() and (generator.generate(["a cat"], [1]).pixels[0] != made[0]).any()
    alone = np.concatenate([generator.generate([t], [s]).pixels for t, s in zip(texts, seeds, strict=True)])
    assert np.abs(made.astype(int) - alone.astype(int)).max() <= 2
    plain = generator.pipeline(
        "a red owl", num_inference_steps=steps, guidance_scale=guidance, height=32, width=32,
        generator=torch.Generator("cpu").manual_seed(1),
        **({"use_resolution_binning": False} if name == "pixart" else {})).images[0]
    assert np.abs(made[0].astype(int) - np.asarray(plain).astype(int)).max() <= 2


ENCODERS = {"paper": (tiny.build_clip, 24), "official": (tiny.build_clip, 32), "siglip": (tiny.build_siglip, 32),
            "dinov2": (tiny.build_dinov2, 32), "sentence": (tiny.build_sentence, 32),
            "sentence, class token": (lambda folder: tiny.build_sentence(folder, class_token=True), 32)}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_family(tmp_path, images, name):
    build, width = ENCODERS[name]
    preset = load_preset(name.split(",")[0])
    published = preset.second_encoder if name == "dinov2" else preset.encoder
    encoder = load_encoder(published.model_copy(update={"id": str(build(tmp_path / "model")), "batch_size": 2}), "cpu")
    assert (encoder.reads_images, encoder.reads_texts) == ("sentence" not in name, name != "dinov2")
    texts = ["a cat", "two red owls on the beach and a boat", "an owl"]
    for reads, embed, given, said in ((encoder.reads_images, encoder.embed_images, images, "texts only"),
                                      (encoder.reads_texts, encoder.embed_texts, texts, "images only")):
        if not reads:
            with pytest.raises(UserError, match=said):
                embed(given)
            continue
        vectors = embed(given)
        assert vectors.shape == (3, width) and vectors.dtype == np.float32 and len(embed([])) == 0
        assert np.allclose(vectors, embed([*map(np.asarray, given[::-1])] if embed == encoder.embed_images
                                          else given[::-1])[::-1], atol=1e-5)


def test_every_preset_file_is_tried():
    tried = {name.split(",")[0] for name in (*CAPTIONERS, *GENERATORS, *ENCODERS)}
    elsewhere = {"lcm-lora", "remote", "mini", "mini-git", "mini-teacher", "mini-weak", "fast"}
    assert {file.stem for file in PRESETS.glob("*.toml")} == tried | elsewhere
    for name in tried - {"mini", "mini-teacher"}:
        generator = load_preset(name).generator
        assert generator.safety_checker == generator.id.startswith("stable-diffusion-v1-5/")  # others have none


def test_options_are_arguments_of_the_pipeline(tmp_path):
    settings = GeneratorSettings(id=str(tiny.build_flux(tmp_path / "flux")), **SMALL,
                                 options={"max_sequence_length": 5})
    generator, texts, lengths = load_generator(settings, "cpu"), ["a red owl on a boat"] * 2, []
    generator.pipeline.text_encoder_2.register_forward_hook(
        lambda module, args, output: lengths.append(output[0].shape[1]))
    assert generator.generate(texts, [1, 1]).truncated.tolist() == [False, False]  # the CLIP tower reads them whole
    assert set(lengths) == {5}
    for name in ("max_tokens", "num_inference_steps", "prompt"):
        with pytest.raises(UserError, match=f"options has {name}, which a FluxPipeline does not take or the preset sets"):
            load_generator(settings.model_copy(update={"options": {name: 5}}), "cpu")
    with pytest.raises(UserError, match="size = 34 is no multiple of 4"):
        load_generator(settings.model_copy(update={"size": 34}), "cpu")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A tiny Stable Diffusion and a LoRA of it."""
    import diffusers
    import peft
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    root = tmp_path_factory.mktemp("lora")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny.build_stable_diffusion(root / "sd"))
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights="gaussian", target_modules=["to_q", "to_v"]))
    layers = {name: value + 0.5 for name, value in get_peft_model_state_dict(pipeline.unet).items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        root / "lora", unet_lora_layers=convert_state_dict_to_diffusers(layers))
    return root


def test_lora_is_fused_and_in_the_fingerprint(lora):
    settings = GeneratorSettings(id=str(lora / "sd"), **SMALL | {"steps": 2, "guidance": 1.0},
                                 scheduler="LCMScheduler")
    tuned = settings.model_copy(update={"lora": str(lora / "lora")})
    generator = load_generator(settings, "cpu")
    assert generator.pipeline.scheduler.config.prediction_type == "v_prediction"  # of the training
    base = generator.generate(["a cat"], [0]).pixels
    assert (load_generator(tuned, "cpu").generate(["a cat"], [0]).pixels != base).any()
    before = weights_fingerprint(tuned)
    assert before is not None and before != weights_fingerprint(settings)
    file = next((lora / "lora").glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # trained again under its name, of the same size
    assert weights_fingerprint(tuned) != before
    file.write_bytes(content)
    assert weights_fingerprint(tuned.model_copy(update={"lora": str(lora / "gone")})) is None


def test_a_lora_that_fits_nothing_or_is_ambiguous_is_refused(lora, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(next((lora / "lora").glob("*.safetensors")))
    wrong = {"names": {f"other.{name}": value for name, value in weights.items()},
             "layers": {name.replace("attn", "attention"): value for name, value in weights.items()},
             "zeros": {name: value * 0 for name, value in weights.items()}}
    settings = GeneratorSettings(id=str(lora / "sd"), **SMALL)
    for kind, content in wrong.items():
        (tmp_path / kind).mkdir()
        save_file(content, tmp_path / kind / "pytorch_lora_weights.safetensors")
        with pytest.raises(UserError, match="none of its weights fits|cannot be loaded"):
            load_generator(settings.model_copy(update={"lora": str(tmp_path / kind)}), "cpu")
    save_file(weights, tmp_path / "names" / "second.safetensors")
    with pytest.raises(UserError, match=r"holds 2 weight files \(pytorch_lora_weights.safetensors, second.safetensors\)"):
        load_generator(settings.model_copy(update={"lora": str(tmp_path / "names")}), "cpu")


def test_weights_of_a_variant(tmp_path):
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny.build_stable_diffusion(tmp_path / "sd"))
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    settings = GeneratorSettings(id=str(tmp_path / "half"), variant="fp16", **SMALL)
    assert load_generator(settings, "cpu").generate(["a cat"], [0]).pixels.std() > 1
    with pytest.raises(UserError, match="half cannot be loaded .*no file named .*safetensors"):
        load_generator(settings.model_copy(update={"variant": None}), "cpu")


def test_safety_checker_flags(tmp_path):
    folder = tiny.build_stable_diffusion(tmp_path / "checked", checked=True)
    settings = GeneratorSettings(id=str(folder), safety_checker=True, **SMALL)
    made = load_generator(settings, "cpu").generate(["a cat", "an owl"], [0, 1])
    assert made.flagged.all() and made.pixels.max() == 0
    off = load_generator(settings.model_copy(update={"safety_checker": False}), "cpu")
    assert not off.generate(["a cat"], [0]).flagged.any() and off.pipeline.safety_checker is None
    with pytest.raises(UserError, match="has no safety checker: set safety_checker = false"):
        load_generator(settings.model_copy(update={"id": str(tiny.build_stable_diffusion(tmp_path / "plain"))}), "cpu")
