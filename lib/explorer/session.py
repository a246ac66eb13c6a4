"""One source at a time, in plain functions: what the explorer's page and the cells of notebook 00 call.

::

    trip = Trip(pick_item("picturebook-coco", "88"), "image", load_preset("mini"), "picturebook-coco")
    for candidates in reconstruct(trip, models_for(trip.preset)):   # grows as models answer
        print(table(candidates))

Seeds, comparison and ranks are those of ``lib.roundtrip``, so that a source of a dataset has the same
rows here as in a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from lib import ranking
from lib.base import UserError
from lib.data import Dataset, Item, decode_image, load_dataset
from lib.metrics import References, clipscore, score_captions, score_semantics
from lib.models import Images, Models, load_captioner, load_encoder, load_generator
from lib.presets import Preset
from lib.roundtrip.run import Run, runs_root
from lib.roundtrip.steps import candidate_seeds, noise_seeds, source_text

FIRST_SOURCE = {"picturebook-coco": "107"}  # what a fresh page shows: a source with a clear winner
OWN = "own"  # the dataset that own images and texts belong to, in seeds
QUICK_SCORES = ("bleu4", "cider", "rouge_l")  # METEOR and SPICE take seconds: runs have them


@dataclass(frozen=True)
class Given(Item):
    """A source that lies in no dataset: an image in memory or a typed text."""

    pixels: Image.Image | None = field(default=None, compare=False)

    def image(self) -> Image.Image:
        """Return the image in RGB; UserError for a text."""
        if self.pixels is None:
            raise UserError("this source is a text and has no image: choose text reconstruction")
        return self.pixels


def uploaded(content: bytes, name: str, captions: Sequence[str] = ()) -> Given:
    """Return an image file's bytes as a source; UserError if they are no image. Its id is their hash."""
    return Given(hashlib.sha256(content).hexdigest()[:12], None, tuple(captions), pixels=decode_image(content, name))


def typed(text: str) -> Given:
    """Return a typed text as a source; UserError if it is empty."""
    words = " ".join(text.split())
    if not words:
        raise UserError("the text is empty: type a text first")
    return Given(hashlib.sha256(words.encode()).hexdigest()[:12], None, (words,))


@lru_cache(maxsize=4)
def dataset(name: str) -> Dataset:
    """Return a dataset by name, read once."""
    return load_dataset(name)


def pick_item(name: str, item: str) -> Item:
    """Return an item of a dataset by its id."""
    return dataset(name).by_id()[item]


@lru_cache(maxsize=6)
def _model(kind: str, settings: str) -> Any:
    """A loaded model, kept for the next use; settings as JSON."""
    from lib.presets import CaptionerSettings, EncoderSettings, GeneratorSettings

    load, parse = {"captioner": (load_captioner, CaptionerSettings), "generator": (load_generator, GeneratorSettings),
                   "encoder": (load_encoder, EncoderSettings)}[kind]
    return load(parse.model_validate_json(settings))


def models_for(preset: Preset) -> Models:
    """Return a preset's models; those with equal settings are loaded once."""
    second = preset.second_encoder
    return Models(*(_model(kind, getattr(preset, kind).model_dump_json()) for kind in ("captioner", "generator", "encoder")),
                  None if second is None else _model("encoder", second.model_dump_json()))


# --- a round trip and its candidates -----------------------------------------------------------


@dataclass(frozen=True)
class Trip:
    """One source, one direction ("image" or "text"), and all else that decides what comes out."""

    source: Item
    task: str
    preset: Preset
    dataset: str = OWN
    n_candidates: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task == "image" and self.image is None:
            raise UserError("this source is a text: choose text reconstruction")
        if self.task == "text" and not self.source.references:
            raise UserError("this image has no caption to start from: choose image reconstruction, or type a text")

    @property
    def text(self) -> str | None:
        """The text that text reconstruction starts from."""
        return source_text(self.source, self.dataset, self.seed) if self.task == "text" else None

    @property
    def image(self) -> Image.Image | None:
        """The source's image, if it has one."""
        return self.source.image() if self.source.path or getattr(self.source, "pixels", None) else None


