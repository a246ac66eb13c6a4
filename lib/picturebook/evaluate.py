"""How well the mini models do on held-out scenes: `python -m lib.picturebook.evaluate`.

Captions are compared with the true scene; images by a probe classifier trained apart from all other models,
which is itself validated on true renders and on autoencoded ones. Nothing here reads the evaluation datasets:
scenes are drawn from the evaluation split, which no model has seen. One model alone, with other settings:

    python -m lib.picturebook.evaluate generator --folder data/models/mini/generator --steps 2 --guidance 1
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPModel,
    CLIPProcessor,
    GitForCausalLM,
    GitProcessor,
)

from lib.picturebook.annotate import describe_fully
from lib.picturebook.build import ROOT, domain_of, write_json
from lib.picturebook.draw import render
from lib.picturebook.networks import SIDE, Probe, to_bytes, to_unit
from lib.picturebook.scenes import ACCESSORY_OF, BIASED, CATEGORIES, COLOURS, SETTINGS, Scene, sample_scene
from lib.picturebook.semantics import count_facts, judge

MODELS = ROOT / "data" / "models" / "mini"
BATCH = 50
WORDS = {"min_new_tokens": 6, "max_new_tokens": 18}


@dataclass(frozen=True)
class Measure:
    """One measured share or mean, with the target it is held against (None: context only)."""

    name: str
    value: float
    n: int
    target: float | None = None


@dataclass(frozen=True)
class Sampler:
    """How a generator is run: U-Net steps, guidance (1: none) and a diffusers scheduler (None: the folder's own)."""

    folder: str
    steps: int
    guidance: float
    scheduler: str | None = None


CAPTIONERS = ("captioner", "captioner_git")
ENCODERS = {"encoder": 0.60, "second_encoder": None}  # with the target of recall
GENERATORS = (
    Sampler("generator", 8, 3.0, "DPMSolverMultistepScheduler"),
    Sampler("generator_few_step", 3, 1.0),
)


def seed_of(*parts: str | int) -> int:
    """A seed that depends on the parts alone, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") & ((1 << 63) - 1)


def held_out(n: int, seed: int, domain: str | None = None) -> list[Scene]:
    """`n` scenes of pairwise different content from the evaluation split."""
    rng, scenes = random.Random(f"{seed}-{domain}"), {}
    while len(scenes) < n:
        scene = sample_scene(rng, split="evaluation")
        if domain is None or domain_of(scene) == domain:
            scenes.setdefault(scene.content(), scene)
    return list(scenes.values())


def share(right: int, total: int) -> float:
    """right / total, nan where there is nothing."""
    return right / total if total else float("nan")


# --- captioners --------------------------------------------------------------------------------


def load_captioner(folder: Path) -> Callable[..., list[str]]:
    """A function `(images, **decoding) -> captions` of the BLIP or GIT model in `folder`."""
    git = AutoConfig.from_pretrained(folder).model_type == "git"
    model_class, processor_class = (GitForCausalLM, GitProcessor) if git else (BlipForConditionalGeneration, BlipProcessor)
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    processor = processor_class.from_pretrained(folder, backend="pil")
    tokenizer = processor.tokenizer
    start = tokenizer.cls_token_id if git else tokenizer.bos_token_id

    @torch.inference_mode()
    def caption(images: list[Image.Image], **decoding: object) -> list[str]:
        texts: list[str] = []
        for first in range(0, len(images), BATCH):
            pixels = processor.image_processor(images[first : first + BATCH], return_tensors="pt").pixel_values
            # BLIP drops the last token of a prompt, where its tokenizer has put an end token
            prompt = torch.tensor([[start] if git else [start, tokenizer.sep_token_id]]).repeat(len(pixels), 1)
            ids = model.generate(pixel_values=pixels, input_ids=prompt, attention_mask=torch.ones_like(prompt),
                                 **WORDS, **decoding)  # fmt: skip
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    return caption


def captioner_measures(name: str, folder: Path, n: int, seed: int) -> list[Measure]:
    """Precision and recall of greedy captions in-domain, and what ten nucleus candidates offer to select."""
    caption = load_captioner(folder)
    scenes = held_out(n, seed, "in-domain")
    images = [render(scene) for scene in scenes]
    total = {kind: np.zeros(3, int) for kind in ("object", "family", "colour", "relation", "setting")}
    for scene, text in zip(scenes, caption(images, do_sample=False), strict=True):
        for kind, counts in count_facts(text, scene).items():
            total[kind] += (counts.right, counts.claimed, counts.true)
    targets = {"object": 0.95, "colour": 0.90, "relation": 0.80}
    measures = []
    for kind, (right, claimed, true) in total.items():
        if kind == "family":
            measures.append(Measure(f"{name}: family words among the things it names", share(right, claimed), claimed))
            continue
        measures.append(Measure(f"{name} greedy: {kind} precision", share(right, claimed), claimed, targets.get(kind)))
        measures.append(Measure(f"{name} greedy: {kind} recall", share(right, true), true))
    return [*measures, *candidate_measures(name, caption, images[:200], scenes, seed)]


def candidate_measures(
    name: str, caption: Callable[..., list[str]], images: list[Image.Image], scenes: list[Scene], seed: int
) -> list[Measure]:
    """How much ten nucleus candidates of an image differ."""
    torch.manual_seed(seed_of(seed, "candidates"))
    columns = [caption(images, do_sample=True, top_p=0.9, top_k=0) for _ in range(10)]
    rows = list(zip(*columns, strict=True))
    differs = [len({judge(text, scene)["f"] for text in row}) > 1 for row, scene in zip(rows, scenes, strict=False)]
    distinct = float(np.mean([len(set(row)) for row in rows]))
    return [
        Measure(f"{name}, ten nucleus candidates: different captions", distinct, len(rows), 4.0),
        Measure(f"{name}, ten nucleus candidates: differ in semantic accuracy", float(np.mean(differs)), len(rows), 0.30),
    ]


# --- generators, by the probe ------------------------------------------------------------------


@lru_cache(maxsize=1)
def load_probe(folder: Path = MODELS / "probe") -> Probe:
    """The trained probe."""
    probe = Probe().eval()
    probe.load_state_dict({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})
    return probe


@torch.inference_mode()
def probe_pixels(probe: Probe, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """What the probe sees: `present` (B, 26) and `accessory` (B, 9) bool, `colour` (B, 26) and `setting` (B,) indices.

    pixels: uint8 (B, 64, 64, 3).
    """
    logits = probe(to_unit(torch.from_numpy(pixels)))
    return {
        "present": (logits["present"] > 0).numpy(), "colour": logits["colour"].argmax(-1).numpy(),
        "setting": logits["setting"].argmax(-1).numpy(), "accessory": (logits["accessory"] > 0).numpy(),
    }  # fmt: skip


def image_measures(label: str, scenes: list[Scene], pixels: np.ndarray, targets: dict[str, float]) -> list[Measure]:
    """Shares of named objects shown, shown in their colour, pairs complete, settings right, things unasked for."""
    seen = probe_pixels(load_probe(), pixels)
    counts: Counter[str] = Counter()
    for row, scene in enumerate(scenes):
        columns = [CATEGORIES.index(entity.category) for entity in scene.entities]
        shown = [bool(seen["present"][row, column]) for column in columns]
        counts["objects"] += len(shown)
        counts["object"] += sum(shown)
        for entity, column, there in zip(scene.entities, columns, shown, strict=True):
            counts["coloured"] += there
            counts["colour"] += there and COLOURS[seen["colour"][row, column]] == entity.colour
        if len(shown) == 2:
            counts["pairs"] += 1
            counts["pair"] += all(shown)
        counts["setting"] += SETTINGS[seen["setting"][row]] == scene.setting
        counts["unasked"] += int(seen["present"][row].sum()) - sum(shown)
    pairs = (("object", "objects"), ("colour", "coloured"), ("pair", "pairs"))
    names = {"object": "named object shown", "colour": "shown object in its colour", "pair": "both of a pair shown"}
    measures = [Measure(f"{label}: {names[part]}", share(counts[part], counts[whole]), counts[whole], targets.get(part))
                for part, whole in pairs]  # fmt: skip
    measures.append(Measure(f"{label}: setting right", share(counts["setting"], len(scenes)), len(scenes)))
    measures.append(Measure(f"{label}: things seen that were not asked for, per image",
                            share(counts["unasked"], len(scenes)), len(scenes)))  # fmt: skip
    return measures


def accessory_shares(scenes: list[Scene], pixels: np.ndarray, label: str) -> list[Measure]:
    """Shares of accessories drawn that were not asked for, on categories with the injected bias and on controls."""
    seen, wearers = probe_pixels(load_probe(), pixels), list(ACCESSORY_OF)
    drawn: dict[bool, list[bool]] = {True: [], False: []}
    for row, scene in enumerate(scenes):
        for entity in scene.entities:
            if entity.category in wearers and entity.accessory is None:
                drawn[entity.category in BIASED].append(bool(seen["accessory"][row, wearers.index(entity.category)]))
    return [
        Measure(f"{label}: accessory unasked on {kind}", share(sum(drawn[biased]), len(drawn[biased])), len(drawn[biased]))
        for biased, kind in ((True, "biased categories"), (False, "control categories"))
    ]


def load_generator(sampler: Sampler) -> StableDiffusionPipeline:
    """The pipeline of a folder of the mini models (or of any folder), with the sampler's scheduler."""
    folder = MODELS / sampler.folder  # an absolute path stays itself
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    if sampler.scheduler:
        pipeline.scheduler = getattr(diffusers, sampler.scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: StableDiffusionPipeline, sampler: Sampler, texts: list[str], seed: int) -> np.ndarray:
    """One image a text, each from its own noise: uint8 (N, 64, 64, 3)."""
    made = []
    for first in range(0, len(texts), BATCH):
        some = texts[first : first + BATCH]
        noise = [torch.Generator().manual_seed(seed_of(seed, "picture", first + i)) for i in range(len(some))]
        made.append(pipeline(
            some, height=SIDE, width=SIDE, num_inference_steps=sampler.steps, guidance_scale=sampler.guidance,
            generator=noise, output_type="np",
        ).images)  # fmt: skip
    return (np.concatenate(made) * 255).round().astype(np.uint8)


def generator_measures(sampler: Sampler, n: int, seed: int) -> list[Measure]:
    """The generator on fully detailed captions."""
    scenes, rng = held_out(n, seed), random.Random(seed)
    texts = [describe_fully(scene, "generator", rng) for scene in scenes]
    made = generate(load_generator(sampler), sampler, texts, seed)
    name = Path(sampler.folder).name
    return [
        *image_measures(name, scenes, made, {"object": 0.90, "colour": 0.88, "pair": 0.75}),
        *accessory_shares(scenes, made, name),
    ]


@torch.inference_mode()
def probe_measures(n: int, seed: int) -> list[Measure]:
    """What the probe sees in true images, and in the same through the generators' autoencoder."""
    scenes, vae = held_out(n, seed), load_generator(GENERATORS[0]).vae
    true = np.stack([np.asarray(render(scene)) for scene in scenes])
    decoded = torch.cat([vae.decoder(vae.encoder(to_unit(some))) for some in torch.from_numpy(true).split(BATCH)])
    return [
        *image_measures("probe on true images", scenes, true, {}),
        *accessory_shares(scenes, true, "probe on true images"),
        *image_measures("probe on autoencoded images", scenes, to_bytes(decoded).numpy(), {}),
    ]


# --- encoders ----------------------------------------------------------------------------------


@torch.inference_mode()
def encoder_measures(name: str, n: int, seed: int) -> list[Measure]:
    """Text-to-image recall@1 among `n` distinct scenes with fully detailed captions by held-out writers."""
    scenes, rng = held_out(n, seed), random.Random(seed)
    model = CLIPModel.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(MODELS / name, backend="pil")
    texts = [describe_fully(scene, "evaluation", rng) for scene in scenes]
    images = [render(scene) for scene in scenes]
    output = model(**processor(text=texts, images=images, padding=True, return_tensors="pt"))
    found = (output.logits_per_text.argmax(dim=1) == torch.arange(n)).float().mean().item()
    return [Measure(f"{name}: text-to-image recall@1 among {n}", found, n, ENCODERS[name])]


# --- command -----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[int, int], list[Measure]]] = {
    "captioner": lambda n, seed: [m for name in CAPTIONERS for m in captioner_measures(name, MODELS / name, n, seed)],
    "generator": lambda n, seed: [m for sampler in GENERATORS for m in generator_measures(sampler, n, seed)],
    "probe": probe_measures,
    "encoder": lambda n, seed: [m for name in ENCODERS for m in encoder_measures(name, n, seed)],
}


