"""The game of the paper's Figure 2, in both directions by one function, on a batch of sources.

===================  ======  =========  =======  =========  ==============  ====================
task                 source  sender     message  receiver   reconstruction  compared by
===================  ======  =========  =======  =========  ==============  ====================
image (3.5)          image   captioner  caption  generator  image           image embeddings
text (3.6)           text    generator  image    captioner  text            text embeddings
===================  ======  =========  =======  =========  ==============  ====================

:func:`play_shard` plays with loaded models and writes nothing; ``roundtrip`` runs shards, keeps what
is finished and resumes. Axes: S sources of a shard, K candidates of a source, N = S * K rows in
source-major order, U distinct pictures drawn, d embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lib import ranking
from lib.cost import Cost
from lib.datasets import Item
from lib.errors import UserError
from lib.metrics import clip_score, clipscore, ref_clipscore
from lib.players import Content, Models, Pictures, Reader, Texts, depict, describe
from lib.presets import Preset
from lib.results import PLAYED, PLAYED_BASELINES, safe_part, to_table
from lib.seeds import stable_seed

# --- a shard and the two tasks -----------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A batch of sources and all that decides its rows, besides the models."""

    run: str
    dataset: str
    preset: Preset
    items: tuple[Item, ...]
    n_candidates: int
    seed: int

    def grid(self) -> list[tuple[Item, int]]:
        """(source, candidate) of each of the N rows."""
        return [(item, k) for item in self.items for k in range(self.n_candidates)]

    def seeds(self, purpose: str) -> list[int]:
        """(N,) a seed for each source and candidate, by name and never by position."""
        return [stable_seed(self.seed, purpose, self.dataset, item.id, k)
                for item, k in self.grid()]

    def source_seeds(self, purpose: str) -> list[int]:
        """(N,) a seed for each source, shared by its candidates."""
        return [stable_seed(self.seed, purpose, self.dataset, item.id) for item, _ in self.grid()]

    def by_source(self, values: Sequence[int]) -> list[Sequence[int]]:
        """(N,) values as S rows of K."""
        k = self.n_candidates
        return [values[start : start + k] for start in range(0, len(values), k)]

    def labels(self) -> list[str]:
        """(S,) what messages call the sources."""
        return [f"item {item.id}" for item in self.items]

    def row_labels(self) -> list[str]:
        """(N,) what messages call the candidates."""
        return [f"candidate {k} of item {item.id}" for item, k in self.grid()]


@dataclass(frozen=True)
class Task:
    """One direction of the game.

    sources: a shard's S sources. send: S sources -> N messages and the N seeds they come from.
    receive: N messages -> N reconstructions.
    """

    name: str
    sources: Callable[[Shard], Content]
    send: Callable[[Shard, Models, Any, Cost], tuple[Content, list[int]]]
    receive: Callable[[Shard, Models, Any, Cost], Content]


def pictures_of(shard: Shard) -> Pictures:
    """The shard's S pictures."""
    return Pictures.given([item.image() for item in shard.items])


def source_text(item: Item, dataset: str, seed: int) -> str:
    """The caption that stands for an item in text reconstruction: one of its references (5.2)."""
    if not item.references:
        raise UserError(f"item {item.id} of {dataset} has no caption to start from: text "
                        "reconstruction needs one for each source")
    index = stable_seed(seed, "reference", dataset, item.id) % len(item.references)
    return item.references[index]


def texts_of(shard: Shard) -> Texts:
    """The shard's S source texts."""
    return Texts(tuple(source_text(item, shard.dataset, shard.seed) for item in shard.items))


def _send_captions(
    shard: Shard, models: Models, sources: Pictures, cost: Cost
) -> tuple[Texts, list[int]]:
    """y_k, k = 1..K: caption candidates of each source image (3.5)."""
    seeds, sender = shard.seeds("caption"), shard.preset.captioner.sender
    return describe(models.captioner, sources, shard.by_source(seeds), sender, cost), seeds


def _receive_pictures(shard: Shard, models: Models, messages: Texts, cost: Cost) -> Pictures:
    """x'_k: the image that each caption brings about (3.5)."""
    shared = shard.preset.generator.noise == "source"
    seeds = shard.source_seeds("noise") if shared else shard.seeds("noise")
    return depict(models.generator, messages, seeds, cost)


