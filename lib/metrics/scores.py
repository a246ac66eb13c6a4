"""Every caption score, one function a metric: captions of PTB tokens and their references in, values out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from pycocoevalcap.rouge.rouge import Rouge

from lib.base import UserError
from lib.metrics import bleu, spice_official, spice_spacy
from lib.metrics.bleu import bleu_from_counts
from lib.metrics.cider import ImageReferences
from lib.metrics.java import JavaFailed, find_java, tokenize
from lib.metrics.meteor import shared_meteor
from lib.metrics.references import References, Tokens
from lib.metrics.scene_graph import f_score, merge

#: Every caption score and the name that tables and figures give it.
LABELS: Mapping[str, str] = {
    "bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4", "cider": "CIDEr", "cider_d": "CIDEr-D",
    "meteor": "METEOR", "rouge_l": "ROUGE-L", "spice_spacy": "SPICE (spaCy)", "spice": "SPICE",
}  # fmt: skip
CAPTION_SCORES: tuple[str, ...] = tuple(LABELS)
BLEU: tuple[str, ...] = tuple(LABELS.values())[:4]


class Missing(Exception):
    """A metric cannot be had here; the message is the reason that goes with its nulls."""


@dataclass
class Batch:
    """Captions made ready: distinct (tokens, tokens of the references), and which of them each caption is."""

    index: pd.Index
    pairs: list[tuple[str, Tokens]]
    place: np.ndarray  # (N,) into pairs; -1 for a caption that cannot be scored
    unscored: dict[object, str]  # label of the row -> reason
    failed: dict[int, str] = field(default_factory=dict)  # place -> why one metric has no value there
    meteor: list[str | None] = field(default_factory=list)  # METEOR's statistics by pair

    def spread(self, values: Sequence[float]) -> np.ndarray:
        """Return the values of the pairs as a column of the captions, float64 (N,), NaN where there is none."""
        return np.append(np.asarray(values, np.float64), math.nan)[self.place]


def _ready(ids: Sequence, captions: Sequence, references: References) -> Batch:
    index = captions.index if isinstance(captions, pd.Series) else pd.RangeIndex(len(captions))
    rows = list(zip(index, map(str, ids), captions, strict=True))
    unscored = {}
    for label, item, caption in rows:
        if not isinstance(caption, str):
            unscored[label] = f"image {item}: the caption is {caption!r}, not a text"
        elif not references.tokens.get(item):
            known = "has no reference with a word" if item in references.tokens else "is not among the references"
            unscored[label] = f"image {item} {known}"
    tokens = tokenize(caption for label, _, caption in rows if label not in unscored)
    places: dict[tuple[str, Tokens], int] = {}
    place = [
        -1 if label in unscored else places.setdefault((tokens[caption], references.tokens[item]), len(places))
        for label, item, caption in rows
    ]
    return Batch(index, list(places), np.array(place, dtype=int), unscored)


def score_captions(
    ids: Sequence[str], captions: Sequence[str], references: References, metrics: Iterable[str] = CAPTION_SCORES
) -> pd.DataFrame:
    """Return the scores of each caption against the references of its image: one float64 column for each metric.

    An image may come any number of times. Rows are in the given order, with the index of ``captions`` if it is a
    Series. NaN where there is no score: ``attrs["missing"]`` is {metric: reason} and ``attrs["unscored"]`` {row label:
    reason}. An empty caption has scores, and they are 0. Raises UserError for an unknown metric or without a Java.
    """
    batch = _ready(ids, captions, references)
    return _table(batch, references, check_metrics(metrics))


def score_corpus(
    ids: Sequence[str], captions: Sequence[str], references: References, metrics: Iterable[str] = CAPTION_SCORES
) -> tuple[dict[str, float], pd.DataFrame]:
    """Return {metric: score of all captions as a whole} as tables of the literature have it, and ``score_captions``.

    BLEU comes from summed counts and METEOR from the jar's aggregate; neither is a mean of sentence scores. The others
    are means over the captions that can be scored. NaN where a metric is missing.
    """
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
    """Return the counts that BLEU is made of, int64, one row for each caption: sums go into ``bleu_from_counts``.

    A caption that cannot be scored has zeros, which leave any sum as it is.
    """
    batch = _ready(ids, captions, references)
    counts = np.vstack([bleu.counts(batch.pairs), np.zeros((1, len(bleu.COUNTS)), np.int64)])
    return pd.DataFrame(counts[batch.place], index=batch.index, columns=list(bleu.COUNTS))


def available() -> dict[str, str | None]:
    """Return {caption score: None if it can be had here, else the reason}; a cheap check that loads no model."""
    try:
        find_java()
    except UserError as error:
        return dict.fromkeys(CAPTION_SCORES, str(error))
    return dict.fromkeys(CAPTION_SCORES) | {"spice_spacy": spice_spacy.missing(), "spice": spice_official.missing()}


def check_metrics(metrics: Iterable[str]) -> list[str]:
    """Return the metrics once each in the order of ``CAPTION_SCORES``, "bleu" standing for four; UserError if unknown."""
    wanted = {name for one in metrics for name in (CAPTION_SCORES[:4] if one == "bleu" else (one,))}
    unknown = sorted(wanted - set(CAPTION_SCORES))
    if unknown or not wanted:
        what = f"unknown {', '.join(unknown)}" if unknown else "none is named"
        raise UserError(f"metrics: {what}; choose from bleu, {', '.join(CAPTION_SCORES)}")
    return [name for name in CAPTION_SCORES if name in wanted]


def _table(batch: Batch, references: References, names: Sequence[str]) -> pd.DataFrame:
    """Return the columns, and in ``attrs`` what has no value and why."""
    if "meteor" in names and batch.pairs:
        shared_meteor()  # loads for some seconds while the others are computed
    columns, missing = {}, {}
    for family, scorer in _SCORERS.items():
        wanted = [name for name in family if name in names]
        try:
            found = scorer(batch, references) if wanted and batch.pairs else {}
        except (Missing, JavaFailed) as reason:
            found, missing = {}, missing | dict.fromkeys(wanted, str(reason))
        columns |= {name: batch.spread(found.get(name, np.full(len(batch.pairs), math.nan))) for name in wanted}
    table = pd.DataFrame({name: columns[name] for name in names}, index=batch.index)
    failed = {label: batch.failed[p] for label, p in zip(batch.index, batch.place, strict=True) if p in batch.failed}
    table.attrs.update(missing=missing, unscored=batch.unscored | failed)
    return table


def _bleu(batch: Batch, references: References) -> dict[str, np.ndarray]:
    return dict(zip(CAPTION_SCORES, bleu_from_counts(bleu.counts(batch.pairs)).T, strict=False))


def _cider(batch: Batch, references: References) -> dict[str, Sequence[float]]:
    if references.frequencies.documents < 2:
        raise Missing("document frequencies need at least two images with references")
    images = {group: ImageReferences(group, references.frequencies) for _, group in batch.pairs}
    plain, clipped = zip(*(images[group].score(caption) for caption, group in batch.pairs), strict=True)
    return {"cider": plain, "cider_d": clipped}


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
        except JavaFailed as failure:
            batch.failed[place] = f"no METEOR for a caption of {len(caption.split()):,} words: {failure}"
            shared_meteor().statistics("a", ("a",))  # if it fails at this, it does not work at all
    return {"meteor": values}


def _spice_spacy(batch: Batch, references: References) -> dict[str, list[float]]:
    reason = spice_spacy.missing()
    if reason:
        raise Missing(reason)
    groups = [group for _, group in batch.pairs]
    graphs = spice_spacy.parse({caption for caption, _ in batch.pairs} | references.new_captions(groups))
    scenes = references.scenes(groups, graphs)
    values = []
    for place, (caption, group) in enumerate(batch.pairs):
        if graphs[caption] is None:
            batch.failed[place] = f"no SPICE (spaCy) for a caption of {len(caption.split()):,} words: too deep a sentence"
        values.append(math.nan if graphs[caption] is None else f_score(merge([graphs[caption]]), scenes[group]))
    return {"spice_spacy": values}


def _spice(batch: Batch, references: References) -> dict[str, list[float]]:
    reason = spice_official.missing()
    if reason:
        raise Missing(reason)
    return {"spice": spice_official.scores(batch.pairs)}


_SCORERS: Mapping[tuple[str, ...], Callable[[Batch, References], Mapping[str, Sequence[float]]]] = {
    CAPTION_SCORES[:4]: _bleu, ("cider", "cider_d"): _cider, ("rouge_l",): _rouge, ("spice_spacy",): _spice_spacy,
    ("spice",): _spice, ("meteor",): _meteor,  # last: its process loads while the others are computed
}  # fmt: skip
