"""The round trip of one batch of sources, in memory: loaded models and items in, rows out. Nothing is written.

=============  ======  =============  ===========  ==============  ================
task           source  made by        candidates   reconstruction  compared by
=============  ======  =============  ===========  ==============  ================
image (3.5)    image   the captioner  K captions   K images        image embeddings
text (3.6)     text    the generator  K images     K captions      text embeddings
=============  ======  =============  ===========  ==============  ================

Axes: S sources, K candidates of a source, N = S * K rows in source-major order, U distinct generated images,
d embedding width.
"""

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
from lib.presets import Decoding, Preset

if TYPE_CHECKING:  # torch is slow to import, and reading rows needs none of it
    from lib.models import Captioner, Encoder, Generator, Images, Models

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


# --- seeds and texts: by name, never by position --------------------------------------------------


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


# --- the steps ------------------------------------------------------------------------------------


def caption_candidates(captioner: Captioner, images: Sequence[Any], seeds: Sequence[Sequence[int]],
                       decoding: Decoding) -> pd.DataFrame:
    """One caption of image n for each of seeds[n], flat in that order: columns text, logprob, n_words."""
    flat = [caption for row in captioner.caption(images, seeds, decoding) for caption in row]
    return pd.DataFrame([(c.text, float(c.logprob), len(c.text.split())) for c in flat],
                        columns=["text", "logprob", "n_words"])


def generate_images(generator: Generator, texts: Sequence[str], seeds: Sequence[int], at_once: int = 64,
                    tick: Tick | None = None) -> tuple[Images, np.ndarray]:
    """The U distinct images of the texts, and (N,) which of them is each text's.

    Equal texts with equal seeds have equal images, which are generated once.
    """
    from lib.models import Images

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


