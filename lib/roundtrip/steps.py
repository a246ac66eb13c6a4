"""The round trip of one batch of sources, in memory: loaded models and items in, rows out. Axes: S sources, K candidates
of a source, N = S * K rows in source-major order, U distinct generated images, d embedding width."""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lib import ranking
from lib.base import UserError, stable_seed
from lib.data import Item
from lib.metrics import clipscore, ref_clipscore
from lib.models import Images, Models
from lib.presets import Decoding, Preset

if TYPE_CHECKING:  # torch is slow to import, and reading rows needs none of it
    from lib.models import Captioner, Encoder, Generator

TASKS = ("image", "text")
Tick = Callable[[int], Any]  # told how many more rows have their image


class Cost(Counter[str]):
    """What was spent: counts of sources, captions and images, and seconds by stage."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        begun = time.perf_counter()
        yield
        self[f"seconds: {name}"] += time.perf_counter() - begun


@dataclass(frozen=True)
class Batch:
    """What a round trip leaves: N rows, S baselines (image task), images by the path that rows name, cost."""

    rows: pd.DataFrame
    baselines: pd.DataFrame
    images: Mapping[str, np.ndarray]
    cost: Cost = field(default_factory=Cost)


def candidate_seeds(purpose: str, dataset: str, items: Sequence[Item], n_candidates: int, seed: int) -> list[list[int]]:
    """S lists of K seeds, one for each source and candidate; purpose: "caption", "noise" or "receiver"."""
    return [[stable_seed(seed, purpose, dataset, item.id, k) for k in range(n_candidates)] for item in items]


def noise_seeds(preset: Preset, dataset: str, items: Sequence[Item], n_candidates: int, seed: int) -> list[list[int]]:
    """S lists of K seeds of the noise in image reconstruction; equal within a source if the preset shares it."""
    if preset.generator.noise == "candidate":
        return candidate_seeds("noise", dataset, items, n_candidates, seed)
    return [[stable_seed(seed, "noise", dataset, item.id)] * n_candidates for item in items]


def source_text(item: Item, dataset: str, seed: int) -> str:
    """The caption that stands for an item in text reconstruction: one of its references (5.2)."""
    return item.references[stable_seed(seed, "reference", dataset, item.id) % len(item.references)]


def safe_part(text: str) -> str:
    """A text as one part of a file name: letters, digits, ``._-``, and a short hash where that loses something."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60]
    return slug if slug == text.lower() else f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".lstrip("-")


def caption_candidates(captioner: Captioner, images: Sequence[Any], seeds: Sequence[Sequence[int]],
                       decoding: Decoding) -> pd.DataFrame:
    """One caption of image n for each of seeds[n], flat in that order: columns text, logprob, n_words."""
    flat = [caption for row in captioner.caption(images, seeds, decoding) for caption in row]
    return pd.DataFrame([(c.text, float(c.logprob), len(c.text.split())) for c in flat],
                        columns=["text", "logprob", "n_words"])


def generate_images(generator: Generator, texts: Sequence[str], seeds: Sequence[int], at_once: int = 64,
                    tick: Tick | None = None) -> tuple[Images, np.ndarray]:
    """The U distinct images of the texts, and (N,) which of them is each text's. Equal texts with equal seeds have equal
    images, which are generated once."""
    times = Counter(zip(texts, seeds, strict=True))  # keeps the order of first occurrence
    distinct, parts = list(times), []
    for start in range(0, len(distinct), at_once):
        part = distinct[start : start + at_once]
        parts.append(Images.of(generator.generate([text for text, _ in part], [seed for _, seed in part])))
        if tick:
            tick(sum(times[pair] for pair in part))
    place = {pair: u for u, pair in enumerate(distinct)}
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pixels", "flagged", "truncated"))
    return Images(*columns), np.array([place[pair] for pair in zip(texts, seeds, strict=True)])


