"""What a run cost: FLOP against published figures and against torch's own count, sums over sittings."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from lib.cost import Cost, as_text, derived, line, table
from lib.flops import Meter, count
from lib.models import load_captioner, load_encoder, load_generator
from lib.presets import CaptionerSpec, Decoding, EncoderSpec, GeneratorSpec
from tests import full_size
from tests import tiny_families as tiny
from tests.standins import stand_ins
from tests.test_roundtrip import paint, play
from tests.tiny_models import build_blip, build_clip, build_stable_diffusion

NUCLEUS = Decoding("nucleus", p=0.9, min_tokens=2, max_tokens=6)
TEXTS = ["a red owl", "a cat", "a red owl", "a boat beside the sea"]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]


# --- the paper's models against the published figures ------------------------------------------


def tflop(work) -> float:
    """TFLOP of a pass on the meta device: shapes only, no numbers and no memory."""
    with torch.inference_mode():
        return count(work)[1] / 1e12


def test_a_pass_of_stable_diffusions_unet():
    with torch.device("meta"):
        unet, prompt = full_size.stable_diffusion_unet(), torch.empty(1, 77, 768)
        for pixels, expected in ((256, 0.180), (512, 0.803)):
            latents = torch.empty(1, 4, pixels // 8, pixels // 8)
            found = tflop(lambda latents=latents: unet(latents, torch.zeros(()), prompt))
            assert found == pytest.approx(expected, rel=0.01)


def test_a_picture_of_stable_diffusions_decoder():
    with torch.device("meta"):
        vae = full_size.stable_diffusion_vae()
        for pixels, expected in ((256, 0.622), (512, 2.515)):
            latents = torch.empty(1, 4, pixels // 8, pixels // 8)
            assert tflop(lambda latents=latents: vae.decode(latents)) == pytest.approx(expected, rel=0.01)


def test_a_picture_of_clip_and_of_blip():
    with torch.device("meta"):
        clip, blip = full_size.clip(), full_size.blip_large()
        small, large = torch.empty(1, 3, 224, 224), torch.empty(1, 3, 384, 384)
        assert tflop(lambda: clip.get_image_features(pixel_values=small)) == pytest.approx(0.162, rel=0.01)
        assert tflop(lambda: blip.vision_model(large)) == pytest.approx(0.382, rel=0.01)


# --- every family against torch's count of the whole call --------------------------------------


def check(bundle, work) -> None:
    """The meter's sum is torch's own count of the whole call, when it counts and when it knows."""
    for _ in range(2):
        before = sum(bundle.meter.flop.values())
        _, whole = count(work)
        assert whole > 0 and sum(bundle.meter.flop.values()) - before == whole


CAPTIONERS = [("blip", build_blip), ("blip2", tiny.build_blip2), ("chat", tiny.build_chat),
              ("florence2", tiny.build_florence2), ("git", tiny.build_git)]


@pytest.mark.parametrize(("adapter", "build"), CAPTIONERS, ids=[name for name, _ in CAPTIONERS])
def test_captioners_are_counted_whole(tmp_path, images, adapter, build):
    prompt = "" if adapter == "florence2" else "a picture of"
    sender = Decoding("nucleus", p=0.9, max_tokens=6, prompt=prompt)
    captioner = load_captioner(CaptionerSpec(str(build(tmp_path)), adapter=adapter, sender=sender,
                                             batch_size=4), "cpu")
    check(captioner, lambda: captioner.caption(images[:3], [[1, 2], [3, 4], [5]]))
    check(captioner, lambda: captioner.caption(images[:1], [[0]], Decoding("greedy", max_tokens=4,
                                                                           prompt=prompt)))


GENERATORS = [(build_stable_diffusion, 4.0), (tiny.build_sdxl, 0.0), (tiny.build_lcm, 8.0),
              (tiny.build_pixart, 4.5), (tiny.build_sd3, 5.0), (tiny.build_flux, 0.0)]


@pytest.mark.parametrize(("build", "guidance"), GENERATORS,
                         ids=["sd", "sdxl-turbo", "lcm", "pixart", "sd3", "flux"])
def test_generators_are_counted_whole(tmp_path, build, guidance):
    generator = load_generator(GeneratorSpec(str(build(tmp_path)), steps=2, guidance=guidance, size=32,
                                             output_size=32, batch_size=3), "cpu")
    check(generator, lambda: generator.generate(TEXTS, [1, 2, 3, 4]))
    guided = 2 if guidance > 1 and build is not tiny.build_lcm else 1
    steps = len(generator.pipeline.scheduler.timesteps)
    assert generator.meter.passes["denoiser"] == 2 * len(TEXTS) * steps * guided
    assert generator.meter.passes["image decoder"] == 2 * len(TEXTS)


@pytest.mark.parametrize(("adapter", "build", "images_only"), [
    ("clip", build_clip, None), ("siglip", tiny.build_siglip, None),
    ("dino", tiny.build_dinov2, True), ("sentence", tiny.build_sentence, False)])
def test_encoders_are_counted_whole(tmp_path, images, adapter, build, images_only):
    encoder = load_encoder(EncoderSpec(str(build(tmp_path)), adapter=adapter, batch_size=2), "cpu")
    if images_only is not False:
        check(encoder, lambda: encoder.embed_images(images))
    if images_only is not True:
        check(encoder, lambda: encoder.embed_texts(TEXTS))
    assert sum(encoder.meter.passes.values()) == (16 if images_only is None else 10 if images_only else 6)


# --- counting changes nothing ------------------------------------------------------------------


def test_what_is_counted_is_what_it_would_be_uncounted(tmp_path, images):
    """The first pass of a shape is played under the counter: the same bits come out."""
    parts = [load_captioner(CaptionerSpec(str(build_blip(tmp_path / "b")), sender=NUCLEUS), "cpu"),
             load_generator(GeneratorSpec(str(build_stable_diffusion(tmp_path / "g")), steps=3,
                                          guidance=4.0, size=32, output_size=32), "cpu"),
             load_encoder(EncoderSpec(str(build_clip(tmp_path / "e"))), "cpu")]
    captioner, generator, encoder = parts

    def play():
        captions = captioner.caption(images, [[1, 2]] * 5)
        return captions, generator.generate(TEXTS, [1, 2, 3, 4]).pixels, encoder.embed_images(images)

    counted, known = play(), play()
    for module in (captioner.model.vision_model, captioner.model.text_decoder, generator.pipeline.unet,
                   generator.pipeline.vae.decoder, generator.pipeline.text_encoder,
                   encoder.model.vision_model):
        assert module._compiled_call_impl is not None
        module._compiled_call_impl = None
    for other in (known, play()):
        assert counted[0] == other[0]
        assert (counted[1] == other[1]).all() and (counted[2] == other[2]).all()


class Net(torch.nn.Module):
    """A product of (B, 4) by (4, 3): 24 FLOP a row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fails = torch.nn.Linear(4, 3), False

    def forward(self, x):
        if self.fails:
            raise RuntimeError("out of memory")
        return self.inner(x)


