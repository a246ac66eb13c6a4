"""One front to every score: per candidate for the rows, per corpus for the tables.

Scales. BLEU, METEOR, ROUGE-L and SPICE lie in [0, 1]. CIDEr and CIDEr-D carry the factor 10 of
the COCO tool kit, so 1.0 is what papers print as 100; tables multiply every score by 100.

Names. ``cider`` is the plain formula and ``cider_d`` is what ``pycocoevalcap`` calls ``Cider``.
``spice`` is the official scorer; ``spice_spacy`` is our own, from the same paper with another
parser, and is never shown under the other's name.

Missing. A score that cannot be computed is null with a reason, never 0: ``attrs["missing"]``
tells why a whole metric is absent, ``attrs["unscored"]`` why a row is. An empty caption can be
scored, and its scores are 0.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.errors import UserError
from lib.scoring import bleu, cider, rouge, spice_official
from lib.scoring.clip import clip_score, clipscore, ref_clipscore
from lib.scoring.corpus import Corpus
from lib.scoring.java import JavaFailed
from lib.scoring.spice_graph import f_score, merge
from lib.scoring.spice_spacy import NoParser
from lib.scoring.wordnet import load_wordnet

__all__ = [
    "DEFAULT_METRICS",
    "LABELS",
    "METRICS",
    "Corpus",
    "bleu_from_statistics",
    "bleu_statistics",
    "clip_score",
    "clipscore",
    "ref_clipscore",
    "score_all",
    "score_candidates",
    "score_corpus",
    "score_semantics",
]

#: Every caption metric and the header that tables and figures give it.
LABELS: Mapping[str, str] = {
    "bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4",
    "cider": "CIDEr", "cider_d": "CIDEr-D", "meteor": "METEOR", "rouge_l": "ROUGE-L",
    "spice_spacy": "SPICE (spaCy)", "spice": "SPICE",
}
METRICS: tuple[str, ...] = tuple(LABELS)
DEFAULT_METRICS = METRICS
#: What the true scene judges, before the prefix "sem_".
SEMANTICS = [
    *(f"{kind}_{part}" for kind in ("object", "colour", "relation", "setting") for part in "prf"),
    "f",
]
BLEU = METRICS[:4]

log = logging.getLogger(__name__)

bleu_from_statistics = bleu.from_statistics


class Unavailable(Exception):
    """A metric cannot be had here; the message is the reason that goes with its nulls."""


@dataclass(frozen=True)
class Batch:
    """Candidates made ready: their PTB tokens, grouped by item; what cannot be scored is told."""

    size: int
    tokens: dict[int, str]  # row -> tokens, scorable rows only
    groups: dict[str, list[int]]  # item -> its scorable rows
    unscored: dict[int, str]  # row -> reason

    @classmethod
    def of(cls, item_ids: Sequence[str], captions: Sequence[str], corpus: Corpus) -> Batch:
        """Check and tokenise; one bad row becomes unscored and spoils no other."""
        if len(item_ids) != len(captions):
            raise UserError(f"item_ids: {len(item_ids)} ids for {len(captions)} captions")
        captions = list(captions)  # a table's column is indexed by its labels, a list by its rows
        unscored: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for row, (item, caption) in enumerate(zip(map(str, item_ids), captions, strict=True)):
            if not isinstance(caption, str):
                unscored[row] = f"item {item}: the caption is not text but {caption!r}"
            elif item not in corpus.references:
                unscored[row] = f"item {item}: not among the references"
            elif not corpus.reference_tokens(item):
                unscored[row] = f"item {item}: has no reference with a word in it"
            else:
                groups.setdefault(item, []).append(row)
        rows = [row for group in groups.values() for row in group]
        tokens = dict(zip(rows, corpus.tokenize([captions[row] for row in rows]), strict=True))
        return cls(len(captions), tokens, groups, unscored)

    @property
    def rows(self) -> list[int]:
        """The scorable rows in their order."""
        return sorted(self.tokens)

    def column(self, values: Mapping[int, float]) -> np.ndarray:
        """float64 (size,), NaN where a row has no value."""
        column = np.full(self.size, np.nan)
        for row, value in values.items():
            column[row] = value
        return column


# ---------------------------------------------------------------- scores of candidates


def score_candidates(
    item_ids: Sequence[str], captions: Sequence[str], corpus: Corpus,
    metrics: Iterable[str] = DEFAULT_METRICS,
) -> pd.DataFrame:
    """Score each caption by itself against the references of its item.

    Args:
        item_ids, captions: one entry a candidate; an item may come any number of times.
        corpus: the references, and the document frequencies of the full split.
        metrics: any of ``METRICS``.

    Returns:
        One row a candidate in the given order, one float64 column a metric in the order of
        ``METRICS``; NaN where there is no score. ``attrs["missing"]`` is {metric: reason} and
        ``attrs["unscored"]`` is {row: reason}.

    Raises:
        UserError: an unknown metric, lists of unequal length, or no Java for the tokenizer.
    """
    names = check_metrics(metrics)
    batch = Batch.of(item_ids, captions, corpus)
    return _table(batch, *_columns(batch, corpus, names))


def score_corpus(
    item_ids: Sequence[str], captions: Sequence[str], corpus: Corpus,
    metrics: Iterable[str] = DEFAULT_METRICS,
) -> dict[str, float]:
    """Score a set of captions as a whole, as tables of the literature do.

    BLEU comes from the summed counts and METEOR from the jar's own aggregate of the summed
    statistics; neither is a mean of sentence scores. The others are means over captions.
    Rows that cannot be scored are left out, with a warning in the log. Usually there is one
    caption an item; where there are more, all count.

    Returns:
        {metric: value} in the order of ``METRICS``; NaN where the metric is missing here.
    """
    names = check_metrics(metrics)
    batch = Batch.of(item_ids, captions, corpus)
    if batch.unscored:
        reason = next(iter(batch.unscored.values()))
        log.warning("%d captions are left out, the first: %s", len(batch.unscored), reason)
    means = [name for name in names if name not in (*BLEU, "meteor")]
    columns, missing = _columns(batch, corpus, means)
    values = _totals(batch, corpus, names, columns, missing)
    for name, reason in missing.items():
        log.warning("%s is missing: %s", LABELS[name], reason)
    return values


def score_all(
    item_ids: Sequence[str], captions: Sequence[str], corpus: Corpus,
    metrics: Iterable[str] = DEFAULT_METRICS,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Both of the above in one go: what ``score_candidates`` and ``score_corpus`` return."""
    names = check_metrics(metrics)
    batch = Batch.of(item_ids, captions, corpus)
    columns, missing = _columns(batch, corpus, names)
    table = _table(batch, columns, missing)
    return table, _totals(batch, corpus, names, columns, missing)


