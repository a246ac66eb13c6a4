"""The round trip of one batch of sources, in memory: loaded models and items in, rows out.

=============  ======  ==============  ==============  ==============  ================
task           source  made by         candidate       reconstruction  compared by
=============  ======  ==============  ==============  ==============  ================
image (3.5)    image   the captioner   K captions      K images        image embeddings
text (3.6)     text    the generator   K images        K captions      text embeddings
=============  ======  ==============  ==============  ==============  ================

Nothing is written here; ``run`` puts batches on disk. Axes: S sources, K candidates of a source,
N = S * K rows in source-major order, U distinct images generated, d embedding width.
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
    from lib.models import Captioner, Encoder, Generator, Models

TASKS = ("image", "text")
Tick = Callable[[int], Any]  # told how many more rows have their image


@dataclass
class Cost:
    """What a batch took: sources, captions written, images generated, seconds by stage."""

    sources: int = 0
    captions: int = 0
    images: int = 0
    seconds: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

    def add(self, other: Cost) -> None:
        """Add another cost to this one."""
        self.sources, self.captions = self.sources + other.sources, self.captions + other.captions
        self.images += other.images
        self.seconds.update(other.seconds)


@dataclass(frozen=True)
class Batch:
    """What a round trip leaves: N rows, S baselines (image task), images by the path that rows name, cost."""

    rows: pd.DataFrame
    baselines: pd.DataFrame
    images: Mapping[str, np.ndarray]
    cost: Cost


@dataclass(frozen=True)
class Drawn:
    """N generated images of which U are distinct: image n is ``pixels[index[n]]``, uint8 (U, H, W, 3)."""

    pixels: np.ndarray
    index: np.ndarray
    flagged: np.ndarray
    truncated: np.ndarray


# --- seeds and texts, by name and never by position ---------------------------------------------


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


# --- the steps ----------------------------------------------------------------------------------


def caption_candidates(captioner: Captioner, images: Sequence[Any], seeds: Sequence[Sequence[int]],
                       decoding: Decoding) -> pd.DataFrame:
    """One caption of image n for each of seeds[n], flat in that order: columns text, logprob, n_words."""
    flat = [caption for row in captioner.caption(images, seeds, decoding) for caption in row]
    return pd.DataFrame({"text": [c.text for c in flat], "logprob": [float(c.logprob) for c in flat],
                         "n_words": [len(c.text.split()) for c in flat]})


def generate_images(generator: Generator, texts: Sequence[str], seeds: Sequence[int], at_once: int = 64,
                    tick: Tick | None = None) -> Drawn:
    """An image of each text from its seed's noise; equal pairs give equal images and are generated once."""
    from lib.models import Images

    pairs = list(zip(texts, seeds, strict=True))
    times = Counter(pairs)  # keeps the order of first occurrence
    distinct, parts = list(times), []
    for start in range(0, len(distinct), at_once):
        part = distinct[start : start + at_once]
        parts.append(Images.of(generator.generate([text for text, _ in part], [seed for _, seed in part])))
        if tick:
            tick(sum(times[pair] for pair in part))
    place = {pair: u for u, pair in enumerate(distinct)}
    index = np.array([place[pair] for pair in pairs])
    pixels, flagged, truncated = (np.concatenate([getattr(part, name) for part in parts])
                                  for name in ("pixels", "flagged", "truncated"))
    return Drawn(pixels, index, flagged[index].astype(bool), truncated[index].astype(bool))


def embed_images(encoder: Encoder, images: Sequence[Any], labels: Sequence[str]) -> np.ndarray:
    """Raw embeddings (S, d); UserError with the label of one that is zero or not finite."""
    return _checked(np.asarray(encoder.embed_images(images)), labels)


def embed_drawn(encoder: Encoder, drawn: Drawn, labels: Sequence[str]) -> np.ndarray:
    """Raw embeddings (N, d) of generated images, each distinct one embedded once; NaN where flagged."""
    vectors = np.asarray(encoder.embed_images(drawn.pixels))[drawn.index]
    vectors[drawn.flagged] = np.nan
    return _checked(vectors, labels, ~drawn.flagged)