def test_meter_by_hand():
    net = Net()
    meter = Meter.of(net, {"whole": ("",), "inner": ("inner",), "absent": ("nothing.here",)})
    assert meter.passes == {"whole": 0, "inner": 0}
    net(torch.zeros(5, 4))
    net(torch.zeros(2, 4))
    assert meter.flop == {"whole": 7 * 24} and meter.passes["whole"] == 7
    assert meter.passes["inner"] == 0  # what a watched network calls is counted with it, once
    net.inner(torch.zeros(3, 4))
    assert meter.flop["inner"] == 72 and meter.passes["inner"] == 3
    net.fails = True
    for size in (2, 9):
        with pytest.raises(RuntimeError, match="out of memory"):
            net(torch.zeros(size, 4))
    net.fails = False
    net(torch.zeros(1, 4))  # a failed pass costs nothing and leaves the meter usable
    assert meter.passes["whole"] == 8 and Meter.of(object(), {"model": ("",)}) is None


class Looker(torch.nn.Module):
    """A convolution, attention among its pixels, a projection: (B, 4, 16, 16) -> (B, 256, 3)."""

    flop = 2 * (4 * 9 * 8 + 2 * 256 * 8 + 8 * 3) * 256  # of one row

    def __init__(self):
        super().__init__()
        self.conv, self.out = torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Linear(8, 3)

    def forward(self, x):
        pixels = self.conv(x).flatten(2).transpose(1, 2)
        return self.out(torch.nn.functional.scaled_dot_product_attention(pixels, pixels, pixels))


def test_compiled_code_is_counted_by_its_plain_code():
    nets = [Looker().eval() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].compile(backend="eager", dynamic=False)
    meters, outputs = [Meter.of(net, {"net": ("",)}) for net in nets], []
    with torch.inference_mode():
        for net in nets:
            outputs.append([net(torch.ones(rows, 4, 16, 16)) for rows in (2, 3, 3)])
    assert meters[0].flop["net"] == meters[1].flop["net"] == 8 * Looker.flop
    assert meters[0].passes["net"] == meters[1].passes["net"] == 8
    assert all(torch.equal(plain, compiled) for plain, compiled in zip(*outputs, strict=True))


# --- a run's cost over sittings and workers -----------------------------------------------------


