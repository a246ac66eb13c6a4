"""How well the mini models do on held-out scenes: `python -m lib.picturebook.evaluate`.

Captions are judged against the true scene; pictures by a probe classifier trained apart from the three
models, which is itself validated on true renders and on autoencoded ones. Nothing here reads the
evaluation datasets: scenes are drawn from the evaluation split, which no model has seen.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from lib.errors import UserError
from lib.models import load_captioner, load_encoder, load_generator
from lib.picturebook.annotate import describe_fully
from lib.picturebook.build import ROOT, domain_of, write_json
from lib.picturebook.draw import render
from lib.picturebook.networks import Probe, to_unit
from lib.picturebook.scenes import ACCESSORY_OF, BIASED, CATEGORIES, COLOURS, SETTINGS, Scene, sample_scene
from lib.picturebook.semantics import count_facts, judge
from lib.presets import get_preset
from lib.seeds import stable_seed

MODELS = ROOT / "data" / "models" / "mini"


@dataclass(frozen=True)
class Measure:
    """One measured share or mean, with the target it is held against (None: context only)."""

    name: str
    value: float
    n: int
    target: float | None = None


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


# --- captioner ---------------------------------------------------------------------------------


def captioner_measures(n: int, seed: int) -> list[Measure]:
    """Precision and recall of greedy captions in-domain, and what ten nucleus candidates offer to select."""
    spec = get_preset("mini").captioner
    captioner = load_captioner(spec)
    scenes = held_out(n, seed, "in-domain")
    pictures = [render(scene) for scene in scenes]
    greedy = captioner.caption(pictures, [[0]] * n, spec.receiver)
    total = {kind: np.zeros(3, int) for kind in ("object", "family", "colour", "relation", "setting")}
    for scene, [caption] in zip(scenes, greedy, strict=True):
        for kind, counts in count_facts(caption.text, scene).items():
            total[kind] += (counts.right, counts.claimed, counts.true)
    targets = {"object": 0.95, "colour": 0.90, "relation": 0.80}
    measures = []
    for kind, (right, claimed, true) in total.items():
        if kind == "family":
            measures.append(Measure("captioner: family words among the things it names", share(right, claimed), claimed))
            continue
        measures.append(Measure(f"captioner greedy: {kind} precision", share(right, claimed), claimed, targets.get(kind)))
        measures.append(Measure(f"captioner greedy: {kind} recall", share(right, true), true))
    few = min(n, 200)
    seeds = [[stable_seed(seed, "candidate", i, k) for k in range(10)] for i in range(few)]
    drawn = captioner.caption(pictures[:few], seeds, spec.sender)
    texts = [[caption.text for caption in row] for row in drawn]
    differs = [len({judge(t, scene)["f"] for t in row}) > 1 for row, scene in zip(texts, scenes, strict=False)]
    return [
        *measures,
        Measure("ten nucleus candidates: different captions", float(np.mean([len(set(row)) for row in texts])), few, 4.0),
        Measure("ten nucleus candidates: differ in semantic accuracy", float(np.mean(differs)), few, 0.30),
    ]


# --- generator, by the probe -------------------------------------------------------------------


def load_probe(folder: Path = MODELS / "probe") -> Probe:
    """The trained probe; UserError if its weights are absent."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is absent: run python -m lib.picturebook.train probe")
    probe = Probe().eval()
    probe.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
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


def picture_measures(label: str, scenes: list[Scene], pixels: np.ndarray, targets: dict[str, float]) -> list[Measure]:
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
    measures.append(Measure(f"{label}: things seen that were not asked for, per picture",
                            share(counts["unasked"], len(scenes)), len(scenes)))  # fmt: skip
    return measures


