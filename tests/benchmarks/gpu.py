"""Speed at paper scale with random weights (speed does not depend on them): one table.

    python -m tests.benchmarks.gpu [--rounds 2] [--images 4] [--batches 8 32] [--compile] [--out gpu.md]

Arms, warmed up with two steps, then timed in turn in every round (median and range):

- *documented*: the loop that the pages of diffusers and transformers show, one image a call, in the
  number type of the published files;
- *ours*: the project's loaders, at several batch sizes; compiled.

*Of peak* is (FLOP that one image needs, counted by torch) x images/s over the fastest large matrix product
of the same run and number type, and over the data sheet's dense number where the card is known. The
models of all arms stay loaded. With --compile it took two minutes on an H200 when models were built and compiled
before; these take two more. On a CPU everything is small and proves that it runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from lib.models import load_captioner, load_encoder, load_generator
from lib.models.local import pick_device
from lib.presets import Preset, load_preset
from tests.full_size import build_all

# Dense half-precision TFLOP/s of data sheets (without sparsity), by a part of the card's name.
DATA_SHEETS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L4": 121, "T4": 65}
CAPTION = "a brown dog and two children play with a red ball on the beach beside a small boat"


@dataclass
class Arm:
    """One arm: `work` draws, captions or embeds `n` things, of `flop` each; `seconds` of each round."""

    stage: str
    name: str
    work: Callable[[], Any]
    n: int
    flop: float
    dtype: torch.dtype
    seconds: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        """Things a second, median of the rounds."""
        return self.n / float(np.median(self.seconds))


def now(device: torch.device) -> float:
    """The time, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds of some work."""
    start = now(device)
    work()
    return now(device) - start


def flop_of(work: Callable[[], Any]) -> int:
    """FLOP (2 x multiply-add) of some work of torch."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second of the fastest of several large matrix products."""
    n, repeats = (8192, 20) if device.type == "cuda" else (384, 5)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return max(2 * n**3 / timed(device, lambda: a @ b) for _ in range(repeats))


# --- the stages ---------------------------------------------------------------------------------

