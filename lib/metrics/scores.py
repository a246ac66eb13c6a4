"""Every caption score, one function a metric: captions of PTB tokens and their references in, values out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd
from pycocoevalcap.rouge.rouge import Rouge

from lib.base import UserError
from lib.metrics import bleu, scene_rules, spice_official
from lib.metrics.bleu import bleu_from_counts
from lib.metrics.cider import Frequencies, cider
from lib.metrics.java import Missing, find_java, shared_meteor, tokenize
from lib.metrics.scene_graph import f_score, merge

#: Every caption score and the name that tables and figures give it.
LABELS: Mapping[str, str] = {
    "bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4", "cider": "CIDEr", "cider_d": "CIDEr-D",
    "meteor": "METEOR", "rouge_l": "ROUGE-L", "spice_spacy": "SPICE (spaCy)", "spice": "SPICE"}
CAPTION_SCORES: tuple[str, ...] = tuple(LABELS)
BLEU: tuple[str, ...] = tuple(LABELS.values())[:4]

Tokens = tuple[str, ...]


@dataclass
class References:
    """PTB tokens of reference captions by image, made by :meth:`build`."""

    tokens: dict[str, Tokens]
    dropped: list[str]  # "image 7: '...'" of each reference without a word

    @classmethod
    def build(cls, references: Mapping[str, Sequence[str]]) -> References:
        """Return the references of {image id: captions}; those without a word are dropped and listed in ``dropped``.
        UserError without a Java."""
        for item, captions in references.items():
            if isinstance(captions, str):
                raise UserError(f"references of {item!r}: expected a list of captions, not one text")
        tokens = tokenize(caption for captions in references.values() for caption in captions)
        said = {caption for caption, words in tokens.items() if any(map(str.isalnum, words))}
        dropped = [f"image {item}: {c!r}" for item, captions in references.items() for c in captions if c not in said]
        known = {str(item): tuple(tokens[c] for c in captions if c in said) for item, captions in references.items()}
        return cls(known, dropped)

    @cached_property
    def frequencies(self) -> Frequencies:
        """In how many of these images (those that have a reference) each n-gram stands."""
        return Frequencies.count(filter(None, self.tokens.values()))


@dataclass
class Batch:
    """Captions made ready: distinct (tokens, tokens of the references), and which of them each caption is."""

    items: list[str]
    pairs: list[tuple[str, Tokens]]
    place: np.ndarray  # (N,) into pairs; -1 for a caption that cannot be scored
    unscored: dict[int, str]  # row -> reason
    index: pd.Index
    failed: dict[int, list[str]] = field(default_factory=dict)  # place -> which metrics have no value there and why
    meteor: list[str | None] = field(default_factory=list)  # METEOR's statistics by pair

    def fail(self, place: int, metric: str, reason: object) -> None:
        """Note that a metric has no value for one pair."""
        words = len(self.pairs[place][0].split())
        self.failed.setdefault(place, []).append(f"no {metric} for a caption of {words:,} words ({reason})")


def _ready(ids: Sequence, captions: Sequence, references: References) -> Batch:
    items = list(map(str, ids))
    tokens = tokenize(caption for caption in captions if isinstance(caption, str))
    places: dict[tuple[str, Tokens], int] = {}
    place, unscored = np.full(len(items), -1), {}
    for row, (item, caption) in enumerate(zip(items, captions, strict=True)):
        if not isinstance(caption, str):
            unscored[row] = f"image {item}: the caption is {caption!r}, not a text"
        elif not references.tokens.get(item):
            known = "has no reference with a word" if item in references.tokens else "is not among the references"
            unscored[row] = f"image {item} {known}"
        else:
            place[row] = places.setdefault((tokens[caption], references.tokens[item]), len(places))
    index = captions.index if isinstance(captions, pd.Series) else pd.RangeIndex(len(items))
    return Batch(items, list(places), place, unscored, index)


def score_captions(ids: Sequence[str], captions: Sequence[str], references: References,
                   metrics: Iterable[str] = CAPTION_SCORES) -> pd.DataFrame:
    """Return the scores of each caption against the references of its image, a float64 column a metric, with the index of
    ``captions`` if it is a Series. NaN where there is none: ``attrs["missing"]`` is {metric: reason}, ``attrs["unscored"]``
    {row number from 0: reason}. An empty caption has 0. UserError for an unknown metric or without a Java."""
    return _table(_ready(ids, captions, references), references, check_metrics(metrics))


def score_corpus(ids: Sequence[str], captions: Sequence[str], references: References,
                 metrics: Iterable[str] = CAPTION_SCORES) -> tuple[dict[str, float], pd.DataFrame]:
    """Return {metric: score of all captions as a whole} and ``score_captions``: BLEU from summed counts and METEOR from the
    jar's aggregate, the others' mean over the captions that can be scored; NaN where a metric is missing."""
    batch = _ready(ids, captions, references)
    table = _table(batch, references, check_metrics(metrics))
    values = {name: float(table[name].mean()) for name in table}
    scored = batch.place[batch.place >= 0]
    if len(scored):
        whole = bleu_from_counts(bleu.counts(batch.pairs)[scored].sum(axis=0))
        values.update((name, float(v)) for name, v in zip(CAPTION_SCORES, whole, strict=False) if name in values)
    if "meteor" in values and table["meteor"].notna().any():
        values["meteor"] = shared_meteor().score([batch.meteor[p] for p in scored if batch.meteor[p]])
    return values, table


def bleu_counts(ids: Sequence[str], captions: Sequence[str], references: References) -> pd.DataFrame:
    """Return the counts that BLEU is made of, int64, one row for each caption: sums go into ``bleu_from_counts``. A
    caption that cannot be scored has zeros, which leave any sum as it is."""
    batch = _ready(ids, captions, references)
    counts = np.vstack([bleu.counts(batch.pairs), np.zeros((1, len(bleu.COUNTS)), np.int64)])
    return pd.DataFrame(counts[batch.place], index=batch.index, columns=list(bleu.COUNTS))


def available() -> dict[str, str | None]:
    """Return {caption score: None if it can be had here, else the reason}; a cheap check that loads no model."""
    try:
        find_java()
    except UserError as error:
        return dict.fromkeys(CAPTION_SCORES, str(error))
    return dict.fromkeys(CAPTION_SCORES) | {"spice": spice_official.missing()}


def check_metrics(metrics: Iterable[str]) -> list[str]:
    """Return the metrics once each in the order of ``CAPTION_SCORES``, "bleu" standing for four; UserError if none."""
    wanted = {name for one in metrics for name in (CAPTION_SCORES[:4] if one == "bleu" else (one,))}
    unknown = sorted(wanted - set(CAPTION_SCORES))
    if unknown or not wanted:
        what = f"unknown {', '.join(unknown)}" if unknown else "none is named"
        raise UserError(f"metrics: {what}; choose from bleu, {', '.join(CAPTION_SCORES)}")
    return [name for name in CAPTION_SCORES if name in wanted]


def _table(batch: Batch, references: References, names: Sequence[str]) -> pd.DataFrame:
    """Return the columns, and in ``attrs`` what has no value and why."""
    here, found, missing = available(), {}, {}
    wanted = [family for family in _SCORERS if set(family).intersection(names)]
    with ThreadPoolExecutor(2) as pool:  # METEOR's Java and the others side by side
        running = {family: pool.submit(_SCORERS[family], batch, references)
                   for family in wanted if batch.pairs and not here[family[0]]}
        for family in wanted:
            reason = here[family[0]]
            try:
                found |= running[family].result() if family in running else {}
            except Missing as why:
                reason = str(why)
            missing |= {name: reason for name in family if name in names and reason}
    empty = np.full(len(batch.pairs), math.nan)
    columns = {name: np.append(found.get(name, empty), math.nan)[batch.place] for name in names}
    table = pd.DataFrame(columns, index=batch.index, dtype=np.float64)
    failed = {row: f"image {batch.items[row]}: {'; '.join(batch.failed[place])}"
              for row, place in enumerate(batch.place) if place in batch.failed}
    table.attrs.update(missing=missing, unscored=batch.unscored | failed)
    return table


def _bleu(batch: Batch, references: References) -> dict[str, np.ndarray]:
    return dict(zip(CAPTION_SCORES, bleu_from_counts(bleu.counts(batch.pairs)).T, strict=False))


def _cider(batch: Batch, references: References) -> dict[str, Sequence[float]]:
    if references.frequencies.documents < 2:
        raise Missing("document frequencies need at least two images with references")
    vector = references.frequencies.vector
    kept = lru_cache(1_000)(vector)  # the references of an image serve all its captions
    found = [cider(vector(caption), [kept(reference) for reference in group]) for caption, group in batch.pairs]
    return dict(zip(("cider", "cider_d"), zip(*found, strict=True), strict=True))


def _rouge(batch: Batch, references: References) -> dict[str, list[float]]:
    """ROUGE-L (Lin, 2004; beta 1.2) by ``pycocoevalcap``: precision and recall each take their best reference."""
    rouge = Rouge()
    return {"rouge_l": [float(rouge.calc_score([c], list(group))) if c else 0.0 for c, group in batch.pairs]}


def _meteor(batch: Batch, references: References) -> dict[str, list[float]]:
    """METEOR; a caption that ends its process is left out, and a new process takes the next one."""
    batch.meteor = [None] * len(batch.pairs)
    values = [math.nan] * len(batch.pairs)
    for place, (caption, group) in enumerate(batch.pairs):
        try:
            batch.meteor[place] = shared_meteor().statistics(caption, group)
            values[place] = shared_meteor().score([batch.meteor[place]])
        except Missing as failure:
            batch.fail(place, "METEOR", failure)
            shared_meteor().statistics("a", ("a",))  # if it fails at this, it does not work at all
    return {"meteor": values}


def _spice_spacy(batch: Batch, references: References) -> dict[str, list[float]]:
    groups = {group for _, group in batch.pairs}
    graphs = scene_rules.parse({caption for caption, _ in batch.pairs}.union(*groups))
    scenes = {group: merge(graphs[caption] for caption in group if graphs[caption]) for group in groups}
    values = [math.nan] * len(batch.pairs)
    for place, (caption, group) in enumerate(batch.pairs):
        if graphs[caption]:
            values[place] = f_score(merge([graphs[caption]]), scenes[group])
        else:
            batch.fail(place, "SPICE (spaCy)", "too deep a sentence")
    return {"spice_spacy": values}


_SCORERS: Mapping[tuple[str, ...], Callable[[Batch, References], Mapping[str, Sequence[float]]]] = {
    ("meteor",): _meteor,  # first: it takes longest
    CAPTION_SCORES[:4]: _bleu, ("cider", "cider_d"): _cider, ("rouge_l",): _rouge, ("spice_spacy",): _spice_spacy,
    ("spice",): lambda batch, references: {"spice": spice_official.scores(batch.pairs)}}
