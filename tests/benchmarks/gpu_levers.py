"""Each lever of ``gpu.py`` by itself: the same small piece of work without it and with it, in turns."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib.generators import Generator, keep_latents_exact, tune_scheduler
from lib.images import png_bytes
from tests.benchmarks.gpu_arms import Clock, Ours

TEXTS = ("a brown dog on a beach", "two boats in a harbour", "a plate with bread", "a red bus")


@dataclass(frozen=True)
class Lever:
    """Seconds of the same work without a lever and with it."""

    name: str
    stage: str
    without: float
    with_it: float

    @property
    def gain(self) -> float:
        """How many times faster."""
        return self.without / self.with_it


def compare(name: str, stage: str, ours: Ours, rounds: int, without: Callable[[], Any],
            with_it: Callable[[], Any],
            off: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Lever:
    """Time both sides in turns after one warm-up each; ``off`` surrounds the side without."""
    clock, seconds = Clock(ours.device), ([], [])
    for number in range(rounds + 1):
        for times, work, around in ((seconds[0], without, off), (seconds[1], with_it, nullcontext)):
            with around():
                start = clock.now()
                work()
                if number:
                    times.append(clock.now() - start)
    return Lever(name, stage, float(median(seconds[0])), float(median(seconds[1])))


def measure_levers(ours: Ours, rounds: int, compiling: bool) -> Iterator[Lever]:
    """All levers. Compilation takes minutes and needs a compiler, so it must be asked for."""
    yield from drawing_levers(ours, rounds)
    yield from text_levers(ours, rounds)
    yield from captioning_levers(ours, rounds)
    yield from picture_levers(ours, rounds)
    if compiling:
        yield from compilation(ours, rounds)


# --- drawing -----------------------------------------------------------------------------------

def draw(ours: Ours, n: int | None = None) -> Callable[[], Any]:
    """Draw one batch of n pictures (the work's batch if None)."""
    n = ours.work.batch if n is None else n
    texts = [TEXTS[i % len(TEXTS)] for i in range(n)]
    return lambda: ours.generator.generate(texts, range(n))


@contextmanager
def batches_of(generator: Generator, size: int) -> Iterator[None]:
    """Another batch size for a while."""
    batches = generator._batches
    kept, batches.size = batches.size, size
    yield
    batches.size = kept


@contextmanager
def plain_layout(generator: Generator) -> Iterator[None]:
    """Channels first for a while."""
    modules = (generator.pipeline.unet, generator.pipeline.vae)
    for module in modules:
        module.to(memory_format=torch.contiguous_format)
    yield
    if generator.device.type == "cuda":
        for module in modules:
            module.to(memory_format=torch.channels_last)


@contextmanager
def plain_attention(generator: Generator) -> Iterator[None]:
    """Attention as separate products and a softmax for a while."""
    from diffusers.models.attention_processor import AttnProcessor

    unet = generator.pipeline.unet
    fused = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor())
    yield
    unet.set_attn_processor(fused)


@contextmanager
def timesteps_on_device(generator: Generator) -> Iterator[None]:
    """The scheduler as diffusers has it for a while."""
    scheduler = generator.pipeline.scheduler
    del scheduler.step, scheduler.set_timesteps
    keep_latents_exact(scheduler)  # on either side: only the timesteps' place is measured
    yield
    del scheduler.step
    tune_scheduler(scheduler)