@dataclass(frozen=True, eq=False)
class Candidate:
    """One candidate as far as it is made; None and NaN: not yet, or not to be had.

    caption: the candidate in image reconstruction, the reconstruction in text reconstruction; image: the
    other one, uint8 (H, W, 3); similarity: by the preset's choice; second: cosine of the second encoder.
    """

    index: int
    seed: int
    caption: str | None = None
    image: np.ndarray | None = None
    logprob: float = np.nan
    flagged: bool = False
    truncated: bool = False
    similarity: float = np.nan
    second: float = np.nan
    scores: dict[str, float] = field(default_factory=dict)


def reconstruct(trip: Trip, models: Models) -> Iterator[list[Candidate]]:
    """Yield the candidates each time a model has answered: first unfinished, at last all compared."""
    source = (trip.dataset, [trip.source], trip.n_candidates, trip.seed)
    noise = (noise_seeds(trip.preset, *source) if trip.task == "image" else candidate_seeds("noise", *source))[0]
    if trip.task == "image":
        seeds = candidate_seeds("caption", *source)[0]
        captions = models.captioner.caption([trip.image], [seeds], trip.preset.captioner.sender)[0]
        made = [Candidate(k, seed, c.text, None, c.logprob)
                for k, (seed, c) in enumerate(zip(seeds, captions, strict=True))]
    else:
        made = [Candidate(k, seed) for k, seed in enumerate(noise)]
    yield made
    for k, candidate in enumerate(made):
        candidate = _drawn(candidate, candidate.caption or trip.text, noise[k], models)
        if trip.task == "text":
            seed = candidate_seeds("receiver", *source)[0][k]
            caption = models.captioner.caption([candidate.image], [[seed]], trip.preset.captioner.receiver)[0][0]
            candidate = replace(candidate, caption=caption.text, logprob=caption.logprob)
        made[k] = compare(trip, candidate, models)
        yield made


def _drawn(candidate: Candidate, text: str, noise: int, models: Models) -> Candidate:
    """A candidate with the image that the generator makes of a text."""
    images = Images.of(models.generator.generate([text], [noise]))
    return replace(candidate, image=np.asarray(images.pixels[0]), flagged=bool(images.flagged[0]),
                   truncated=bool(images.truncated[0]))