def _send_pictures(
    shard: Shard, models: Models, sources: Texts, cost: Cost
) -> tuple[Pictures, list[int]]:
    """x_k, k = 1..K: image candidates of each source text (3.6), each from noise of its own."""
    seeds = shard.seeds("noise")
    repeated = Texts(tuple(t for t in sources.texts for _ in range(shard.n_candidates)))
    return depict(models.generator, repeated, seeds, cost), seeds


def _receive_captions(shard: Shard, models: Models, messages: Pictures, cost: Cost) -> Texts:
    """y'_k: what the receiver reads in each image (3.6)."""
    seeds = [[seed] for seed in shard.seeds("receiver")]
    return describe(models.captioner, messages, seeds, shard.preset.captioner.receiver, cost)


TASKS: Mapping[str, Task] = {
    "image": Task("image", pictures_of, _send_captions, _receive_pictures),
    "text": Task("text", texts_of, _send_pictures, _receive_captions),
}


# --- playing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Played:
    """What a shard leaves behind: rows as played, baselines, new pictures by path, cost."""

    rows: pa.Table
    baselines: pa.Table | None
    pictures: Mapping[str, np.ndarray]
    cost: Cost


def play_shard(shard: Shard, task: Task, models: Models) -> Played:
    """Play one batch of sources: source -> K messages -> K reconstructions -> K similarities.

    Raises UserError if a picture cannot be opened, a text task meets a source without a caption,
    or an embedding is zero or not finite.
    """
    cost = Cost(sources=len(shard.items))
    reader = Reader(models.encoder, "encoder", cost)
    judge = None if models.judge is None else Reader(models.judge, "judge", cost)
    with cost.stage("open"):
        sources = task.sources(shard)
    messages, seeds = task.send(shard, models, sources, cost)
    answers = task.receive(shard, models, messages, cost)
    if isinstance(messages, Texts):
        captions, drawn = messages, answers
        scores = _score_captions(shard, reader, sources, messages, shard.n_candidates)
    else:
        captions, drawn = answers, messages
        scores = _score_pictures(shard, reader, judge, messages)
    scores = {**_similarities(shard, reader, judge, sources, answers), **scores}
    baselines = _greedy(shard, models, reader, sources) if task.name == "image" else None
    paths, pictures = _name_pictures(shard, drawn)
    # What is computed from a flagged (blackened) picture is no measurement: null, and counted.
    usable = {name: np.where(drawn.flagged, np.nan, values) for name, values in scores.items()}
    spoken = list(captions.texts)
    columns = {
        **_identity(shard, task.name), "seed": seeds,
        "message": spoken if messages is captions else paths,
        "reconstruction": paths if messages is captions else spoken,
        "source_text": _repeat(shard, sources.texts if isinstance(sources, Texts) else None),
        "logprob": captions.logprobs, "n_words": [len(text.split()) for text in spoken],
        "flagged": drawn.flagged, "truncated": drawn.truncated, **usable,
    }
    return Played(to_table(columns, PLAYED), baselines, pictures, cost)


def _identity(shard: Shard, task: str) -> dict[str, list[Any]]:
    """The columns that say which row this is."""
    grid = shard.grid()
    return {
        "run": [shard.run] * len(grid), "task": [task] * len(grid),
        "dataset": [shard.dataset] * len(grid), "item": [item.id for item, _ in grid],
        "domain": [item.domain for item, _ in grid], "candidate": [k for _, k in grid],
    }


def _repeat(shard: Shard, values: Sequence[Any] | None) -> list[Any]:
    """S values as N rows; None as N nulls."""
    values = [None] * len(shard.items) if values is None else values
    return [value for value in values for _ in range(shard.n_candidates)]


def _name_pictures(shard: Shard, drawn: Pictures) -> tuple[list[str], dict[str, np.ndarray]]:
    """The path of each row's picture, and the U distinct pictures by path.

    Candidates with one picture share the file of the first of them.
    """
    names: dict[int, str] = {}
    for u, (item, k) in zip(drawn.index.tolist(), shard.grid(), strict=True):
        names.setdefault(u, f"images/{safe_part(item.id)}/{k}.png")
    pictures = {name: np.asarray(drawn.pixels[u]) for u, name in names.items()}
    return [names[u] for u in drawn.index.tolist()], pictures


# --- comparing ---------------------------------------------------------------------------------