def drawing_levers(ours: Ours, rounds: int) -> Iterator[Lever]:
    """Batch size, layout, attention, host synchronisation."""
    generator, batch = ours.generator, ours.work.batch
    sizes = sorted({1, max(1, batch // 2), batch, 2 * batch})
    for smaller, larger in pairwise(sizes):
        work = draw(ours, 2 * batch)

        def sized(size: int, work: Callable[[], Any] = work) -> None:
            with batches_of(generator, size):
                work()

        yield compare(f"batches of {larger} rather than {smaller}", f"{2 * batch} pictures", ours, rounds,
                      lambda size=smaller: sized(size), lambda size=larger: sized(size))
    work, stage = draw(ours), f"{batch} pictures"
    for name, off in (("channels last", plain_layout), ("fused attention", plain_attention),
                      ("no host synchronisation in the step loop", timesteps_on_device)):
        yield compare(name, stage, ours, rounds, work, work, lambda off=off: off(generator))


def compilation(ours: Ours, rounds: int) -> Iterator[Lever]:
    """Compiled U-Net and VAE; the first call, which compiles, is not counted. Nothing where torch
    cannot compile, which the generator has said then."""
    compiled = Generator(replace(ours.preset.generator, compile=True), ours.device)
    if not compiled.compiled:
        return
    texts = [TEXTS[i % len(TEXTS)] for i in range(ours.work.batch)]
    yield compare("compiled U-Net and VAE decoder", f"{ours.work.batch} pictures", ours, rounds, draw(ours),
                  lambda: compiled.generate(texts, range(ours.work.batch)))


# --- texts and captions ------------------------------------------------------------------------

def text_levers(ours: Ours, rounds: int) -> Iterator[Lever]:
    """Each distinct caption is encoded once, and the empty prompt once for good.

    The unconditional pass itself is not shared: it depends on the noise, which each picture has of
    its own.
    """
    generator, k = ours.generator, ours.work.candidates
    texts = [text for text in TEXTS for _ in range(k)]
    plain = torch.inference_mode()(lambda t, guided: generator._encode_prompt(t, guided=guided))
    once = torch.inference_mode()(lambda: generator._encode(list(dict.fromkeys(texts))))
    yield compare("a text encoded once for equal captions", f"{len(texts)} texts, {len(TEXTS)} distinct",
                  ours, rounds, lambda: plain(texts, False), once)
    yield compare("the empty prompt encoded once for all", f"{len(texts)} texts", ours, rounds,
                  lambda: plain(texts, True), lambda: plain(texts, False))


def captioning_levers(ours: Ours, rounds: int) -> Iterator[Lever]:
    """The image encoder runs once for all captions of a picture."""
    photo, k = ours.work.photos()[0], ours.work.candidates
    yield compare("image encoder once for all captions of a picture", f"{k} captions", ours, rounds,
                  lambda: ours.captioner.caption([photo] * k, [[seed] for seed in range(k)]),
                  lambda: ours.captioner.caption([photo], [list(range(k))]))


# --- pictures: embedding and writing -----------------------------------------------------------

def some_pictures(ours: Ours) -> list[np.ndarray]:
    """As many drawn pictures as a source has, as a generator hands them over: noise."""
    side, rng = ours.preset.generator.output_size, np.random.default_rng(0)
    return list(rng.integers(0, 256, (ours.work.candidates, side, side, 3), dtype=np.uint8))


def on_device(ours: Ours, pictures: list[np.ndarray]) -> torch.Tensor:
    """Resize, crop and normalise on the device. Not what we use: its pixels are not Pillow's."""
    processor = ours.encoder.processor.image_processor
    side = processor.crop_size["height"]
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack(pictures)).to(ours.device).permute(0, 3, 1, 2).float() / 255
        pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(values, device=ours.device)[:, None, None]
                     for values in (processor.image_mean, processor.image_std))
        pixels = ((pixels - mean) / std).to(ours.encoder.dtype)
        return ours.encoder.model.get_image_features(pixel_values=pixels).pooler_output.float().cpu()


def picture_levers(ours: Ours, rounds: int) -> Iterator[Lever]:
    """No PNG between generator and encoder; files written while the next batch is drawn."""
    pictures, n = some_pictures(ours), ours.work.candidates

    def by_file() -> None:
        files = [png_bytes(picture) for picture in pictures]
        ours.encoder.embed_images([Image.open(io.BytesIO(file)) for file in files])

    yield compare("embedding without a PNG in between", f"{n} pictures", ours, rounds, by_file,
                  lambda: ours.encoder.embed_images(pictures))
    yield compare("pictures prepared on the device (not used: other pixels)", f"{n} pictures", ours, rounds,
                  lambda: ours.encoder.embed_images(pictures), lambda: on_device(ours, pictures))
    work, batches = draw(ours), 3

    def write(pixels: np.ndarray) -> list[bytes]:
        return [png_bytes(picture) for picture in pixels]

    def one_after_the_other() -> None:
        for _ in range(batches):
            write(work().pixels)

    def in_another_thread() -> None:
        waiting: Future[list[bytes]] | None = None
        with ThreadPoolExecutor(max_workers=1) as writer:
            for _ in range(batches):
                pixels = work().pixels
                if waiting is not None:
                    waiting.result()
                waiting = writer.submit(write, pixels)

    yield compare("pictures written by another thread", f"{batches} batches of {ours.work.batch}", ours,
                  rounds, one_after_the_other, in_another_thread)


# --- profile -----------------------------------------------------------------------------------

def profile(ours: Ours, lines: int = 12) -> str:
    """Where one batch of pictures spends its time, by operation of torch."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = ours.device.type == "cuda"
    draw(ours)()
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as made:
        draw(ours)()
    kind = "device" if cuda else "cpu"
    events = sorted(made.key_averages(), key=lambda e: getattr(e, f"self_{kind}_time_total"), reverse=True)
    total = sum(getattr(event, f"self_{kind}_time_total") for event in events)
    return "\n".join(f"{100 * getattr(event, f'self_{kind}_time_total') / total:5.1f} %  {event.count:6d} x  "
                     f"{event.key[:90]}" for event in events[:lines])