def _columns(
    batch: Batch, corpus: Corpus, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Per-caption values of these metrics, and why those that are all NaN are missing."""
    columns: dict[str, np.ndarray] = {}
    missing: dict[str, str] = {}
    if "meteor" in names and batch.tokens:
        _start_meteor(corpus)
    for family, scorer in _FAMILIES.items():
        wanted = [name for name in family if name in names]
        if not wanted:
            continue
        try:
            scores = scorer(batch, corpus)
        except Unavailable as reason:
            missing.update((name, str(reason)) for name in wanted)
            scores = {name: np.full(batch.size, np.nan) for name in wanted}
        columns.update((name, scores[name]) for name in wanted)
    return {name: columns[name] for name in names}, missing


def _table(
    batch: Batch, columns: Mapping[str, np.ndarray], missing: Mapping[str, str]
) -> pd.DataFrame:
    table = pd.DataFrame(dict(columns), index=range(batch.size))
    table.attrs.update(missing=dict(missing), unscored=dict(batch.unscored))
    return table


def _totals(
    batch: Batch, corpus: Corpus, names: Sequence[str], columns: Mapping[str, np.ndarray],
    missing: dict[str, str],
) -> dict[str, float]:
    """Corpus values; adds to ``missing`` what fails here."""
    values = dict.fromkeys(names, math.nan)
    if not batch.tokens:
        return values
    for name, column in columns.items():
        if name not in missing:
            values[name] = float(np.nanmean(column))
    if any(name in names for name in BLEU):
        whole = bleu_from_statistics(_bleu_counts(batch, corpus).sum(axis=0))
        values.update((name, float(v)) for name, v in zip(BLEU, whole, strict=True) if name in names)
    if "meteor" in names and "meteor" not in missing:
        try:
            values["meteor"] = _corpus_meteor(batch, corpus)
        except Unavailable as reason:
            missing["meteor"], values["meteor"] = str(reason), math.nan
    return values


def check_metrics(metrics: Iterable[str]) -> list[str]:
    """The metrics without repetition, in the order of ``METRICS``; ``bleu`` stands for all four."""
    asked = [metrics] if isinstance(metrics, str) else list(metrics)
    wanted = {name for one in asked for name in (BLEU if one == "bleu" else (one,))}
    unknown = sorted(wanted - set(METRICS))
    if unknown:
        raise UserError(f"metrics: unknown {', '.join(unknown)}; choose from {', '.join(METRICS)}")
    return [name for name in METRICS if name in wanted]


# ---------------------------------------------------------------- one function a family


def bleu_statistics(
    item_ids: Sequence[str], captions: Sequence[str], corpus: Corpus
) -> np.ndarray:
    """The counts that BLEU is made of, so that corpus BLEU can be resampled.

    Returns:
        int64 (N, 10): matches of 1- to 4-grams, guesses of 1- to 4-grams, candidate length,
        closest reference length. Sums of rows go into ``bleu_from_statistics``. A row that
        cannot be scored is all zeros, which leaves any sum as it is.
    """
    return _bleu_counts(Batch.of(item_ids, captions, corpus), corpus)


def _bleu_counts(batch: Batch, corpus: Corpus) -> np.ndarray:
    counts = np.zeros((batch.size, bleu.WIDTH), dtype=np.int64)
    for item, rows in batch.groups.items():
        candidates = [batch.tokens[row] for row in rows]
        counts[rows] = bleu.statistics(candidates, corpus.reference_tokens(item))
    return counts


def _bleu(batch: Batch, corpus: Corpus) -> dict[str, np.ndarray]:
    """Sentence BLEU-1..4, with the library's guards against division by zero."""
    scores = bleu_from_statistics(_bleu_counts(batch, corpus))
    scores[list(batch.unscored)] = np.nan
    return {name: scores[:, order] for order, name in enumerate(BLEU)}


def _cider(batch: Batch, corpus: Corpus) -> dict[str, np.ndarray]:
    frequencies = corpus.frequencies
    if frequencies.documents < 2:
        raise Unavailable(
            "document frequencies need at least two images; borrow a dataset's (Corpus.borrow)"
        )
    plain: dict[int, float] = {}
    clipped: dict[int, float] = {}
    for item, rows in batch.groups.items():
        references = cider.References(corpus.reference_tokens(item), frequencies)
        known = {caption: references.score(caption) for caption in {batch.tokens[r] for r in rows}}
        for row in rows:
            plain[row], clipped[row] = known[batch.tokens[row]]
    return {"cider": batch.column(plain), "cider_d": batch.column(clipped)}


def _rouge(batch: Batch, corpus: Corpus) -> dict[str, np.ndarray]:
    values: dict[int, float] = {}
    for item, rows in batch.groups.items():
        candidates = [batch.tokens[row] for row in rows]
        values.update(zip(rows, rouge.scores(candidates, corpus.reference_tokens(item)), strict=True))
    return {"rouge_l": batch.column(values)}


def _start_meteor(corpus: Corpus) -> None:
    """Let METEOR load, which takes seconds, while other metrics are computed."""
    try:
        corpus.meteor()
    except (UserError, OSError) as error:  # told again, as the reason, where METEOR's turn comes
        log.debug("METEOR does not start: %s", error)


def _meteor_statistics(batch: Batch, corpus: Corpus) -> list[str]:
    """METEOR's statistics of the scorable rows, in their order; each distinct pair is asked once."""
    items = {row: item for item, rows in batch.groups.items() for row in rows}
    keys = [(items[row], batch.tokens[row]) for row in batch.rows]
    known = corpus.meteor_statistics
    new = sorted({key for key in keys if key not in known})
    if new:
        pairs = [(tokens, corpus.reference_tokens(item)) for item, tokens in new]
        known.update(zip(new, corpus.meteor().statistics(pairs), strict=True))
    return [known[key] for key in keys]


def _meteor(batch: Batch, corpus: Corpus) -> dict[str, np.ndarray]:
    try:
        statistics = _meteor_statistics(batch, corpus)
        scores = corpus.meteor().scores(statistics)
    except (JavaFailed, UserError, OSError) as failure:
        raise Unavailable(str(failure)) from failure
    return {"meteor": batch.column(dict(zip(batch.rows, scores, strict=True)))}


def _corpus_meteor(batch: Batch, corpus: Corpus) -> float:
    try:
        return corpus.meteor().aggregate(_meteor_statistics(batch, corpus))
    except (JavaFailed, UserError, OSError) as failure:
        raise Unavailable(str(failure)) from failure


def _spice_spacy(batch: Batch, corpus: Corpus) -> dict[str, np.ndarray]:
    """SPICE with spaCy's parser: F1 of scene graph tuples, in [0, 1]."""
    wordnet = load_wordnet()
    try:
        scenes = corpus.scenes(batch.groups)
        graphs = corpus.parse(batch.tokens.values())
    except NoParser as reason:
        raise Unavailable(str(reason)) from reason
    values: dict[int, float] = {}
    for item, rows in batch.groups.items():
        known = {
            caption: f_score(merge([graphs[caption]], wordnet), scenes[item], wordnet)
            for caption in {batch.tokens[row] for row in rows}
        }
        values.update((row, known[batch.tokens[row]]) for row in rows)
    return {"spice_spacy": batch.column(values)}


def _spice(batch: Batch, corpus: Corpus) -> dict[str, np.ndarray]:
    """SPICE by the official scorer; it keeps its parses in a cache of its own."""
    items = {row: item for item, rows in batch.groups.items() for row in rows}
    pairs = [(batch.tokens[row], corpus.reference_tokens(items[row])) for row in batch.rows]
    try:
        scores = spice_official.scores(pairs, corpus.java, corpus.cache / "spice")
    except (spice_official.NotFetched, JavaFailed, UserError, OSError) as reason:
        raise Unavailable(str(reason)) from reason
    return {"spice": batch.column(dict(zip(batch.rows, scores, strict=True)))}


Scorer = Callable[[Batch, Corpus], dict[str, np.ndarray]]

_FAMILIES: Mapping[tuple[str, ...], Scorer] = {
    BLEU: _bleu, ("cider", "cider_d"): _cider, ("rouge_l",): _rouge,
    ("spice_spacy",): _spice_spacy, ("spice",): _spice,
    ("meteor",): _meteor,  # last: its process loads while the others are computed
}


# ---------------------------------------------------------------- semantic accuracy


def score_semantics(captions: Sequence[str], scenes: Sequence[dict | None]) -> pd.DataFrame:
    """Does a caption name the true scene's objects, colours, relations and setting?

    Only for the picture book, whose true scenes are known; no references are involved.

    Args:
        captions: N captions.
        scenes: N scene dicts as ``scenes.json`` holds them, or ``None`` where unknown.

    Returns:
        N rows of the columns ``sem_object_p`` ... ``sem_f`` in [0, 1]; NaN where the scene is
        unknown or a part does not apply.
    """
    from lib.picturebook.scenes import Scene  # only the picture book needs these two
    from lib.picturebook.semantics import judge

    rows = []
    for caption, scene in zip(captions, scenes, strict=True):
        known = scene is not None and isinstance(caption, str)
        rows.append(judge(caption, Scene.from_dict(scene)) if known else {})
    table = pd.DataFrame(rows, index=range(len(rows)), columns=SEMANTICS, dtype=np.float64)
    return table.add_prefix("sem_")


if __name__ == "__main__":
    from lib.scoring.command import main

    raise SystemExit(main())