def _pair(
    shard: Shard, reader: Reader, sources: Content, answers: Content
) -> tuple[np.ndarray, np.ndarray] | None:
    """Embeddings of sources and reconstructions, both (N, d); None where not readable."""
    source = reader.embed(sources, shard.labels())
    answer = reader.embed(answers, shard.row_labels())
    if source is None or answer is None:
        return None
    return np.repeat(source, shard.n_candidates, axis=0), answer


def _similarities(
    shard: Shard, reader: Reader, judge: Reader | None, sources: Content, answers: Content
) -> dict[str, np.ndarray]:
    """How close the reconstructions come, each (N,): by the preset's similarity, by Euclidean
    distance, by the judge. In the image task these are also 4.3's CLIP scores."""
    pair = _pair(shard, reader, sources, answers)
    if pair is None:
        raise UserError(f"preset {shard.preset.name}: its encoder cannot read what this task "
                        "reconstructs: choose one that reads pictures and texts")
    second = None if judge is None else _pair(shard, judge, sources, answers)
    cosine, distance = ranking.cosine_similarity(*pair), ranking.euclidean_distance(*pair)
    judged = np.full(len(cosine), np.nan) if second is None else ranking.cosine_similarity(*second)
    # A distance is negated, so that the best candidate is the arg max under either option (5.3).
    chosen = -distance if shard.preset.similarity == "euclidean" else cosine
    return {"similarity": chosen, "similarity_euclidean": distance, "similarity_judge": judged,
            "clip_score": cosine, "clip_score_judge": judged}


def _score_captions(
    shard: Shard, reader: Reader, sources: Pictures, captions: Texts, k: int
) -> dict[str, np.ndarray]:
    """CLIPScore and RefCLIPScore of k captions a source, each (S * k,); NaN where not readable."""
    labels = [f"a caption of {label}" for label in shard.labels() for _ in range(k)]
    image, text = reader.embed(sources, shard.labels()), reader.embed(captions, labels)
    if image is None or text is None or image.shape[1] != text.shape[1]:
        nothing = np.full(len(captions.texts), np.nan)
        return {"clipscore": nothing, "ref_clipscore": nothing}
    image = np.repeat(image, k, axis=0)
    groups = [group for group in _references(shard, reader, text.shape[1]) for _ in range(k)]
    return {"clipscore": clipscore(image, text),
            "ref_clipscore": ref_clipscore(image, text, groups)}


def _references(shard: Shard, reader: Reader, width: int) -> list[np.ndarray]:
    """S arrays (R_i, d): embeddings of each source's references."""
    flat = [(text, item.id) for item in shard.items for text in item.references]
    vectors = np.zeros((0, width))
    if flat:
        texts, labels = Texts(tuple(text for text, _ in flat)), [f"a reference of {i}" for _, i in flat]
        vectors = reader.embed(texts, labels)
    return np.split(vectors, np.cumsum([len(item.references) for item in shard.items])[:-1])


def _score_pictures(
    shard: Shard, reader: Reader, judge: Reader | None, drawn: Pictures
) -> dict[str, np.ndarray]:
    """Text reconstruction's image quality: CLIP score to the source text's own picture (3.6, 4.3),
    by the ranking encoder and by the judge; NaN for sources that are texts only."""
    nothing = np.full(len(drawn.index), np.nan)
    scores = dict.fromkeys(("clipscore", "ref_clipscore", "clip_score", "clip_score_judge"), nothing)
    if any(item.path is None for item in shard.items):
        return scores
    originals = pictures_of(shard)
    for name, one in (("clip_score", reader), ("clip_score_judge", judge)):
        pair = None if one is None else _pair(shard, one, originals, drawn)
        if pair is not None:
            scores[name] = clip_score(*pair)
    return scores


def _greedy(shard: Shard, models: Models, reader: Reader, sources: Pictures) -> pa.Table:
    """The greedy caption of each source, with the sender's prompt and lengths."""
    decoding = replace(shard.preset.captioner.sender, strategy="greedy")
    captions = describe(models.captioner, sources, [[0]] * len(shard.items), decoding, reader.cost,
                        "baseline")
    n, texts = len(shard.items), list(captions.texts)
    columns = {
        "run": [shard.run] * n, "task": ["image"] * n, "dataset": [shard.dataset] * n,
        "item": [item.id for item in shard.items], "domain": [i.domain for i in shard.items],
        "kind": ["greedy"] * n, "caption": texts, "logprob": captions.logprobs,
        "n_words": [len(text.split()) for text in texts],
        **_score_captions(shard, reader, sources, captions, 1),
    }
    return to_table(columns, PLAYED_BASELINES)
