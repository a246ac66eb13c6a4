"""The bundles of the paper's three families, on tiny random checkpoints of the same architectures."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from lib.errors import UserError
from lib.generators import keep_latents_exact, tune_scheduler
from lib.models import describe, load_captioner, load_encoder, load_generator
from lib.presets import CaptionerSpec, Decoding, EncoderSpec, GeneratorSpec
from lib.weights import is_local
from tests.tiny_models import build_blip, build_clip, build_stable_diffusion

NUCLEUS = Decoding("nucleus", p=0.9, max_tokens=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"blip": build_blip(root / "blip"), "clip": build_clip(root / "clip"),
            "sd": build_stable_diffusion(root / "sd")}


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.fixture(scope="module")
def captioner(folders):
    return load_captioner(CaptionerSpec(str(folders["blip"]), sender=NUCLEUS, batch_size=4), "cpu")


@pytest.fixture(scope="module")
def generator(folders):
    return load_generator(GeneratorSpec(
        str(folders["sd"]), steps=3, guidance=4.0, size=32, output_size=32, batch_size=3,
        scheduler="DPMSolverMultistepScheduler"), "cpu")


def seeds_for(n_images, k):
    return [[1000 * i + j for j in range(k)] for i in range(n_images)]


# --- captioner ----------------------------------------------------------------------------------

def test_captions_do_not_depend_on_batch_or_order(folders, captioner, images):
    seeds = seeds_for(5, 3)
    captions = captioner.caption(images, seeds)
    other = load_captioner(dataclasses.replace(captioner.spec, batch_size=1), "cpu")
    backwards = other.caption(images[::-1], seeds[::-1])[::-1]
    for row, other_row in zip(captions, backwards, strict=True):
        assert [c.text for c in row] == [c.text for c in other_row]
        assert [c.n_tokens for c in row] == [c.n_tokens for c in other_row]
        assert np.allclose([c.logprob for c in row], [c.logprob for c in other_row], atol=1e-4)
    alone = captioner.caption(images[2:3], [seeds[2][1:2]])
    assert alone[0][0].text == captions[2][1].text
    assert len({c.text for row in captions for c in row}) > 5
    assert all(c.n_tokens <= 8 for row in captions for c in row)


def test_arrays_are_pictures_too(captioner, images):
    arrays = captioner.caption([np.asarray(image) for image in images[:2]], [[5], [6]])
    assert arrays == captioner.caption(images[:2], [[5], [6]])


def test_uneven_numbers_of_seeds(captioner, images):
    captions = captioner.caption(images[:3], [[1, 2], [], [3]])
    assert [len(row) for row in captions] == [2, 0, 1]


def test_logprob_is_that_of_a_teacher_forced_pass(captioner, images):
    tokenizer, model = captioner.processor.tokenizer, captioner.model
    read = {caption: tokenizer(caption.text, add_special_tokens=False).input_ids
            for caption in captioner.caption(images[:1], [list(range(7, 17))])[0]}
    # Random weights may draw special tokens, which the text leaves out: then counts differ.
    caption, words = next(pair for pair in read.items() if len(pair[1]) == pair[0].n_tokens)
    ended = caption.n_tokens < NUCLEUS.max_tokens
    ids = torch.tensor([[5, *words, *([3] if ended else [])]])
    pixels = captioner.processor.image_processor(images[:1], return_tensors="pt").pixel_values
    logits = model(pixel_values=pixels, input_ids=ids).logits
    logprobs = torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None]).sum()
    assert caption.logprob == pytest.approx(logprobs.item(), abs=1e-3)


def test_greedy_is_the_models_own_greedy(captioner, images):
    rows = captioner.caption(images[:2], [[1, 2], [3]], Decoding("greedy", max_tokens=8))
    assert rows[0][0] == rows[0][1] and len(rows[1]) == 1
    pixels = captioner.processor.image_processor(images[:2], return_tensors="pt").pixel_values
    ids = captioner.model.generate(pixel_values=pixels, max_new_tokens=8, do_sample=False)
    texts = captioner.processor.batch_decode(ids, skip_special_tokens=True)
    assert [row[0].text for row in rows] == [" ".join(text.split()) for text in texts]


def test_beam_beats_greedy_and_obeys_limits(captioner, images):
    beam = captioner.caption(images, [[0]] * 5, Decoding("beam", beams=4, max_tokens=6))
    greedy = captioner.caption(images, [[0]] * 5, Decoding("greedy", max_tokens=6))
    mean = [np.mean([row[0].logprob / (row[0].n_tokens + 1) for row in rows])
            for rows in (beam, greedy)]
    assert mean[0] >= mean[1] - 0.05
    assert all(row[0].n_tokens <= 6 for row in beam)


def test_lengths_prompt_and_top_k(captioner, images):
    decoding = Decoding("top_k", k=5, min_tokens=4, max_tokens=6, repetition_penalty=1.3,
                        prompt="a picture of")
    captions = captioner.caption(images[:2], seeds_for(2, 4), decoding)
    assert all(4 <= c.n_tokens <= 6 for row in captions for c in row)
    assert not any(c.text.startswith("a picture of") for row in captions for c in row)
    assert captions != captioner.caption(images[:2], seeds_for(2, 4),
                                         dataclasses.replace(decoding, prompt=""))


def test_image_encoder_runs_once_an_image(captioner, images):
    seen = []
    handle = captioner.model.vision_model.register_forward_hook(
        lambda module, inputs, output: seen.append(output.last_hidden_state.shape[0]))
    captioner.caption(images, seeds_for(5, 6))
    handle.remove()
    assert sum(seen) == 5


# --- generator ----------------------------------------------------------------------------------

def test_images_do_not_depend_on_batch_or_order(generator):
    texts = ["a red owl", "a cat", "a red owl", "a boat", "a cat"]
    made = generator.generate(texts, [1, 2, 3, 4, 2])
    assert made.pixels.shape == (5, 32, 32, 3) and made.pixels.dtype == np.uint8
    assert not made.flagged.any() and not made.truncated.any()
    backwards = generator.generate(texts[::-1], [2, 4, 3, 2, 1]).pixels[::-1]
    single = np.concatenate([generator.generate([t], [s]).pixels
                             for t, s in zip(texts, [1, 2, 3, 4, 2], strict=True)])
    for other in (backwards, single):
        assert np.abs(made.pixels.astype(int) - other.astype(int)).max() <= 1
    assert np.abs(made.pixels[1].astype(int) - made.pixels[4].astype(int)).max() <= 1
    assert (made.pixels[0] != made.pixels[2]).any()  # another seed
    assert (generator.generate(["a cat"], [1]).pixels[0] != made.pixels[0]).any()  # another text


def test_generator_equals_a_plain_pipeline_call(generator):
    made = generator.generate(["a red owl"], [11]).pixels[0]
    plain = generator.pipeline("a red owl", num_inference_steps=3, guidance_scale=4.0, height=32,
                               width=32, generator=torch.Generator("cpu").manual_seed(11))
    assert np.abs(made.astype(int) - np.asarray(plain.images[0]).astype(int)).max() <= 1
    assert generator.pipeline.scheduler.config.prediction_type == "v_prediction"


def test_each_distinct_text_is_encoded_once(folders):
    generator = load_generator(GeneratorSpec(str(folders["sd"]), steps=1, guidance=4.0, size=32,
                                             output_size=32, batch_size=2), "cpu")
    rows = []
    generator.pipeline.text_encoder.register_forward_hook(
        lambda module, inputs, output: rows.append(output[0].shape[0]))
    generator.generate(["a", "b", "a", "a", "b"], range(5))
    assert sum(rows) == 2 + 2  # two texts; the empty prompt on both sides, once a bundle
    generator.generate(["a"], [0])
    assert sum(rows) == 2 + 2 + 1


def test_long_prompts_are_flagged_and_logged(generator, caplog):
    with caplog.at_level(logging.WARNING):
        made = generator.generate(["a cat", "a red cat on the big big sea"], [0, 1])
    assert made.truncated.tolist() == [False, True]
    assert "cut" in caplog.text


def test_resize_and_no_texts(folders):
    generator = load_generator(GeneratorSpec(str(folders["sd"]), steps=1, guidance=0.0, size=32,
                                             output_size=20), "cpu")
    assert generator.generate(["a cat"], [0]).pixels.shape == (1, 20, 20, 3)
    assert generator.generate([], []).pixels.shape == (0, 20, 20, 3)


def test_non_finite_pixels_are_an_error(folders):
    generator = load_generator(GeneratorSpec(str(folders["sd"]), steps=1, guidance=0.0, size=32,
                                             output_size=32), "cpu")
    generator.pipeline.vae.post_quant_conv.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="non-finite"):
        generator.generate(["a cat"], [0])


def test_a_decoder_that_overflows_in_float16_decodes_in_float32(folders, caplog):
    spec = GeneratorSpec(str(folders["sd"]), steps=1, guidance=0.0, size=32, output_size=32)
    made = {}
    for dtype in ("float32", "float16"):
        generator = load_generator(dataclasses.replace(spec, dtype=dtype), "cpu")
        vae, texts = generator.pipeline.vae, (["a cat", "an owl"], [1, 2])
        vae.decoder.conv_in.weight.data *= 40_000  # what follows normalises it
        vae.decoder.conv_in.bias.data.zero_()
        made[dtype] = generator.generate(*texts).pixels.astype(int)
        assert vae.dtype == generator.dtype == getattr(torch, dtype)
    assert caplog.text.count("overflowed in torch.float16: this batch is decoded in float32") == 1
    assert np.abs(made["float16"] - made["float32"]).max() <= 2 < made["float32"].std()


SAMPLERS = ["PNDMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_waits_for_the_device(folders, sampler):
    """On torch's "meta" device every read of a value fails: a stand-in for waiting for a GPU."""
    generator = load_generator(GeneratorSpec(str(folders["sd"]), steps=6, guidance=4.0, size=32,
                                             output_size=32, scheduler=sampler), "cpu")
    scheduler, pixels = generator.pipeline.scheduler, generator.generate(["a cat"], [5]).pixels
    del scheduler.step, scheduler.set_timesteps  # the scheduler as diffusers has it
    assert np.array_equal(generator.generate(["a cat"], [5]).pixels, pixels)
    tune_scheduler(scheduler)
    text = generator.pipeline.to("meta")._execution_device
    arguments = {name: torch.zeros(2, 16, 32, device=text)
                 for name in ("prompt_embeds", "negative_prompt_embeds")}
    arguments |= {"num_inference_steps": 6, "guidance_scale": 4.0, "height": 32, "width": 32,
                  "output_type": "latent",
                  "generator": [torch.Generator().manual_seed(i) for i in range(2)]}
    made = generator.pipeline(**arguments).images
    assert made.device.type == "meta" and made.shape == (2, 4, 16, 16)
    del scheduler.step, scheduler.set_timesteps
    with pytest.raises((RuntimeError, NotImplementedError)):
        generator.pipeline(**arguments)


