"""Write the two evaluation sets in the real formats: `python -m lib.picturebook.build`.

`data/picturebook/coco`: 500 pictures of common things, five references each, COCO-captions JSON.
`data/picturebook/nocaps`: 500 pictures, ten references each, NoCaps JSON with `domain`; out-of-domain things
are rare in the captioner's training captions. Beside each: `scenes.json`, the true scene of every picture.

Two flaws are planted and known (paper 5.4.3). "family": every reference of such a picture uses the family
word (a "bird" that is a penguin), as imperfect annotators do. "accessory": the picture shows a thing that the
generator has never seen without its accessory, with that accessory, and the references mention it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import lib
from lib.picturebook.annotate import POOLS, describe
from lib.picturebook.draw import SIDE, render
from lib.picturebook.scenes import BIASED, FAMILIES, FAMILY_OF, OUT_OF_DOMAIN, Scene, World, sample_scene

ROOT = Path(lib.__file__).resolve().parent.parent
FOLDER = ROOT / "data" / "picturebook"
SEED, SIZE, FAMILY_SHARE = 2023, 500, 0.12
DOMAINS = {"in-domain": 150, "near-domain": 200, "out-domain": 150}
LICENSE = [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}]


def domain_of(scene: Scene) -> str:
    """NoCaps' domains: only common things, common and rare ones together, only rare ones."""
    rare = [entity.category in OUT_OF_DOMAIN for entity in scene.entities]
    return "out-domain" if all(rare) else "near-domain" if any(rare) else "in-domain"


def distinct_scenes(rng: random.Random, fits: Callable[[Scene], bool]) -> Iterator[Scene]:
    """Evaluation scenes of pairwise different content; biased things are twice as common as elsewhere."""
    world, seen = World(rare=BIASED, rarity=2.0), set()
    while True:
        scene = sample_scene(rng, world, "evaluation")
        if scene.content() not in seen and fits(scene):
            seen.add(scene.content())
            yield plant(scene, rng)


def plant(scene: Scene, rng: random.Random) -> Scene:
    """Mark the scene with a planted flaw, or with none."""
    if any(entity.category in BIASED for entity in scene.entities):
        worn = any(entity.category in BIASED and entity.accessory for entity in scene.entities)
        return replace(scene, planted="accessory" if worn else None)
    kin = all(len(FAMILIES[FAMILY_OF[entity.category]]) > 1 for entity in scene.entities)
    return replace(scene, planted="family" if kin and rng.random() < FAMILY_SHARE else None)


def references(scene: Scene, count: int, rng: random.Random) -> list[str]:
    """One caption each by `count` different held-out writers."""
    return [describe(scene, writer, rng) for writer in rng.sample(POOLS["evaluation"], count)]


def write_json(path: Path, content: object) -> None:
    """Write atomically, one reproducible layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_dataset(folder: Path, annotation: str, scenes: list[tuple[Scene, dict]], n_references: int, seed: int) -> None:
    """Write pictures, annotation file and scenes; `scenes` pairs each scene with extra image fields."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{seed}-references")
    images, annotations, truth = [], [], {}
    for number, (scene, extra) in enumerate(scenes, start=1):
        name = f"{number:06d}.png"
        render(scene).save(folder / "images" / name, optimize=True)
        images.append({"id": number, "file_name": name, "height": SIDE, "width": SIDE, "license": 1, **extra})
        for caption in references(scene, n_references, rng):
            annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": caption})
        truth[str(number)] = scene.to_dict()
    info = {"description": "The picture book of this compendium", "version": "1.0", "year": 2026}
    content = {"info": info, "licenses": LICENSE, "images": images, "annotations": annotations}
    write_json(folder / "annotations" / annotation, content)
    write_json(folder / "scenes.json", truth)


def build(folder: Path = FOLDER, size: int = SIZE) -> None:
    """Draw both sets; `size` pictures each, the domains in proportion."""
    rng = random.Random(f"{SEED}-coco")
    common = distinct_scenes(rng, lambda scene: domain_of(scene) == "in-domain")
    write_dataset(folder / "coco", "captions_val.json", [(next(common), {}) for _ in range(size)], 5, SEED)
    rng = random.Random(f"{SEED}-nocaps")
    drawn: list[tuple[Scene, dict]] = []
    for domain, share in DOMAINS.items():
        stream = distinct_scenes(rng, lambda scene, wanted=domain: domain_of(scene) == wanted)
        drawn += [(next(stream), {"domain": domain}) for _ in range(share * size // SIZE)]
    rng.shuffle(drawn)
    drawn = [(scene, {"open_images_id": f"pb{i:06d}", **extra}) for i, (scene, extra) in enumerate(drawn, start=1)]
    write_dataset(folder / "nocaps", "nocaps_val.json", drawn, 10, SEED + 1)


def main() -> None:
    """Parse the command line and write both sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write (default: %(default)s)")
    parser.add_argument("--size", type=int, default=SIZE, help="pictures in each set (default: %(default)s)")
    options = parser.parse_args()
    build(options.folder, options.size)
    print(f"wrote {options.size} pictures each to {options.folder / 'coco'} and {options.folder / 'nocaps'}")


if __name__ == "__main__":
    main()