class Tiring:
    """A captioner that gives up at its n-th call; the others go through."""

    def __init__(self, captioner, n: int) -> None:
        self.captioner, self.left = captioner, n

    def caption(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.captioner.caption(*arguments)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return f"folder:{paint(tmp_path_factory.mktemp('bare') / 'pictures', captions=False)}"


def test_cost_is_summed_over_sittings(pictures, tmp_path):
    whole = play(pictures, tmp_path / "whole", n=8, k=2, shard_size=2).cost()
    models = stand_ins()
    for calls in (4, 2):  # two calls a shard: candidates and greedy captions
        tired = dataclasses.replace(models, captioner=Tiring(models.captioner, calls))
        with pytest.raises(KeyboardInterrupt):
            play(pictures, tmp_path / "parts", n=8, k=2, shard_size=2, models=tired)
    run = play(pictures, tmp_path / "parts", n=8, k=2, shard_size=2)
    assert whole["sources"] == run.cost()["sources"] == 8
    assert run.cost()["passes"] == whole["passes"] and run.cost()["wall"] > 0
    assert set(run.cost()["seconds"]) == {"baseline", "caption", "embed", "generate", "load", "open", "score"}
    # Nothing of this is in what makes a run the same run.
    assert "cost" not in run.info() and run.rows().shape[0] == 16
    before = run.cost()
    assert play(pictures, tmp_path / "parts", n=8, k=2).cost() == before  # finished: nothing is spent


def test_workers_are_summed_on_one_clock(pictures, tmp_path):
    run = play(pictures, tmp_path, n=4, k=2, shard_size=1, models=stand_ins, workers=2)
    cost = run.cost()
    assert cost["sources"] == 4 and cost["wall"] > 0 and cost["sources_per_hour"] > 0
    assert cost["hours_for_4500"]["playing"] == pytest.approx(cost["wall"] / 4 * 4500 / 3600, rel=0.01)


# --- sums and what follows from them -----------------------------------------------------------


def spent() -> Cost:
    """Ten sources in two minutes, by hand."""
    return Cost(10, 120.0, Counter(caption=18.0, generate=90.0, embed=6.0, open=1.0),
                Counter(captions=110, images_generated=95), Counter(caption=10**12, generate=3 * 10**12),
                Counter({"generator: denoiser": 1520}), Counter({"generator: denoiser": 29 * 10**11}))


def test_derived_by_hand():
    known = derived(spent())
    assert known["tflop"] == 4.0 and known["sources_per_hour"] == 300.0
    assert known["hours_for_4500"] == {"playing": 15.0, "captions": 2.25, "pictures": 11.25}
    assert known["tflop_for_4500"] == 1800.0
    nothing = derived(Cost())
    assert nothing.pop("hours_for_4500") == dict.fromkeys(("playing", "captions", "pictures"))
    assert set(nothing.values()) == {None}


def test_sums_survive_the_file_and_a_second_sitting():
    cost = Cost.from_dict(spent().as_dict())
    assert cost == spent()
    cost.add(spent())
    assert cost.sources == 20 and cost.wall == 240.0 and cost.flop["caption"] == 2 * 10**12
    assert derived(cost)["sources_per_hour"] == 300.0 and derived(cost)["tflop"] == 8.0
    assert Cost.from_dict({"seconds": {"caption": 2.0}, "passes": {"captions": 3}}).sources == 0


def test_a_model_that_nobody_counts_leaves_tflop_unknown():
    cost = spent()
    with cost.stage("caption", object(), "captioner", captions=1):
        pass
    assert derived(cost)["tflop"] is None and "TFLOP not counted" in line("run", cost)
    shown = table({"run": cost})
    assert "TFLOP: captions" not in shown.index and np.isnan(shown.loc["TFLOP in all", "run"])


def test_table_sets_the_papers_hours_beside_ours():
    shown = table({"run": spent()})
    assert list(shown.columns) == ["run", "the paper, NVIDIA T4"]
    paper = shown["the paper, NVIDIA T4"].dropna()
    assert paper.to_dict() == {"hours for 4,500 sources: captions": 4.0,
                               "hours for 4,500 sources: pictures": 102.0}
    assert shown.loc["hours for 4,500 sources: playing", "run"] == 15.0
    assert shown.loc["TFLOP: pictures", "run"] == 3.0
    assert "passes, generator: denoiser" in table({"run": spent()}, whole=True).index
    assert as_text(shown).loc["TFLOP: pictures", "the paper, NVIDIA T4"] == "–"
    assert table({"old": Cost()}).empty
    assert line("run", spent()) == ("cost of run: 10 sources, 110 captions, 95 pictures, 4 TFLOP, "
                                    "300 sources an hour, so 15 h for 4,500")