def test_compiled_parts_draw_the_same(folders):
    spec = GeneratorSpec(str(folders["sd"]), steps=2, guidance=4.0, size=32, output_size=32)
    with torch.compiler.set_stance("force_eager"):  # needs no C++ compiler, takes no minutes
        compiled = load_generator(dataclasses.replace(spec, compile=True), "cpu")
        for part in (compiled.pipeline.unet, compiled.pipeline.vae.decoder):
            assert compiled.compiled and part._compiled_call_impl is not None
        made = compiled.generate(["a cat"], [3]).pixels
    assert np.array_equal(made, load_generator(spec, "cpu").generate(["a cat"], [3]).pixels)


def test_where_torch_cannot_compile_the_pictures_are_drawn_all_the_same(folders, caplog):
    import torch._inductor.config as inductor

    spec = GeneratorSpec(str(folders["sd"]), steps=2, guidance=4.0, size=32, output_size=32, compile=True)
    with inductor.patch({"cpp.cxx": (None, "/no/such/compiler"), "fx_graph_cache": False}):
        plain = load_generator(spec, "cpu")
    assert not plain.compiled and caplog.text.count("compile = true is left out: torch cannot compile") == 1
    assert plain.generate(["a cat"], [3]).pixels.std() > 1


@pytest.mark.parametrize("sampler", ["PNDMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"])
def test_half_precision_latents_do_not_drift(sampler):
    """Against a loop that keeps the latents in float32 by hand; noise of a seed where there is any."""
    half, options = torch.bfloat16, {"skip_prk_steps": True} if sampler == "PNDMScheduler" else {}
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def drawn(tune, exact):
        scheduler = getattr(diffusers, sampler)(**options)
        tune(scheduler)
        scheduler.set_timesteps(20)
        noise, latents = torch.Generator().manual_seed(1), start if exact else start.to(half)
        taken = inspect.signature(scheduler.step).parameters
        for t in scheduler.timesteps:
            seen = latents.to(half)
            made = (0.4 * seen + 0.1 * seen.flip(-1)).to(torch.float32 if exact else half)
            latents = scheduler.step(made.to(half).float() if exact else made, t, latents, return_dict=False,
                                     **({"generator": noise} if "generator" in taken else {}))[0]
        return latents.float()

    wanted = drawn(lambda scheduler: None, exact=True)
    ours, plain = drawn(keep_latents_exact, exact=False), drawn(lambda scheduler: None, exact=False)
    rounding = (wanted - wanted.to(half).float()).abs().max()
    assert (ours - wanted).abs().max() <= 4 * rounding < (plain - wanted).abs().max()