def embed_texts(encoder: Encoder, texts: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Raw embeddings (N, d), each distinct text embedded once."""
    distinct = {text: u for u, text in enumerate(dict.fromkeys(texts))}
    vectors = np.asarray(encoder.embed_texts(list(distinct)))[[distinct[text] for text in texts]]
    return _checked(vectors, labels)


def _checked(vectors: np.ndarray, labels: Sequence[str], used: np.ndarray | bool = True) -> np.ndarray:
    """The vectors; UserError if one in use has no direction: it would be similar to nothing, in silence."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=-1)
    bad = np.flatnonzero(used & ~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        problem = "zero" if norms[bad[0]] == 0 else "not finite"
        raise UserError(f"the embedding of {labels[bad[0]]} is {problem}: check that item and the encoder's weights, "
                        "or use dtype float32")
    return vectors


def similarities(preset: Preset, sources: np.ndarray, answers: np.ndarray,
                 second: tuple[np.ndarray, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Columns (N,) that say how close reconstructions come (3.4); second: the same by the second encoder.

    A distance is negated where it ranks, so that the best candidate is the arg max under both options (5.3).
    """
    cosine, distance = ranking.cosine(sources, answers), ranking.euclidean(sources, answers)
    other = np.full(len(cosine), np.nan) if second is None else ranking.cosine(*second)
    return {"similarity": -distance if preset.similarity == "euclidean" else cosine,
            "similarity_euclidean": distance, "similarity_second": other,
            "clip_score": cosine, "clip_score_second": other}  # in image reconstruction; replaced in the other


def clip_scores(encoder: Encoder, prompt: str, images: np.ndarray, captions: pd.DataFrame,
                items: Sequence[Item]) -> dict[str, np.ndarray]:
    """CLIPScore and RefCLIPScore (N,) of captions (columns text, source: a position in items).

    images: (S, d) embeddings of the sources. Captions and references follow the prompt, as in Hessel et al. (2021).
    NaN where the encoder does not read texts.
    """
    if not getattr(encoder, "reads_texts", True):
        return dict.fromkeys(("clipscore", "ref_clipscore"), np.full(len(captions), np.nan))
    sources, n = captions["source"].to_numpy(), len(captions)
    references = [(s, reference) for s, item in enumerate(items) for reference in item.references]
    labels = [f"a caption of item {items[s].id}" for s in [*sources, *(s for s, _ in references)]]
    texts = [f"{prompt} {text}".strip() for text in [*captions["text"], *(text for _, text in references)]]
    vectors = embed_texts(encoder, texts, labels)
    ends = np.cumsum([len(item.references) for item in items])
    groups = np.split(vectors[n:], ends[:-1])
    return {"clipscore": clipscore(images[sources], vectors[:n]),
            "ref_clipscore": ref_clipscore(images[sources], vectors[:n], [groups[s] for s in sources])}


# --- the two round trips -------------------------------------------------------------------------


def round_trip(task: str, items: Sequence[Item], models: Models, preset: Preset, dataset: str, n_candidates: int,
               seed: int, tick: Tick | None = None) -> Batch:
    """Caption and generate, or generate and caption, a batch of sources; compare what comes back with them.

    Row (item, k) depends on the preset, the item, k and the seed only. Scores against references are added by
    ``run``. Raises UserError if an image cannot be opened or an embedding has no direction.
    """
    trip = _image_reconstruction if task == "image" else _text_reconstruction
    rows = pd.DataFrame([(task, dataset, item.id, item.domain, k, s) for s, item in enumerate(items)
                         for k in range(n_candidates)], columns=["task", "dataset", "item", "domain", "candidate", "source"])
    return trip(rows, items, models, preset, seed, tick)


def _image_reconstruction(rows: pd.DataFrame, items: Sequence[Item], models: Models, preset: Preset, seed: int,
                          tick: Tick | None) -> Batch:
    """Image -> K captions -> K images (3.5), and the greedy caption of each source as baseline."""
    cost, size = Cost(sources=len(items)), (rows["dataset"].iloc[0], items, rows["candidate"].max() + 1, seed)
    sender, sources = preset.captioner.sender, [f"item {item.id}" for item in items]
    with cost.stage("open"):
        images = [item.image() for item in items]
    with cost.stage("caption"):
        seeds = candidate_seeds("caption", *size)
        captions = caption_candidates(models.captioner, images, seeds, sender)
    with cost.stage("baseline"):
        greedy = caption_candidates(models.captioner, images, [[0]] * len(items),
                                    sender.model_copy(update={"strategy": "greedy"}))
    with cost.stage("generate"):
        drawn = generate_images(models.generator, captions["text"].tolist(), sum(noise_seeds(preset, *size), []),
                                preset.generator.batch_size, tick)
    with cost.stage("embed"):
        pairs = [(embed_images(encoder, images, sources), embed_drawn(encoder, drawn, _labels(rows)))
                 for encoder in _encoders(models)]
        everything = pd.concat([captions.assign(source=rows["source"]), greedy.assign(source=range(len(items)))])
        clip = clip_scores(models.encoder, preset.encoder.prompt, pairs[0][0], everything, items)
    columns = _compared(rows, preset, pairs) | {name: values[: len(rows)] for name, values in clip.items()}
    baselines = rows[rows["candidate"] == 0].drop(columns=["candidate", "source"]).reset_index(drop=True).assign(
        kind="greedy", caption=greedy["text"], **greedy[["logprob", "n_words"]],
        **{name: values[len(rows):] for name, values in clip.items()})
    cost.captions, cost.images = len(everything), len(drawn.pixels)
    paths, files = _named(rows, drawn)
    rows = rows.assign(seed=sum(seeds, []), message=captions["text"], reconstruction=paths, source_text=None)
    return Batch(_finished(rows, captions, drawn, columns), baselines, files, cost)


def _text_reconstruction(rows: pd.DataFrame, items: Sequence[Item], models: Models, preset: Preset, seed: int,
                         tick: Tick | None) -> Batch:
    """Text -> K images -> K captions (3.6), and how close the images come to the text's own image (4.3)."""
    dataset, n_candidates = rows["dataset"].iloc[0], rows["candidate"].max() + 1
    cost, size = Cost(sources=len(items)), (dataset, items, n_candidates, seed)
    texts = [source_text(item, dataset, seed) for item in items]
    own = [texts[s] for s in rows["source"]]
    with cost.stage("generate"):
        seeds = sum(candidate_seeds("noise", *size), [])  # never shared: the images are what is compared
        drawn = generate_images(models.generator, own, seeds, preset.generator.batch_size, tick)
    with cost.stage("caption"):
        receiver = [[one] for row in candidate_seeds("receiver", *size) for one in row]
        captions = caption_candidates(models.captioner, [drawn.pixels[u] for u in drawn.index], receiver,
                                      preset.captioner.receiver)
    with cost.stage("embed"):
        labels = _labels(rows)
        pairs = [(embed_texts(encoder, texts, [f"item {item.id}" for item in items]),
                  embed_texts(encoder, captions["text"].tolist(), labels))
                 for encoder in _encoders(models) if getattr(encoder, "reads_texts", True)]
        columns = _compared(rows, preset, pairs) | dict.fromkeys(("clipscore", "ref_clipscore"), np.nan)
        columns |= _image_quality(rows, items, models, drawn)
    cost.captions, cost.images = len(captions), len(drawn.pixels)
    paths, files = _named(rows, drawn)
    rows = rows.assign(seed=seeds, message=paths, reconstruction=captions["text"], source_text=own)
    return Batch(_finished(rows, captions, drawn, columns), pd.DataFrame(), files, cost)


def _encoders(models: Models) -> list[Encoder]:
    """The encoder that ranks and, where there is one, the second."""
    return [models.encoder] if models.second_encoder is None else [models.encoder, models.second_encoder]


def _labels(rows: pd.DataFrame) -> list[str]:
    """(N,) what messages call the candidates."""
    return [f"candidate {k} of item {item}" for item, k in zip(rows["item"], rows["candidate"], strict=True)]


def _compared(rows: pd.DataFrame, preset: Preset, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """The similarity columns; pairs: (S, d) sources and (N, d) reconstructions by one or two encoders."""
    repeated = [(sources[rows["source"]], answers) for sources, answers in pairs]
    return similarities(preset, *repeated[0], repeated[1] if len(repeated) > 1 else None)


def _image_quality(rows: pd.DataFrame, items: Sequence[Item], models: Models, drawn: Drawn) -> dict[str, np.ndarray]:
    """CLIP score (N,) of generated images with the text's own image (4.3) by each encoder; NaN without one."""
    scores: dict[str, Any] = dict.fromkeys(("clip_score", "clip_score_second"), np.nan)
    if any(item.path is None for item in items):
        return scores
    originals = [item.image() for item in items]
    for name, encoder in zip(scores, _encoders(models), strict=False):
        if getattr(encoder, "reads_images", True):
            sources = embed_images(encoder, originals, [f"item {item.id}" for item in items])
            scores[name] = ranking.cosine(sources[rows["source"]], embed_drawn(encoder, drawn, _labels(rows)))
    return scores


def _named(rows: pd.DataFrame, drawn: Drawn) -> tuple[list[str], dict[str, np.ndarray]]:
    """The path of each row's image, and the U images by path; candidates with one image share the first one's."""
    names: dict[int, str] = {}
    for u, item, k in zip(drawn.index.tolist(), rows["item"], rows["candidate"], strict=True):
        names.setdefault(u, f"images/{safe_part(item)}/{k}.png")
    return [names[u] for u in drawn.index.tolist()], {name: drawn.pixels[u] for u, name in names.items()}


def _finished(rows: pd.DataFrame, captions: pd.DataFrame, drawn: Drawn, columns: Mapping[str, Any]) -> pd.DataFrame:
    """The rows with all columns; what was computed from a flagged (blackened) image is no measurement, but null."""
    usable = {name: np.where(drawn.flagged, np.nan, values) for name, values in columns.items()}
    return rows.drop(columns="source").assign(**captions[["logprob", "n_words"]], flagged=drawn.flagged,
                                              truncated=drawn.truncated, **usable)
