"""How fast are our round trips beside loops over the same models? Three arms, interleaved in one process.

    python -m tests.benchmarks.loop [--sources 64] [--rounds 5] [--levers]

- *documented*: one image, one caption a call, as the pages of transformers and diffusers show it;
- *strong*: a hand-written loop with batches across sources, everything in memory: no rows, no files, no resume;
- *ours*: a run on disk, from planning to the tables of the last shard. No arm computes scores.

Each round times every arm once, in turn. The table has medians, ranges, and the speed against the documented loop. The
documented loop makes ``--slow`` sources (4), for it is slow. By hand, on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib.data import Item, load_dataset
from lib.models import Models, load_models
from lib.presets import Preset, load_preset
from lib.roundtrip import plan_run, source_text
from lib.roundtrip.run import Run

K = 10


class Plain:
    """The four models by plain transformers and diffusers, as both loops call them."""

    def __init__(self, models: Models, preset: Preset) -> None:
        self.captioner, self.processor = models.captioner.model, models.captioner.processor
        self.pipeline, self.preset = models.generator.pipeline, preset
        self.encoders = [(encoder.model, encoder._preprocess, encoder.tokenizer)
                         for encoder in (models.encoder, models.second_encoder)]

    def caption(self, images: list[Image.Image], each: int, sample: bool) -> list[str]:
        """``each`` captions of every image, flat."""
        decoding = self.preset.captioner.sender if sample else self.preset.captioner.receiver
        pixels = self.processor.image_processor(images, return_tensors="pt").pixel_values
        chosen = {"do_sample": True, "top_p": decoding.p, "top_k": 0} if sample else {"do_sample": False}
        tokens = self.captioner.generate(pixel_values=pixels, num_return_sequences=each, min_new_tokens=decoding.min_tokens,
                                         max_new_tokens=decoding.max_tokens, **chosen)
        return self.processor.batch_decode(tokens, skip_special_tokens=True)

    def draw(self, texts: list[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One image a text."""
        settings = self.preset.generator
        return self.pipeline(texts, num_inference_steps=settings.steps, guidance_scale=settings.guidance,
                             height=settings.size, width=settings.size,
                             generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images

    def images(self, images: list[Image.Image]) -> list[np.ndarray]:
        """Unit vectors of images by both encoders."""
        return [unit(model.get_image_features(**prepare(images, return_tensors="pt")).pooler_output)
                for model, prepare, _ in self.encoders]

    def texts(self, texts: list[str]) -> list[np.ndarray]:
        """Unit vectors of texts by both encoders."""
        return [unit(model.get_text_features(**tokenizer(texts, padding="max_length", truncation=True,
                                                         return_tensors="pt")).pooler_output)
                for model, _, tokenizer in self.encoders]


def unit(vectors: torch.Tensor) -> np.ndarray:
    """Vectors of length one."""
    return torch.nn.functional.normalize(vectors, dim=-1).numpy()


def loop(plain: Plain, task: str, items: Sequence[Item], at_once: int, image_batch: int) -> list[int]:
    """The selected candidates of the items, ``at_once`` sources together and ``image_batch`` images a call."""
    selected: list[int] = []
    for start in range(0, len(items), at_once):
        part = items[start : start + at_once]

        def draw(texts: list[str]) -> list[Image.Image]:
            parts = [plain.draw(texts[i : i + image_batch], range(i, i + len(texts[i : i + image_batch])))
                     for i in range(0, len(texts), image_batch)]
            return [image for images in parts for image in images]

        if task == "image":
            sources = [item.image() for item in part]
            captions = plain.caption(sources, K, sample=True) if at_once > 1 else [
                plain.caption(sources, 1, sample=True)[0] for _ in range(K)]
            plain.caption(sources, 1, sample=False)  # the greedy baseline
            pairs = list(zip(plain.images(sources), embed(plain.images, draw(captions), at_once), strict=True))
        else:
            texts = [source_text(item, "picturebook-coco", 0) for item in part]
            images = draw([text for text in texts for _ in range(K)])
            captions = plain.caption(images, 1, sample=False) if at_once > 1 else [
                plain.caption([image], 1, sample=False)[0] for image in images]
            pairs = list(zip(plain.texts(texts), embed(plain.texts, captions, at_once), strict=True))
            for _ in embed(plain.images, [*images, *(item.image() for item in part)], at_once):
                pass  # the CLIP score of the images (4.3)
        similarity = (pairs[0][1].reshape(len(part), K, -1) * pairs[0][0][:, None]).sum(-1)
        selected += similarity.argmax(1).tolist()
    return selected


def embed(by: Callable[[list[Any]], list[np.ndarray]], things: list[Any], at_once: int) -> list[np.ndarray]:
    """Vectors by both encoders: all together, or one thing a call."""
    if at_once > 1:
        return by(things)
    return [np.concatenate(parts) for parts in zip(*(by([thing]) for thing in things), strict=True)]


def ours(models: Models, preset: Preset, task: str, n: int, workers: int = 1) -> None:
    """A run of n sources on disk, from planning to its last shard."""
    with tempfile.TemporaryDirectory() as folder:
        run = plan_run(preset, load_dataset("picturebook-coco").subset(n, 0), task, K, 0, Path(folder))
        run.execute(workers, models=models if workers == 1 else None, progress=False)


def changed(preset: Preset, part: str = "", **update: Any) -> Preset:
    """The preset with other values, of itself or of one part."""
    inner = getattr(preset, part).model_copy(update=update) if part else None
    return preset.model_copy(update={part: inner} if part else update)


def measure(arms: Mapping[str, tuple[int, Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds a source of every arm, once each in every round after a first that only warms up."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, (n, work) in arms.items():
            begun = time.perf_counter()
            with torch.inference_mode():
                work()
            if turn:
                taken[name].append(1000 * (time.perf_counter() - begun) / n)
    return taken


def tell(task: str, taken: Mapping[str, list[float]]) -> None:
    """Print one line for each arm: median (range), and how ours compares, as the median of the rounds' ratios."""
    for name, values in taken.items():
        ratio = statistics.median(a / b for a, b in zip(values, taken["ours"], strict=True))
        print(f"| {task} | {name} | {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}) | "
              f"{ratio:.2f} x |", flush=True)


def main() -> None:
    """Time all arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=64)
    parser.add_argument("--slow", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--levers", action="store_true", help="what each setting of ours is worth, instead of the loops")
    flags = parser.parse_args()
    Run._score = lambda self, *_: None  # scores are excluded from all arms
    preset, n = load_preset("mini"), flags.sources
    models = load_models(preset)
    plain, items = Plain(models, preset), load_dataset("picturebook-coco").subset(n, 0).items
    print(f"preset mini, {K} candidates, {n} sources, {os.cpu_count()} cores, torch {torch.__version__}, {flags.rounds} "
          "interleaved rounds\n\n| task | arm | ms a source, median (range) | ours is faster by |\n|---|---|---|---|")
    for task in ("image", "text"):
        arms = {"ours": (n, partial(ours, models, preset, task, n))}
        if flags.levers:
            single, big = changed(preset, shards_at_once=1), changed(preset, "generator", batch_size=64)
            half = changed(preset, "generator", dtype="bfloat16")
            arms |= {name: (n, partial(ours, loaded, other, task, n, workers)) for name, loaded, other, workers in (
                ("one shard at a time", models, single, 1), ("two processes, start included", models, single, 2),
                ("64 images a batch", load_models(big), big, 1), ("generator in bfloat16", load_models(half), half, 1))}
        else:
            arms |= {"documented loop": (flags.slow, partial(loop, plain, task, items[: flags.slow], 1, 1)),
                     "strong loop": (n, partial(loop, plain, task, items, 16, 32))}
        tell(task, measure(arms, flags.rounds))


if __name__ == "__main__":
    main()