# --- encoder ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("projected", "width"), [(True, 24), (False, 32)])
def test_embeddings(folders, images, projected, width):
    encoder = load_encoder(EncoderSpec(str(folders["clip"]), projected=projected, batch_size=2),
                           "cpu")
    pictures = encoder.embed_images(images)
    assert pictures.shape == (5, width) and pictures.dtype == np.float32
    arrays = encoder.embed_images([np.asarray(image) for image in images[::-1]])[::-1]
    assert np.allclose(pictures, arrays, atol=1e-5)
    texts = encoder.embed_texts(["a cat", "an owl on the beach", "a cat"])
    assert texts.shape == (3, width) and np.array_equal(texts[0], texts[2])
    assert np.allclose(encoder.embed_texts(["a cat"])[0], texts[0], atol=1e-5)
    assert encoder.embed_texts([]).shape[0] == 0


# --- weights, errors --------------------------------------------------------------------

def test_local_or_hub():
    assert is_local("data/models/mini/captioner") and is_local("/x/y") and is_local("./x")
    assert not is_local("openai/clip-vit-large-patch14")


def test_missing_weights_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for loader, spec in [
        (load_captioner, CaptionerSpec("data/models/hub/no-such-captioner")),
        (load_generator, GeneratorSpec("data/models/mini/no-such-generator")),
        (load_encoder, EncoderSpec("nobody/no-such-encoder")),
        (load_encoder, EncoderSpec(str(tmp_path / "gone"))),
    ]:
        with pytest.raises(UserError) as caught:
            loader(spec, "cpu")
        assert "no-such" in str(caught.value) or "gone" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_wrong_damaged_or_pickled_checkpoints(folders, tmp_path):
    with pytest.raises(UserError, match="'clip'"):
        load_captioner(CaptionerSpec(str(folders["clip"])), "cpu")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_generator(GeneratorSpec(str(folders["clip"])), "cpu")
    with pytest.raises(UserError, match="unknown encoder adapter"):
        load_encoder(EncoderSpec(str(folders["clip"]), adapter="clap"), "cpu")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folders["clip"].iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="damaged"):
        load_encoder(EncoderSpec(str(damaged)), "cpu")
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        load_encoder(EncoderSpec(str(damaged)), "cpu")