def documented_pipeline(preset: Preset, device: torch.device) -> Any:
    """Stable Diffusion as its page loads it; the checker is off in every arm."""
    from diffusers import StableDiffusionPipeline

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(
        preset.generator.id, dtype=dtype, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_flop(pipeline: Any, settings: Any) -> float:
    """FLOP of one image with guidance: a step's cost from two short runs, times the steps."""
    def draw(steps: int) -> int:
        return flop_of(lambda: pipeline(CAPTION, num_inference_steps=steps, guidance_scale=settings.guidance,
                                        height=settings.size, width=settings.size))

    few, more = draw(2), draw(3)
    return more + (settings.steps - 3) * (more - few)


def documented_images(preset: Preset, n: int, device: torch.device) -> Arm:
    """One image a call, as published."""
    pipeline, settings = documented_pipeline(preset, device), preset.generator
    side = settings.output_size

    def draw(steps: int, seed: int) -> Image.Image:
        image = pipeline(CAPTION, num_inference_steps=steps, guidance_scale=settings.guidance, height=settings.size,
                         width=settings.size, generator=torch.Generator(device).manual_seed(seed)).images[0]
        return image.resize((side, side))

    draw(2, 0)
    return Arm("images", "documented, one a call", lambda: [draw(settings.steps, seed) for seed in range(n)], n,
               image_flop(pipeline, settings), pipeline.unet.dtype)


def our_images(preset: Preset, batch: int, flop: float, device: torch.device, compiling: bool = False) -> Arm:
    """A batch by the project's generator."""
    settings = preset.generator.model_copy(update={"batch_size": batch, "compile": compiling})
    generator = load_generator(settings, str(device))
    texts = [CAPTION] * batch
    generator.settings = settings.model_copy(update={"steps": 2})
    generator.generate(texts, range(batch))  # warm up: libraries choose their algorithms by trial
    generator.settings = settings
    return Arm("images", f"ours, batch {batch}{', compiled' * compiling}",
               lambda: generator.generate(texts, range(batch)), batch, flop, generator.dtype)


def captions(preset: Preset, photos: list[Image.Image], device: torch.device) -> list[Arm]:
    """Ten captions a photo, of one length: one call each as published, and ours."""
    n_tokens, k = (15, 10) if device.type == "cuda" else (3, 2)
    sender = preset.captioner.sender.model_copy(update={"min_tokens": n_tokens, "max_tokens": n_tokens})
    captioner = load_captioner(preset.captioner.model_copy(update={"sender": sender}), str(device))
    model, processor = captioner.model, captioner.processor

    def documented(photo: Image.Image) -> Any:
        pixels = processor(images=photo, return_tensors="pt").pixel_values.to(device, captioner.dtype)
        return model.generate(pixel_values=pixels, do_sample=True, top_p=sender.p, top_k=0,
                              min_new_tokens=n_tokens, max_new_tokens=n_tokens)

    seeds = [list(range(k))] * len(photos)
    flop = flop_of(lambda: captioner.caption(photos[:1], seeds[:1])) / k
    documented(photos[0])
    captioner.caption(photos, seeds)
    return [Arm("captions", "documented, one a call", lambda: [documented(photos[0]) for _ in range(k)], k, flop,
                captioner.dtype),
            Arm("captions", f"ours, {k} a photo, batch {preset.captioner.batch_size}",
                lambda: captioner.caption(photos, seeds), k * len(photos), flop, captioner.dtype)]


def embeddings(preset: Preset, photos: list[Image.Image], device: torch.device) -> list[Arm]:
    """Image embeddings: one call each, and ours in one batch, preprocessing included."""
    encoder = load_encoder(preset.encoder, str(device))
    photos = photos * (16 if device.type == "cuda" else 1)
    flop = flop_of(lambda: encoder.embed_images(photos[:1]))
    encoder.embed_images(photos)
    return [Arm("embeddings", "one a call", lambda: [encoder.embed_images([photo]) for photo in photos], len(photos), flop,
                encoder.dtype),
            Arm("embeddings", f"ours, batch {len(photos)}", lambda: encoder.embed_images(photos), len(photos), flop,
                encoder.dtype)]


def measure(preset: Preset, flags: argparse.Namespace, device: torch.device) -> list[Arm]:
    """All arms, timed in turn, round after round."""
    arms = [documented_images(preset, flags.images, device)]
    flop = arms[0].flop
    arms += [our_images(preset, batch, flop, device) for batch in flags.batches]
    if flags.compile:
        arms.append(our_images(preset, flags.batches[-1], flop, device, compiling=True))
    rng = np.random.default_rng(0)  # what a photo shows does not change the time
    photos = [Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
              for _ in range(4 if device.type == "cuda" else 1)]
    arms += captions(preset, photos, device) + embeddings(preset, photos, device)
    for _ in range(flags.rounds):
        for arm in arms:
            arm.seconds.append(timed(device, arm.work))
            print(f"{arm.stage}, {arm.name}: {arm.n / arm.seconds[-1]:.3g} a second", file=sys.stderr, flush=True)
    return arms


# --- telling ------------------------------------------------------------------------------------

def table(arms: Sequence[Arm], device: torch.device) -> list[str]:
    """The table, and the peaks that it uses."""
    peaks = {dtype: peak(dtype, device) for dtype in {arm.dtype for arm in arms}}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sheet = next((value for part, value in DATA_SHEETS.items() if part in name), None)
    lines = [f"{name}; torch {torch.__version__}; large matrix products in this run: " + ", ".join(
        f"{str(dtype).removeprefix('torch.')} {value / 1e12:.3g} TFLOP/s" for dtype, value in peaks.items())
        + (f"; data sheet, dense half precision: {sheet} TFLOP/s" if sheet else ""), "",
        "| stage | arm | number type | each, ms (range) | a second | TFLOP each | TFLOP/s | of measured peak | "
        "of data sheet | against the first |", "|---|---|---|---|---|---|---|---|---|---|"]
    for arm in arms:
        first = next(other for other in arms if other.stage == arm.stage)
        rate = arm.flop * arm.per_second
        low, high = (1000 * value / arm.n for value in (min(arm.seconds), max(arm.seconds)))
        of_sheet = f"{100 * rate / (sheet * 1e12):.1f} %" if sheet and arm.dtype.itemsize == 2 else ""
        lines.append(
            f"| {arm.stage} | {arm.name} | {str(arm.dtype).removeprefix('torch.')} | {1000 / arm.per_second:.1f} "
            f"({low:.1f} to {high:.1f}) | {arm.per_second:.3g} | {arm.flop / 1e12:.3g} | {rate / 1e12:.3g} | "
            f"{100 * rate / peaks[arm.dtype]:.1f} % | {of_sheet} | {arm.per_second / first.per_second:.2f} x |")
    return lines


def main(arguments: Sequence[str] | None = None) -> list[Arm]:
    """Command line; returns the arms of the table that it prints."""
    device = pick_device()
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4 if gpu else 1, help="images of the documented loop")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32] if gpu else [1, 2], help="ours")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50 if gpu else 4)
    parser.add_argument("--size", type=int, default=512 if gpu else 64)
    parser.add_argument("--width", type=int, default=1 if gpu else 16, help="networks that many times narrower")
    parser.add_argument("--compile", action="store_true", help="a compiled arm of the last batch size too")
    parser.add_argument("--models", type=Path, help="folder of models built before, or to be built")
    parser.add_argument("--out", type=Path, help="write the table there too, as markdown")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(flags.models or temporary).resolve()
        file = folder / "full-size-random.toml"
        start = time.perf_counter()
        with torch.device(device):  # random numbers come faster from a GPU
            preset = load_preset(file if file.is_file() else build_all(folder, flags.width))
        print(f"models built in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        preset = preset.model_copy(update={"generator": preset.generator.model_copy(update={
            "steps": flags.steps, "size": flags.size, "output_size": min(256, flags.size), "safety_checker": False})})
        arms = measure(preset, flags, device)
    text = "\n".join(table(arms, device))
    print(text)
    if flags.out is not None:
        flags.out.write_text(text + "\n", encoding="utf-8")
    return arms


if __name__ == "__main__":
    main()
