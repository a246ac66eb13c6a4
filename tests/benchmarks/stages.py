"""Time of each stage of the game, and of the same work done by a plain loop, as a ratio.

    python -m tests.benchmarks.stages [--dataset picturebook-coco] [--sources 8] [--rounds 4]

The plain arm does what the libraries' own pages show first: one picture at a time, one caption or
image a call, nothing shared. Both arms use the same loaded weights, decoding and sampler, and they
take turns on the same sources within one process, so that a busy machine slows both alike.
Run by hand; the tests do not.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib import scorecard
from lib.datasets import Dataset, Item, load_dataset
from lib.game import TASKS, Shard, play_shard, source_text
from lib.metrics import Corpus
from lib.players import Models, load_models
from lib.presets import Decoding, Preset, get_preset

# --- the plain arm ---------------------------------------------------------------------------

def caption_once(models: Models, image: Image.Image, decoding: Decoding) -> str:
    """One caption, as BLIP's page shows it."""
    captioner = models.captioner
    inputs = captioner.processor(images=image, return_tensors="pt")
    sampling = {} if decoding.deterministic else {"do_sample": True, "top_p": decoding.p, "top_k": 0}
    tokens = captioner.model.generate(**inputs, max_new_tokens=decoding.max_tokens, **sampling)
    return captioner.processor.decode(tokens[0], skip_special_tokens=True)


def draw_once(models: Models, preset: Preset, text: str, seed: int) -> Image.Image:
    """One image, as Stable Diffusion's page shows it."""
    spec = preset.generator
    output = models.generator.pipeline(
        text, num_inference_steps=spec.steps, guidance_scale=spec.guidance, height=spec.size,
        width=spec.size, generator=torch.Generator().manual_seed(seed))
    return output.images[0].resize((spec.output_size, spec.output_size))


def embed_once(encoder: Any, content: Image.Image | str) -> np.ndarray:
    """One embedding (d,), as CLIP's page shows it."""
    if isinstance(content, str):
        inputs = encoder.processor(text=[content], return_tensors="pt", truncation=True)
        features = encoder.model.get_text_features(**inputs)
    else:
        inputs = encoder.processor(images=content, return_tensors="pt")
        features = encoder.model.get_image_features(**inputs)
    return features.pooler_output[0].numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors (d,)."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def encoders_of(models: Models) -> list[Any]:
    """The ranking encoder and, where the preset has one, the judge."""
    return [encoder for encoder in (models.encoder, models.judge) if encoder is not None]


@torch.no_grad()
def plain_image(item: Item, shard: Shard, models: Models) -> list[float]:
    """Image reconstruction of one source: K similarities by each encoder."""
    source, similarities = item.image(), []
    targets = [(encoder, embed_once(encoder, source)) for encoder in encoders_of(models)]
    for k in range(shard.n_candidates):
        caption = caption_once(models, source, shard.preset.captioner.sender)
        drawn = draw_once(models, shard.preset, caption, k)
        similarities += [cosine(target, embed_once(encoder, drawn)) for encoder, target in targets]
    return similarities


@torch.no_grad()
def plain_text(item: Item, shard: Shard, models: Models) -> list[float]:
    """Text reconstruction of one source: K similarities by each encoder."""
    text, similarities = source_text(item, shard.dataset, shard.seed), []
    targets = [(encoder, embed_once(encoder, text)) for encoder in encoders_of(models)]
    for k in range(shard.n_candidates):
        drawn = draw_once(models, shard.preset, text, k)
        caption = caption_once(models, drawn, shard.preset.captioner.receiver)
        similarities += [cosine(target, embed_once(encoder, caption)) for encoder, target in targets]
    return similarities


PLAIN: dict[str, Callable[[Item, Shard, Models], list[float]]] = {
    "image": plain_image, "text": plain_text}


# --- the rounds ------------------------------------------------------------------------------

def shard_of(dataset: Dataset, items: Sequence[Item], preset: Preset) -> Shard:
    """A shard of these sources with the preset's sizes."""
    return Shard(run="benchmark", dataset=dataset.name, preset=preset, items=tuple(items),
                 n_candidates=preset.n_candidates, seed=preset.seed)


def time_ours(shard: Shard, task: str, models: Models, corpus: Corpus) -> Counter[str]:
    """Seconds by stage of one shard, playing and scoring."""
    start = time.perf_counter()
    played = play_shard(shard, TASKS[task], models)
    total = time.perf_counter() - start
    seconds = Counter(played.cost.seconds)
    seconds["rest of playing"] = total - sum(seconds.values())
    start = time.perf_counter()
    scorecard.score_rows(played.rows, {item.id: item for item in shard.items}, corpus)
    seconds["scores"] = time.perf_counter() - start
    return seconds


def time_plain(shard: Shard, task: str, models: Models) -> float:
    """Seconds of the plain loop over the shard's sources, playing only."""
    start = time.perf_counter()
    for item in shard.items:
        PLAIN[task](item, shard, models)
    return time.perf_counter() - start


def measure(task: str, shards: Sequence[Shard], models: Models, corpus: Corpus) -> None:
    """Let both arms take turns over the shards and print the table of one task."""
    stages: Counter[str] = Counter()
    ratios: list[float] = []
    for number, shard in enumerate(shards):
        if number % 2:  # neither arm is always the first to open the pictures
            plain, seconds = time_plain(shard, task, models), time_ours(shard, task, models, corpus)
        else:
            seconds, plain = time_ours(shard, task, models, corpus), time_plain(shard, task, models)
        stages.update(seconds)
        ratios.append(plain / (sum(seconds.values()) - seconds["scores"]))
    sources = sum(len(shard.items) for shard in shards)
    print(f"\n{task} reconstruction, {sources} sources with {shards[0].n_candidates} candidates")
    for stage, total in stages.most_common():
        print(f"  {stage:<16} {1000 * total / sources:8.1f} ms a source")
    print(f"  plain loop / ours, playing only: {median(ratios):.1f} times "
          f"(by round: {', '.join(f'{ratio:.1f}' for ratio in ratios)})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--dataset", default="picturebook-coco")
    parser.add_argument("--sources", type=int, default=8, help="sources a round")
    parser.add_argument("--rounds", type=int, default=4)
    flags = parser.parse_args()
    preset = get_preset(flags.preset)
    dataset = load_dataset(flags.dataset, (flags.rounds + 1) * flags.sources)
    models = load_models(preset)
    corpus = Corpus.build(dataset.references)
    parts = [dataset.items[start:start + flags.sources]
             for start in range(0, len(dataset), flags.sources)]
    shards = [shard_of(dataset, part, preset) for part in parts]
    print(f"preset {preset.name}, {torch.get_num_threads()} threads, "
          f"{models.generator.device.type}, {flags.rounds} rounds of {flags.sources} sources")
    for task in TASKS:
        time_ours(shards[-1], task, models, corpus)  # warm up both arms outside the rounds
        time_plain(shard_of(dataset, shards[-1].items[:1], preset), task, models)
        measure(task, shards[:flags.rounds], models, corpus)


if __name__ == "__main__":
    main()