def embeddings(trip: Trip, candidate: Candidate, encoder: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return raw embeddings, each (1, d), of the source and of a candidate's reconstruction."""
    if trip.task == "image":
        return encoder.embed_images([trip.image]), encoder.embed_images([candidate.image])
    return encoder.embed_texts([trip.text]), encoder.embed_texts([candidate.caption])


def compare(trip: Trip, candidate: Candidate, models: Models) -> Candidate:
    """Return a candidate with its similarities; an image that the safety checker withheld has none."""
    if candidate.flagged:
        return candidate
    pair, second = embeddings(trip, candidate, models.encoder), models.second_encoder
    if trip.preset.similarity == "euclidean":
        similarity = -float(ranking.euclidean(*pair)[0])
    else:
        similarity = float(ranking.cosine(*pair)[0])
    reads = second is not None and (second.reads_images if trip.task == "image" else second.reads_texts)
    other = float(ranking.cosine(*embeddings(trip, candidate, second))[0]) if reads else np.nan
    return replace(candidate, similarity=similarity, second=other)


def own_caption(trip: Trip, text: str, models: Models) -> Candidate:
    """Return what a caption by hand leads to, from the noise of the first candidate. Its index is -1."""
    if trip.task != "image":
        raise UserError("a caption of your own needs a source image: choose image reconstruction")
    words = typed(text).references[0]
    noise = noise_seeds(trip.preset, trip.dataset, [trip.source], 1, trip.seed)[0][0]
    return compare(trip, _drawn(Candidate(-1, noise, words), words, noise, models), models)


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates from the most to the least similar; those not compared come last."""
    return sorted(candidates, key=lambda c: (np.isnan(c.similarity), -c.similarity if c.similarity == c.similarity else 0))


def chain(trip: Trip, rounds: int, models: Models) -> Iterator[dict[str, Any]]:
    """Yield one record a round: the selected candidate becomes the next source; similarity to the first source."""
    first = trip
    for number in range(1, rounds + 1):
        for candidates in reconstruct(trip, models):
            pass
        best = ranked(candidates)[0]
        if best.flagged:
            return
        yield {"round": number, "best": best, "to_last": best.similarity,
               "to_first": compare(first, best, models).similarity, "sem_f": _semantics(first, [best])[0].get("sem_f")}
        key = f"{first.source.id}~{number}"
        source = (Given(key, None, (best.caption,)) if trip.task == "text"
                  else Given(key, None, pixels=Image.fromarray(best.image)))
        trip = replace(trip, source=source)


# --- scores ------------------------------------------------------------------------------------


def scored(trip: Trip, candidates: Sequence[Candidate], models: Models, lender: str) -> list[Candidate]:
    """Return candidates with scores of their captions, or of their images in text reconstruction.

    lender: the dataset whose document frequencies an own image borrows. METEOR and SPICE are left to runs.
    """
    usable = [c for c in candidates if not c.flagged]
    if trip.task == "text":
        if trip.image is None:
            return list(candidates)
        image = models.encoder.embed_images([trip.image])
        found = [{"clip_score": float(ranking.cosine(image, models.encoder.embed_images([c.image]))[0])} for c in usable]
    else:
        found = _caption_scores(trip, usable, models, lender)
    made = {c.index: replace(c, scores=scores) for c, scores in zip(usable, found, strict=True)}
    return [made.get(c.index, c) for c in candidates]


def _caption_scores(trip: Trip, candidates: Sequence[Candidate], models: Models, lender: str) -> list[dict[str, float]]:
    """Scores against the references, the true scene and the image, as far as each is there."""
    found: list[dict[str, float]] = _semantics(trip, candidates)
    captions, encoder = [c.caption for c in candidates], models.encoder
    if trip.source.references:
        home = dataset(lender if trip.dataset == OWN else trip.dataset).references
        references = References.build({**home, trip.source.id: trip.source.references})
        table = score_captions([trip.source.id] * len(captions), captions, references, QUICK_SCORES)
        for scores, row in zip(found, table.to_dict("records"), strict=True):
            scores.update({name: value for name, value in row.items() if pd.notna(value)})
    if encoder.reads_texts and encoder.reads_images:
        texts = encoder.embed_texts([f"{trip.preset.encoder.prompt} {caption}" for caption in captions])
        image = np.repeat(encoder.embed_images([trip.image]), len(texts), axis=0)
        for scores, value in zip(found, clipscore(image, texts), strict=True):
            scores["clipscore"] = float(value)
    return found


def _semantics(trip: Trip, candidates: Sequence[Candidate]) -> list[dict[str, float]]:
    """Semantic F1 against the source's true scene, where that is known."""
    if trip.source.scene is None:
        return [{} for _ in candidates]
    table = score_semantics([c.caption for c in candidates], [trip.source.scene] * len(candidates))
    return [{"sem_f": float(value)} for value in table["sem_f"]]


def table(candidates: Sequence[Candidate]) -> pd.DataFrame:
    """Return candidates as a table, most similar first, for a cell."""
    return pd.DataFrame([{"rank": rank, "candidate": c.index, "caption": c.caption, "similarity": c.similarity,
                          "second encoder": c.second, "log p": c.logprob, **c.scores}
                         for rank, c in enumerate(ranked(candidates), start=1)])


def finished_runs() -> list[Run]:
    """Return the finished runs whose dataset is on this machine, newest first."""
    found = []
    for path in sorted(runs_root().glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        info = json.loads(path.read_text(encoding="utf-8"))
        try:
            home = dataset(info["dataset"]["address"])
        except (UserError, KeyError):
            continue
        run = Run(Preset.model_validate(info["preset"]), home, info["task"], info["n_candidates"], info["seed"], path.parent)
        found += [run] if run.finished else []
    return found