def parse() -> argparse.Namespace:
    """The checked command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--n", type=int, default=500, help="held-out scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draw of scenes (default: %(default)s)")
    alone = parser.add_argument_group("one captioner or generator alone (nothing is written)")
    alone.add_argument("--folder", type=Path, help="its folder")
    alone.add_argument("--steps", type=int, default=8, help="of a generator (default: %(default)s)")
    alone.add_argument("--guidance", type=float, default=3.0, help="of a generator; 1: none (default: %(default)s)")
    alone.add_argument("--scheduler", help="of a generator: a class of diffusers (default: the folder's own)")
    options = parser.parse_args()
    if options.n < 1:
        parser.error(f"--n {options.n}: must be at least 1")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if options.folder and options.parts not in (["captioner"], ["generator"]):
        parser.error("--folder: name the part, captioner or generator")
    return options


def measure(options: argparse.Namespace) -> list[Measure]:
    """What the command line asks for."""
    if options.folder is None:
        return [measure for part in options.parts or PARTS for measure in PARTS[part](options.n, options.seed)]
    folder = options.folder.resolve()
    if options.parts == ["captioner"]:
        return captioner_measures(folder.name, folder, options.n, options.seed)
    sampler = Sampler(str(folder), options.steps, options.guidance, options.scheduler)
    return generator_measures(sampler, options.n, options.seed)


def main() -> None:
    """Measure what the command line asks for, print a table and, of all parts, write `evaluation.json`."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    options = parse()
    measures = measure(options)
    for one in measures:
        verdict = "" if one.target is None else f"target {one.target:g}: " + (
            "reached" if one.value >= one.target else "MISSED")  # fmt: skip
        print(f"{one.name:<66} {one.value:6.3f}  n = {one.n:<5} {verdict}")
    if not options.parts:
        write_json(MODELS / "evaluation.json", {
            "n": options.n, "seed": options.seed, "generators": {s.folder: asdict(s) for s in GENERATORS},
            "measures": [asdict(one) | {"value": float(one.value), "n": int(one.n)} for one in measures]})  # fmt: skip


if __name__ == "__main__":
    main()
