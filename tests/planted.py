"""Finished runs with a planted, known answer: rows in the exact schema, where ``open_runs`` finds them.

For tests of notebooks (COMPENDIUM_RUNS is a folder of the test's own, see ``conftest.py``)::

    runs = planted.write(effect=0.3, n_sources=24)     # preset mini, both datasets, both tasks
    # execute a notebook with N_SOURCES=24; its rows are these

``write(dataset=..., n_candidates=..., seed=..., preset=...)`` takes what ``open_runs`` takes; ``change(rows)`` may
alter the rows of each run before they are written (flag images, drop scores, ...). Every source is a real item of its
dataset; captions and images are made up. What is planted:

- ``effect``: how much the primary score (``cider`` in the image task, ``clip_score`` in the text task) rises with the
  similarity within a source, in units of the noise 0.3. Positive: selection helps. 0: it does not. Negative: it harms.
- easy sources are similar and score high whatever the effect: Figure 4's trend is there where Figure 3's is not;
- greedy captions score 1.1 times their source's mean; the other scores follow ``cider``; ``spice`` is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from lib.base import stable_seed
from lib.metrics import CAPTION_SCORES, SEMANTIC_SCORES
from lib.roundtrip import Run, Runs, open_runs
from lib.roundtrip.run import BASELINE_COLUMNS, ROW_COLUMNS, ranked, write_json, write_table
from lib.roundtrip.steps import safe_part

DOMAINS = ("in-domain", "near-domain", "out-domain")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
THINGS = ("owl", "penguin", "duck", "pine", "canoe", "car", "cat", "tulip", "snowman", "tower")
FAMILIES = {"owl": "bird", "penguin": "bird", "duck": "bird", "pine": "tree", "cat": "pet"}
PLACES = {"meadow": "in a meadow", "beach": "on the beach", "snow": "in the snow"}
MISSING = {"spice": "planted rows have none"}


def write(preset: str = "mini", dataset: str = "all", n_sources: int = 24, n_candidates: int = 0, seed: int = 0,
          effect: float = 0.3, change: Callable[[pd.DataFrame], pd.DataFrame] | None = None) -> Runs:
    """Write a finished run with planted rows for each dataset and task of the parameters; the runs, opened again."""
    for run in open_runs(preset, dataset, n_sources, n_candidates, seed).runs.values():
        write_run(run, effect, change)
    return open_runs(preset, dataset, n_sources, n_candidates, seed)


def write_run(run: Run, effect: float = 0.3, change: Callable[[pd.DataFrame], pd.DataFrame] | None = None) -> None:
    """Write planted rows, images (one a source) and baselines into a run's folder, as if it were executed."""
    scenes = {item.id: item.scene for item in run.dataset.items}
    domains = {item.id: item.domain for item in run.dataset.items}
    rows = planted_rows(effect, len(scenes), run.n_candidates, run.task, run.dataset.name, run.seed, scenes, domains)
    rows = rows.assign(run=run.name)
    rows = rows if change is None else change(rows)
    flagged = rows.loc[rows["flagged"], "item"]
    greedy = planted_greedy(rows) if run.task == "image" else pd.DataFrame()
    write_table(run.folder / "baselines.parquet", greedy, BASELINE_COLUMNS)
    write_table(run.folder / "rows.parquet", rows, ROW_COLUMNS)
    for item, scene in scenes.items():
        path = run.folder / "images" / safe_part(item) / "0.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        planted_image(scene or _scene("owl", "blue", "meadow")).save(path)
    write_json(run.folder / "run.json", {
        "run": run.name, "task": run.task, "dataset": {"name": run.dataset.name}, "n_candidates": run.n_candidates,
        "seed": run.seed, "identity": run.identity, "made_by": {"commit": None}, "loaded": {},
        "counts": {"rows": len(rows), "flagged": len(flagged), "flagged_sources": flagged.nunique(),
                   "truncated_prompts": int(rows["truncated"].sum())}, "missing_scores": MISSING})
    counted = {"sources": len(scenes), "captions": len(rows), "images": len(rows)}
    write_json(run.folder / "cost.json", counted | {"wall": 12.5, "seconds: caption": 2.5, "seconds: generate": 10.0})


def _scene(thing: str, colour: str, place: str, accessory: str | None = None, **more: Any) -> dict[str, Any]:
    entity = {"category": thing, "colour": colour, "size": "big", "count": 1, "accessory": accessory}
    return {"setting": place, "relation": None, "entities": [entity], "planted": None} | more