@pytest.mark.parametrize("adapter", ["blip", "blip2", "chat", "florence2", "git"])
def test_every_captioner_refuses_another_architecture(folders, adapter):
    with pytest.raises(UserError) as caught:
        load_captioner(CaptionerSpec(str(folders["clip"]), adapter=adapter), "cpu")
    assert "clip" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("adapter", ["clip", "siglip", "dino", "sentence"])
def test_every_encoder_refuses_another_architecture(folders, adapter):
    for kind in ("blip", "sd"):
        with pytest.raises(UserError) as caught:
            load_encoder(EncoderSpec(str(folders[kind]), adapter=adapter), "cpu")
        assert str(folders[kind]) in str(caught.value) and "\n" not in str(caught.value)


def test_a_generator_that_takes_no_text_is_refused(tmp_path):
    import diffusers

    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 8), layers_per_block=1,
                                 norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                                 up_block_types=("UpBlock2D",) * 2)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="DDPMPipeline, which takes no prompt"):
        load_generator(GeneratorSpec(str(tmp_path)), "cpu")


class Hub(BaseHTTPRequestHandler):
    """A hub that has nothing, and says so in the way the real one does."""

    code = "RepoNotFound"

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        """Stay quiet."""


@pytest.mark.parametrize(("code", "revision", "said"), [
    ("RepoNotFound", None, "nobody/nothing does not exist"),
    ("RevisionNotFound", "0123456789abcdef0123456789abcdef01234567", "has no revision 0123")])
def test_a_hub_id_that_does_not_exist(tmp_path, monkeypatch, code, revision, said):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(Hub, "code", code)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for load, spec in ((load_captioner, CaptionerSpec("nobody/nothing", revision=revision)),
                       (load_generator, GeneratorSpec("nobody/nothing", revision=revision)),
                       (load_encoder, EncoderSpec("nobody/nothing", revision=revision))):
        with pytest.raises(UserError, match=said) as caught:
            load(spec, "cpu")
        assert "preset" in str(caught.value) and "\n" not in str(caught.value)
    server.shutdown()
    server.server_close()


def test_checkpoint_that_lacks_weights_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folders["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folders["clip"] / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        load_encoder(EncoderSpec(str(tmp_path)), "cpu")


def test_own_adapter_and_description(folders):
    spec = EncoderSpec(str(folders["clip"]), adapter="lib.encoders:Clip")
    record = describe(load_encoder(spec, "cpu"))
    assert record["device"] == "cpu" and record["dtype"] == "float32"
    assert json.dumps(record)


def test_missing_safety_checker_is_told(folders):
    with pytest.raises(UserError, match="safety_checker = false"):
        load_generator(GeneratorSpec(str(folders["sd"]), safety_checker=True), "cpu")


def test_unknown_scheduler_is_told(folders):
    with pytest.raises(UserError, match="unknown scheduler"):
        load_generator(GeneratorSpec(str(folders["sd"]), scheduler="Sundial"), "cpu")