def embed_texts(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Raw embeddings (N, d) of texts, each distinct one embedded once."""
    place = {text: u for u, text in enumerate(dict.fromkeys(texts))}
    return np.asarray(encoder.embed_texts(list(place)))[[place[text] for text in texts]]


def similarities(preset: Preset, sources: np.ndarray, answers: np.ndarray,
                 second: tuple[np.ndarray, np.ndarray] | None = None) -> dict[str, Any]:
    """Columns (N,) that say how close N reconstructions come to their sources (3.4), from raw embeddings (N, d), second:
    those of the second encoder. A distance is negated where it ranks, so that the best candidate is the arg max (5.3)."""
    cosine, distance = ranking.cosine(sources, answers), ranking.euclidean(sources, answers)
    return {"similarity": -distance if preset.similarity == "euclidean" else cosine, "similarity_euclidean": distance,
            "similarity_second": np.nan if second is None else ranking.cosine(*second)}


def clip_scores(encoder: Encoder, prompt: str, images: np.ndarray, captions: Sequence[str], sources: np.ndarray,
                items: Sequence[Item]) -> dict[str, np.ndarray]:
    """CLIPScore and RefCLIPScore (N,) of captions of items[sources[n]]; NaN where the encoder reads no texts. images: (S, d)
    embeddings of the items. The prompt stands before captions and references (Hessel et al. 2021)."""
    if not getattr(encoder, "reads_texts", True):
        return dict.fromkeys(("clipscore", "ref_clipscore"), np.full(len(captions), np.nan))
    references = [text for item in items for text in item.references]
    vectors = embed_texts(encoder, [f"{prompt} {text}".strip() for text in [*captions, *references]])
    candidates, references = np.split(vectors, [len(captions)])
    groups = np.split(references, np.cumsum([len(item.references) for item in items])[:-1])
    return {"clipscore": clipscore(images[sources], candidates),
            "ref_clipscore": ref_clipscore(images[sources], candidates, [groups[s] for s in sources])}


def round_trip(task: str, items: Sequence[Item], models: Models, preset: Preset, dataset: str, n_candidates: int,
               seed: int, tick: Tick | None = None) -> Batch:
    """The batch of sources that are captioned and generated, or the reverse, and compared with what comes back. Row
    (item, k) depends on the preset, the item, k and the seed only. Scores against references are added by ``run``."""
    kind, trip = ("images", _image_reconstruction) if task == "image" else ("texts", _text_reconstruction)
    encoders = [e for e in (models.encoder, models.second_encoder) if getattr(e, f"reads_{kind}", e is not None)]
    if models.encoder not in encoders:
        raise UserError(f"preset {preset.name}: its encoder reads no {kind}, which {task} reconstruction compares")
    rows = pd.DataFrame([(task, dataset, item.id, item.domain, k) for item in items for k in range(n_candidates)],
                        columns=["task", "dataset", "item", "domain", "candidate"])
    return trip(rows, items, models, encoders, preset, (dataset, items, n_candidates, seed), tick)


def _image_reconstruction(rows: pd.DataFrame, items: Sequence[Item], models: Models, encoders: list[Encoder],
                          preset: Preset, size: tuple[Any, ...], tick: Tick | None) -> Batch:
    """Image -> K captions -> K images, compared by image embeddings (3.5), and each source's greedy caption."""
    cost, sender, n = Cost(sources=len(items)), preset.captioner.sender, len(rows)
    source = np.repeat(np.arange(len(items)), size[2])  # (N,) each row's position in items
    with cost.stage("open"):
        images = [item.image() for item in items]
    with cost.stage("caption"):
        seeds = candidate_seeds("caption", *size)
        captions = caption_candidates(models.captioner, images, seeds, sender)
    with cost.stage("baseline"):
        greedy = caption_candidates(models.captioner, images, [[0]] * len(items),
                                    sender.model_copy(update={"strategy": "greedy"}))
    with cost.stage("generate"):
        drawn, index = generate_images(models.generator, captions["text"].tolist(), sum(noise_seeds(preset, *size), []),
                                       preset.generator.batch_size, tick)
    with cost.stage("embed"):
        own = [np.asarray(encoder.embed_images(images)) for encoder in encoders]
        pairs = [(vectors[source], np.asarray(encoder.embed_images(drawn.pixels))[index])
                 for encoder, vectors in zip(encoders, own, strict=True)]
        clip = clip_scores(models.encoder, preset.encoder.prompt, own[0], [*captions["text"], *greedy["text"]],
                           np.r_[source, np.arange(len(items))], items)
    scores = similarities(preset, *pairs[0], *pairs[1:]) | {name: values[:n] for name, values in clip.items()}
    # 4.3: in this task the CLIP score is the same comparison
    scores |= {"clip_score": ranking.cosine(*pairs[0]), "clip_score_second": scores["similarity_second"]}
    baselines = rows.loc[rows["candidate"] == 0, ["task", "dataset", "item", "domain"]].reset_index(drop=True).assign(
        kind="greedy", caption=greedy["text"], **greedy[["logprob", "n_words"]],
        **{name: values[n:] for name, values in clip.items()})
    cost.update(captions=len(captions) + len(greedy), images=len(drawn.pixels))
    rows = rows.assign(seed=sum(seeds, []), message=captions["text"], **captions[["logprob", "n_words"]])
    rows, files = _with_images(rows, drawn, index, "reconstruction")
    return Batch(_with_scores(rows, scores), baselines, files, cost)


def _text_reconstruction(rows: pd.DataFrame, items: Sequence[Item], models: Models, encoders: list[Encoder],
                         preset: Preset, size: tuple[Any, ...], tick: Tick | None) -> Batch:
    """Text -> K images -> K captions, compared by text embeddings (3.6); the images with the text's own image (4.3)."""
    cost, source = Cost(sources=len(items)), np.repeat(np.arange(len(items)), size[2])
    texts = [source_text(items[s], size[0], size[3]) for s in source]
    with cost.stage("generate"):
        seeds = sum(candidate_seeds("noise", *size), [])  # never shared: the images are what is compared
        drawn, index = generate_images(models.generator, texts, seeds, preset.generator.batch_size, tick)
    with cost.stage("caption"):
        receiver = [[one] for one in sum(candidate_seeds("receiver", *size), [])]
        captions = caption_candidates(models.captioner, [drawn.pixels[u] for u in index], receiver,
                                      preset.captioner.receiver)
    with cost.stage("embed"):
        pairs = [(embed_texts(encoder, texts), embed_texts(encoder, captions["text"].tolist())) for encoder in encoders]
        scores = similarities(preset, *pairs[0], *pairs[1:])
        scores |= dict.fromkeys(("clipscore", "ref_clipscore", "clip_score", "clip_score_second"), np.nan)
        originals = [item.image() for item in items] if all(item.path for item in items) else []
        for name, encoder in (("clip_score", models.encoder), ("clip_score_second", models.second_encoder)):
            if originals and getattr(encoder, "reads_images", encoder is not None):
                scores[name] = ranking.cosine(np.asarray(encoder.embed_images(originals))[source],
                                              np.asarray(encoder.embed_images(drawn.pixels))[index])
    cost.update(captions=len(captions), images=len(drawn.pixels))
    rows = rows.assign(seed=seeds, source_text=texts, reconstruction=captions["text"],
                       **captions[["logprob", "n_words"]])
    rows, files = _with_images(rows, drawn, index, "message")
    return Batch(_with_scores(rows, scores), pd.DataFrame(), files, cost)


def _with_images(rows: pd.DataFrame, drawn: Images, index: np.ndarray, column: str
                 ) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Rows with their image's path in a column, and flagged, truncated; the U images by path. Candidates with one image
    share the path of the first of them."""
    named = rows.assign(u=index).groupby("u").first()
    names = [f"images/{safe_part(item)}/{k}.png" for item, k in zip(named["item"], named["candidate"], strict=True)]
    flagged, truncated = (np.asarray(values, bool)[index] for values in (drawn.flagged, drawn.truncated))
    rows = rows.assign(**{column: [names[u] for u in index]}, flagged=flagged, truncated=truncated)
    return rows, dict(zip(names, drawn.pixels, strict=True))


def _with_scores(rows: pd.DataFrame, scores: Mapping[str, Any]) -> pd.DataFrame:
    """Rows with scores; what was computed from a flagged (blackened) image is no measurement, but null. Raises UserError
    where a similarity is not a number: a zero embedding would be similar to nothing, in silence."""
    for name in ("similarity", "similarity_second", "clip_score", "clip_score_second"):
        bad = np.flatnonzero(~np.isfinite(scores[name]) & ~rows["flagged"]) if np.ndim(scores[name]) else []
        if len(bad):
            item, k = rows.loc[bad[0], ["item", "candidate"]]
            raise UserError(f"candidate {k} of item {item}: its {name} is not a number, so an embedding is zero or not "
                            "finite: check that item and the encoder's weights, or use dtype float32")
    return rows.assign(**{name: np.where(rows["flagged"], np.nan, values) for name, values in scores.items()})