def accessory_shares(scenes: list[Scene], pixels: np.ndarray, label: str) -> list[Measure]:
    """How often an accessory that was not asked for is drawn, on biased categories and on controls."""
    seen, wearers = probe_pixels(load_probe(), pixels), list(ACCESSORY_OF)
    drawn: dict[bool, list[bool]] = {True: [], False: []}
    for row, scene in enumerate(scenes):
        for entity in scene.entities:
            if entity.category in wearers and entity.accessory is None:
                drawn[entity.category in BIASED].append(bool(seen["accessory"][row, wearers.index(entity.category)]))
    return [
        Measure(f"{label}: accessory unasked on {kind}", float(np.mean(drawn[biased])), len(drawn[biased]))
        for biased, kind in ((True, "biased categories"), (False, "control categories"))
    ]


def generator_measures(n: int, seed: int) -> list[Measure]:
    """The generator on fully detailed captions, and the probe on true and on autoencoded pictures."""
    generator = load_generator(get_preset("mini").generator)
    scenes = held_out(n, seed)
    rng = random.Random(seed)
    texts = [describe_fully(scene, "generator", rng) for scene in scenes]
    made = generator.generate(texts, [stable_seed(seed, "picture", i) for i in range(n)]).pixels
    true = np.stack([np.asarray(render(scene)) for scene in scenes])
    with torch.inference_mode():
        vae = generator.pipeline.vae
        decoded = vae.decoder(vae.encoder(to_unit(torch.from_numpy(true)))).clamp(-1, 1)
    autoencoded = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [
        *picture_measures("generator", scenes, made, {"object": 0.85, "colour": 0.85, "pair": 0.70}),
        *accessory_shares(scenes, made, "generator"),
        *picture_measures("probe on true pictures", scenes, true, {}),
        *accessory_shares(scenes, true, "probe on true pictures"),
        *picture_measures("probe on autoencoded pictures", scenes, autoencoded, {}),
    ]


# --- encoders ----------------------------------------------------------------------------------


def encoder_measures(n: int, seed: int) -> list[Measure]:
    """Text-to-image recall@1 among `n` distinct scenes with fully detailed captions by held-out writers."""
    preset, scenes, rng = get_preset("mini"), held_out(n, seed), random.Random(seed)
    texts = [describe_fully(scene, "evaluation", rng) for scene in scenes]
    pictures = [render(scene) for scene in scenes]
    measures = []
    for name, spec, target in (("encoder", preset.encoder, 0.60), ("judge", preset.judge, None)):
        encoder = load_encoder(spec)
        images, captions = encoder.embed_images(pictures), encoder.embed_texts(texts)
        images /= np.linalg.norm(images, axis=1, keepdims=True)
        captions /= np.linalg.norm(captions, axis=1, keepdims=True)
        found = (captions @ images.T).argmax(axis=1) == np.arange(n)
        measures.append(Measure(f"{name}: text-to-image recall@1 among {n}", float(found.mean()), n, target))
    return measures


# --- command -----------------------------------------------------------------------------------

PARTS = {"captioner": captioner_measures, "generator": generator_measures, "encoder": encoder_measures}


def main() -> None:
    """Parse the command line, measure, print a table and write `data/models/mini/evaluation.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--n", type=int, default=500, help="held-out scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draw of scenes (default: %(default)s)")
    options = parser.parse_args()
    if options.n < 1:
        parser.error(f"--n {options.n}: must be at least 1")
    parts = options.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    measures = [measure for part in parts for measure in PARTS[part](options.n, options.seed)]
    for measure in measures:
        verdict = "" if measure.target is None else f"target {measure.target:g}: " + (
            "reached" if measure.value >= measure.target else "MISSED")  # fmt: skip
        print(f"{measure.name:<62} {measure.value:6.3f}  n = {measure.n:<5} {verdict}")
    if parts == list(PARTS):
        record = {"n": options.n, "seed": options.seed, "measures": [
            {"name": m.name, "value": float(m.value), "n": int(m.n), "target": m.target} for m in measures]}
        write_json(MODELS / "evaluation.json", record)


if __name__ == "__main__":
    main()