def embed(encode: Callable[[Sequence[Any]], np.ndarray], things: Sequence[Any], labels: Sequence[str],
          used: np.ndarray | bool = True) -> np.ndarray:
    """Raw embeddings (N, d) of texts or images, by ``encoder.embed_texts`` or ``encoder.embed_images``.

    Raises UserError with the label of the first in use that is zero or not finite: it would be similar to nothing.
    """
    vectors = np.asarray(encode(things))
    norms = np.linalg.norm(vectors.astype(np.float64), axis=-1)
    bad = np.flatnonzero(used & ~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        raise UserError(f"the embedding of {labels[bad[0]]} is {'zero' if norms[bad[0]] == 0 else 'not finite'}: check "
                        "that item and the encoder's weights, or use dtype float32")
    return vectors


def embed_texts(encoder: Encoder, texts: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Raw embeddings (N, d) of texts, each distinct one embedded once."""
    distinct = {text: label for text, label in zip(reversed(texts), reversed(labels), strict=True)}
    place = {text: u for u, text in enumerate(distinct)}
    return embed(encoder.embed_texts, list(distinct), list(distinct.values()))[[place[text] for text in texts]]


def similarities(preset: Preset, sources: np.ndarray, answers: np.ndarray,
                 second: tuple[np.ndarray, np.ndarray] | None = None) -> dict[str, Any]:
    """Columns (N,) that say how close N reconstructions come to their sources (3.4), from raw embeddings (N, d).

    second: the same two by the second encoder. A distance is negated where it ranks, so that the best candidate is
    the arg max under both options (5.3).
    """
    cosine, distance = ranking.cosine(sources, answers), ranking.euclidean(sources, answers)
    return {"similarity": -distance if preset.similarity == "euclidean" else cosine, "similarity_euclidean": distance,
            "similarity_second": np.nan if second is None else ranking.cosine(*second)}


def clip_scores(encoder: Encoder, prompt: str, images: np.ndarray, captions: Sequence[str], sources: np.ndarray,
                items: Sequence[Item]) -> dict[str, np.ndarray]:
    """CLIPScore and RefCLIPScore (N,) of captions of items[sources[n]]; NaN where the encoder reads no texts.

    images: (S, d) embeddings of the items. The prompt stands before captions and references (Hessel et al. 2021).
    """
    n, references = len(captions), [(s, text) for s, item in enumerate(items) for text in item.references]
    owners = [items[s].id for s in [*sources, *(s for s, _ in references)]]
    if not getattr(encoder, "reads_texts", True):
        return {"clipscore": np.full(n, np.nan), "ref_clipscore": np.full(n, np.nan)}
    texts = [f"{prompt} {text}".strip() for text in [*captions, *(text for _, text in references)]]
    vectors = embed_texts(encoder, texts, [f"a caption of item {owner}" for owner in owners])
    groups = np.split(vectors[n:], np.cumsum([len(item.references) for item in items])[:-1])
    return {"clipscore": clipscore(images[sources], vectors[:n]),
            "ref_clipscore": ref_clipscore(images[sources], vectors[:n], [groups[s] for s in sources])}


# --- the two round trips --------------------------------------------------------------------------


def round_trip(task: str, items: Sequence[Item], models: Models, preset: Preset, dataset: str, n_candidates: int,
               seed: int, tick: Tick | None = None) -> Batch:
    """Caption and generate, or generate and caption, a batch of sources, and compare what comes back with them.

    Row (item, k) depends on the preset, the item, k and the seed only. Scores against references are added by
    ``run``. Raises UserError if an image cannot be opened, the encoder cannot compare, or an embedding is no vector.
    """
    kind, trip = ("images", _image_reconstruction) if task == "image" else ("texts", _text_reconstruction)
    encoders = [e for e in (models.encoder, models.second_encoder) if getattr(e, f"reads_{kind}", e is not None)]
    if models.encoder not in encoders:
        raise UserError(f"preset {preset.name}: its encoder reads no {kind}, which {task} reconstruction compares")
    rows = pd.DataFrame([(task, dataset, item.id, item.domain, k) for item in items for k in range(n_candidates)],
                        columns=["task", "dataset", "item", "domain", "candidate"])
    return trip(rows, items, models, encoders, preset, (dataset, items, n_candidates, seed), tick)


def _image_reconstruction(rows: pd.DataFrame, items: Sequence[Item], models: Models, encoders: list[Encoder],
                          preset: Preset, size: tuple[Any, ...], tick: Tick | None) -> Batch:
    """Image -> K captions -> K images (3.5), and the greedy caption of each source as baseline."""
    cost, sender, ids = Cost(sources=len(items)), preset.captioner.sender, [f"item {item.id}" for item in items]
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
        own = [embed(encoder.embed_images, images, ids) for encoder in encoders]
        pairs = [(vectors[source], _embed_drawn(encoder, drawn, index, rows))
                 for encoder, vectors in zip(encoders, own, strict=True)]
        clip = clip_scores(models.encoder, preset.encoder.prompt, own[0], [*captions["text"], *greedy["text"]],
                           np.r_[source, np.arange(len(items))], items)
    close = similarities(preset, *pairs[0], *pairs[1:])
    close |= {"clip_score": ranking.cosine(*pairs[0]), "clip_score_second": close["similarity_second"]}  # 4.3: the same
    close |= {name: values[: len(rows)] for name, values in clip.items()}
    baselines = rows.loc[rows["candidate"] == 0, ["task", "dataset", "item", "domain"]].reset_index(drop=True).assign(
        kind="greedy", caption=greedy["text"], logprob=greedy["logprob"], n_words=greedy["n_words"],
        **{name: values[len(rows):] for name, values in clip.items()})
    paths, files = _named(rows, drawn, index)
    rows = rows.assign(seed=sum(seeds, []), message=captions["text"], reconstruction=paths, source_text=None)
    cost.update(captions=len(captions) + len(greedy), images=len(files))
    return Batch(_finished(rows, captions, drawn, index, close), baselines, files, cost)


def _text_reconstruction(rows: pd.DataFrame, items: Sequence[Item], models: Models, encoders: list[Encoder],
                         preset: Preset, size: tuple[Any, ...], tick: Tick | None) -> Batch:
    """Text -> K images -> K captions (3.6), and how close the images come to the text's own image (4.3)."""
    cost, ids = Cost(sources=len(items)), [f"item {item.id}" for item in items]
    texts, source = [source_text(item, size[0], size[3]) for item in items], np.repeat(np.arange(len(items)), size[2])
    own = [texts[s] for s in source]
    seeds = sum(candidate_seeds("noise", *size), [])  # never shared: the images are what is compared
    with cost.stage("generate"):
        drawn, index = generate_images(models.generator, own, seeds, preset.generator.batch_size, tick)
    with cost.stage("caption"):
        receiver = [[one] for one in sum(candidate_seeds("receiver", *size), [])]
        captions = caption_candidates(models.captioner, [drawn.pixels[u] for u in index], receiver,
                                      preset.captioner.receiver)
    with cost.stage("embed"):
        pairs = [(embed_texts(encoder, texts, ids)[source],
                  embed_texts(encoder, captions["text"].tolist(), _labels(rows))) for encoder in encoders]
        quality = dict.fromkeys(("clipscore", "ref_clipscore", "clip_score", "clip_score_second"), np.nan)
        if all(item.path for item in items):
            originals = [item.image() for item in items]
            for name, encoder in (("clip_score", models.encoder), ("clip_score_second", models.second_encoder)):
                if encoder is not None and getattr(encoder, "reads_images", True):
                    vectors = embed(encoder.embed_images, originals, ids)[source]
                    quality[name] = ranking.cosine(vectors, _embed_drawn(encoder, drawn, index, rows))
    paths, files = _named(rows, drawn, index)
    rows = rows.assign(seed=seeds, message=paths, reconstruction=captions["text"], source_text=own)
    cost.update(captions=len(captions), images=len(files))
    return Batch(_finished(rows, captions, drawn, index, similarities(preset, *pairs[0], *pairs[1:]) | quality),
                 pd.DataFrame(), files, cost)


def _labels(rows: pd.DataFrame) -> list[str]:
    """(N,) what messages call the candidates."""
    return [f"candidate {k} of item {item}" for item, k in zip(rows["item"], rows["candidate"], strict=True)]


def _embed_drawn(encoder: Encoder, drawn: Images, index: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    """Raw embeddings (N, d) of the rows' images, each distinct one embedded once; nothing is asked of flagged ones."""
    first = pd.Series(_labels(rows)).groupby(index).first()
    return embed(encoder.embed_images, drawn.pixels, first.tolist(), ~np.asarray(drawn.flagged, bool))[index]


def _named(rows: pd.DataFrame, drawn: Images, index: np.ndarray) -> tuple[list[str], dict[str, np.ndarray]]:
    """The path of each row's image, and the U images by path; candidates with one image share the first one's."""
    names: dict[int, str] = {}
    for u, item, k in zip(index.tolist(), rows["item"], rows["candidate"], strict=True):
        names.setdefault(u, f"images/{safe_part(item)}/{k}.png")
    return [names[u] for u in index.tolist()], {name: drawn.pixels[u] for u, name in names.items()}


def _finished(rows: pd.DataFrame, captions: pd.DataFrame, drawn: Images, index: np.ndarray, scores: Mapping[str, Any]
              ) -> pd.DataFrame:
    """The rows with all columns; what was computed from a flagged (blackened) image is no measurement, but null."""
    flagged, truncated = np.asarray(drawn.flagged, bool)[index], np.asarray(drawn.truncated, bool)[index]
    usable = {name: np.where(flagged, np.nan, values) for name, values in scores.items()}
    return rows.assign(logprob=captions["logprob"], n_words=captions["n_words"], flagged=flagged, truncated=truncated,
                       **usable)
