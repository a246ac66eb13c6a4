"""Rows with a planted, known effect of similarity on the score, in the exact schema of a run."""

from __future__ import annotations

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

DOMAINS = ("in-domain", "near-domain", "out-domain")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
THINGS = ("owl", "penguin", "duck", "pine", "canoe", "car", "cat", "tulip", "snowman", "tower")
FAMILIES = {"owl": "bird", "penguin": "bird", "duck": "bird", "pine": "tree", "cat": "pet"}
PLACES = {"meadow": "in a meadow", "beach": "on the beach", "snow": "in the snow"}
SEMANTICS = [f"sem_{k}_{p}" for k in ("object", "colour", "relation", "setting") for p in "prf"]
CAPTION_SCORES = (
    ["bleu1", "bleu2", "bleu3", "bleu4", "cider", "cider_d", "meteor", "rouge_l"]
    + ["spice_spacy", "spice", "clipscore", "ref_clipscore"]
)


def planted_scenes(n: int, seed: int = 0) -> dict[str, dict]:
    """n true scenes by item id, with both plants in known places."""
    rng = np.random.default_rng(seed)
    scenes = {}
    for index in range(n):
        thing = THINGS[index % len(THINGS)]
        accessory = {"snowman": "scarf", "cat": "scarf", "owl": "scarf", "tower": "flag"}.get(thing)
        drawn = accessory if rng.random() < 0.5 else None
        entity = {"category": thing, "colour": str(rng.choice(COLOURS)), "size": "big"}
        entity |= {"count": 1, "accessory": drawn}
        planted = "family" if thing in FAMILIES and index % 3 == 0 else None
        entities = [entity]
        if index % 2:
            entities.append(entity | {"category": "ball", "accessory": None})
        place = str(rng.choice(list(PLACES)))
        scenes[f"{index:04d}"] = {
            "setting": place,
            "relation": "left" if index % 2 else None,
            "entities": entities,
            "planted": planted,
        }
    return scenes


def planted_caption(scene: dict, rng: np.random.Generator) -> str:
    """A caption of the scene that may get colour, accessory or setting wrong or leave it out."""
    entity = scene["entities"][0]
    colour = entity["colour"] if rng.random() < 0.7 else str(rng.choice(COLOURS))
    worn = f" with a {entity['accessory']}" if entity["accessory"] and rng.random() < 0.5 else ""
    place = PLACES[scene["setting"]] if rng.random() < 0.8 else ""
    return f"a {colour} {entity['category']}{worn} standing {place}".strip()


def planted_rows(
    effect: float,
    n_sources: int = 120,
    n_candidates: int = 10,
    task: str = "image",
    dataset: str = "picturebook-coco",
    seed: int = 0,
) -> pd.DataFrame:
    """Rows where the score rises by `effect` per unit of within-source similarity z.

    Easy sources are similar and score high whatever the effect, so Figure 4's trend is there
    even where Figure 3's is not.
    """
    rng = np.random.default_rng(seed)
    scenes = planted_scenes(n_sources, seed)
    ease = rng.normal(size=n_sources)
    records = []
    for (item, scene), easy in zip(scenes.items(), ease, strict=True):
        domain = DOMAINS[int(item) % 3] if "nocaps" in dataset else None
        for k in range(n_candidates):
            z, noise = rng.normal(size=2)
            caption = planted_caption(scene, rng)
            score = max(0.0, 1.2 + 0.4 * easy + effect * z + 0.3 * noise)
            records.append(
                _record(task, dataset, item, domain, k, caption, score, z, easy, rng)
            )
    rows = pd.DataFrame(records)
    order = rows.sort_values(["item", "similarity", "candidate"], ascending=[True, False, True])
    rows.loc[order.index, "rank"] = order.groupby("item").cumcount() + 1
    rows["rank"] = rows["rank"].astype(int)
    rows["selected"] = rows["rank"] == 1
    return rows


def _record(task, dataset, item, domain, k, caption, score, z, easy, rng) -> dict:
    """One row; image scores lie in [-1, 1], caption scores around 1."""
    similarity = float(np.tanh(0.8 + 0.25 * easy + 0.15 * z))
    path = f"images/{item}/{k}.png"
    image = task == "image"
    row = {
        "run": f"planted-{dataset}-{task}",
        "task": task,
        "dataset": dataset,
        "item": item,
        "domain": domain,
        "candidate": k,
        "seed": k,
        "message": caption if image else path,
        "reconstruction": path if image else caption,
        "source_text": None if image else caption,
        "logprob": -8.0 - rng.random(),
        "n_words": len(caption.split()),
        "flagged": False,
        "similarity": similarity,
        "similarity_euclidean": 10 * (1 - similarity) + 0.01 * rng.random(),
        "similarity_judge": similarity + 0.05 * rng.normal(),
        "rank": 0,
        "selected": False,
    }
    for place, name in enumerate(CAPTION_SCORES):
        row[name] = score / (1 + place) if name != "spice" else None
    picture = float(np.tanh(score))
    row["cider"] = score
    row |= {"clip_score": similarity if image else picture}
    row |= {"clip_score_judge": similarity if image else picture + 0.02 * rng.normal()}
    row |= {name: min(1.0, score / 2) for name in SEMANTICS}
    return row | {"sem_f": min(1.0, score / 2)}


def planted_greedy(rows: pd.DataFrame) -> pd.DataFrame:
    """The greedy baseline of the rows' items: each source's mean score, a little better."""
    greedy = rows.groupby("item", as_index=False)[["cider", "cider_d", "rouge_l"]].mean()
    greedy[["cider", "cider_d", "rouge_l"]] *= 1.1
    captions = rows.drop_duplicates("item")["message"].to_numpy()
    return greedy.assign(kind="greedy", caption=captions)


def planted_image(scene: dict, seed: int = 0) -> Image.Image:
    """A 64 x 64 picture: a disc of the entity's colour on a ground; no likeness intended."""
    rng = np.random.default_rng(seed)
    ground = {"meadow": "#8fbf6a", "beach": "#ecd9a0", "snow": "#e9eef5"}[scene["setting"]]
    image = Image.new("RGB", (64, 64), "#a8d3ee")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 40, 64, 64), fill=ground)
    for place, entity in enumerate(scene["entities"]):
        left = int(rng.integers(4, 14)) + 28 * place
        pen.ellipse((left, 20, left + 24, 52), fill=entity["colour"], outline="#333333")
    return image