def planted_scenes(n: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """n true scenes by item id, with both injected biases in known places."""
    rng, scenes = np.random.default_rng(seed), {}
    for index in range(n):
        thing = THINGS[index % len(THINGS)]
        accessory = {"snowman": "scarf", "cat": "scarf", "owl": "scarf", "tower": "flag"}.get(thing)
        accessory = accessory if rng.random() < 0.5 else None
        family = "family" if thing in FAMILIES and index % 3 == 0 else None
        scene = _scene(thing, str(rng.choice(COLOURS)), str(rng.choice(list(PLACES))), accessory, planted=family)
        if index % 2:
            scene["entities"].append(scene["entities"][0] | {"category": "ball", "accessory": None})
            scene["relation"] = "left"
        scenes[f"{index:04d}"] = scene
    return scenes


def planted_caption(scene: Mapping[str, Any] | None, rng: np.random.Generator) -> str:
    """A caption of the scene that may get colour, accessory or setting wrong or leave it out."""
    scene = scene or _scene(*(str(rng.choice(list(words))) for words in (THINGS, COLOURS, PLACES)))
    entity = scene["entities"][0]
    colour = entity["colour"] if rng.random() < 0.7 else str(rng.choice(COLOURS))
    worn = f" with a {entity['accessory']}" if entity["accessory"] and rng.random() < 0.5 else ""
    place = PLACES.get(scene["setting"], "") if rng.random() < 0.8 else ""
    return f"a {colour} {entity['category']}{worn} standing {place}".strip()


def planted_rows(effect: float, n_sources: int = 120, n_candidates: int = 10, task: str = "image",
                 dataset: str = "picturebook-coco", seed: int = 0, scenes: Mapping[str, Any] | None = None,
                 domains: Mapping[str, str | None] | None = None) -> pd.DataFrame:
    """Ranked rows where the primary score rises by `effect` per unit of within-source similarity z.

    scenes: true scenes by item id, planted ones if None; domains: by item id, of NoCaps in turn if None.
    """
    rng, records = np.random.default_rng(stable_seed(seed, "planted", dataset, task)), []
    scenes = planted_scenes(n_sources, seed) if scenes is None else scenes
    if domains is None:
        domains = {item: DOMAINS[i % 3] if "nocaps" in dataset else None for i, item in enumerate(scenes)}
    for item, scene in scenes.items():
        ease = rng.normal()
        for k in range(n_candidates):
            z, noise = rng.normal(size=2)
            score = max(0.0, 1.2 + 0.4 * ease + effect * z + 0.3 * noise)
            similarity = float(np.tanh(0.8 + 0.25 * ease + 0.15 * z))
            records.append({"run": f"planted-{dataset}-{task}", "task": task, "dataset": dataset, "item": item,
                            "domain": domains[item], "candidate": k, "seed": k, "flagged": False, "truncated": False,
                            "logprob": -8.0 - rng.random(), **_said(task, item, planted_caption(scene, rng)),
                            **_scores(task, similarity, score, rng)})
    return ranked(pd.DataFrame(records)).reindex(columns=list(ROW_COLUMNS))


def _said(task: str, item: str, caption: str) -> dict[str, Any]:
    image, words = f"images/{safe_part(item)}/0.png", len(caption.split())
    if task == "image":
        return {"message": caption, "reconstruction": image, "source_text": None, "n_words": words}
    return {"message": image, "reconstruction": caption, "source_text": f"the text of {item}", "n_words": words}


def _scores(task: str, similarity: float, score: float, rng: np.random.Generator) -> dict[str, float | None]:
    """The score columns: image scores lie in [-1, 1], caption scores around 1, semantic ones in [0, 1]."""
    row = {name: None if name in MISSING else score / (1 + place) for place, name in enumerate(CAPTION_SCORES)}
    row |= {"cider": score, "clipscore": score / 11, "ref_clipscore": score / 12}
    quality = similarity if task == "image" else float(np.tanh(score))
    second = similarity + 0.05 * rng.normal()
    row |= dict.fromkeys(SEMANTIC_SCORES, min(1.0, score / 2))
    return row | {"similarity": similarity, "similarity_euclidean": 10 * (1 - similarity) + 0.01 * rng.random(),
                  "similarity_second": second, "clip_score": quality,
                  "clip_score_second": second if task == "image" else quality + 0.02 * rng.normal()}


def planted_greedy(rows: pd.DataFrame) -> pd.DataFrame:
    """The greedy baseline of the rows' items: 1.1 times each source's mean score."""
    scores = [name for name in (*CAPTION_SCORES, *SEMANTIC_SCORES, "clipscore", "ref_clipscore") if name not in MISSING]
    first = rows.drop_duplicates("item").set_index("item")
    greedy = 1.1 * rows.groupby("item")[scores].mean().reindex(first.index)
    greedy = greedy.join(first[["run", "task", "dataset", "domain", "logprob", "n_words"]])
    return greedy.assign(kind="greedy", caption=first["message"]).reset_index().reindex(columns=list(BASELINE_COLUMNS))


def planted_image(scene: Mapping[str, Any], seed: int = 0) -> Image.Image:
    """A 64 x 64 image: a disc of each entity's colour on a ground; no likeness intended."""
    rng, image = np.random.default_rng(seed), Image.new("RGB", (64, 64), "#a8d3ee")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 40, 64, 64), fill={"meadow": "#8fbf6a", "beach": "#ecd9a0"}.get(scene["setting"], "#e9eef5"))
    for place, entity in enumerate(scene["entities"][:2]):
        left = int(rng.integers(4, 14)) + 28 * place
        colour = entity["colour"] if entity["colour"] in COLOURS else "grey"
        pen.ellipse((left, 20, left + 24, 52), fill=colour, outline="#333333")
    return image
