"""Scores of one source's candidates: against annotators' captions, the true scene, the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from lib.errors import UserError
from lib.explorer.models import models_for
from lib.explorer.play import OWN, Candidate, Game, dataset
from lib.metrics import Corpus, clip_score, clipscore, score_candidates, score_semantics
from lib.players import Models, reads
from lib.roundtrip import CACHE

QUICK_SCORES = ("bleu4", "cider", "rouge_l")  # without a parser or METEOR's process: under a second


def score(
    game: Game, candidates: Sequence[Candidate], models: Models | None = None,
    lend: str | None = None,
) -> tuple[list[Candidate], str]:
    """Score complete candidates; returns them in order and a word on what is missing.

    Captions are scored against what the annotators wrote, with the document frequencies of the
    source's dataset (or of the dataset ``lend``), and against the true scene where one is known.
    """
    ready = [candidate for candidate in candidates if candidate.complete and not candidate.flagged]
    if not ready:
        return list(candidates), ""
    models = models or models_for(game.preset)
    found = {c.index: dict(c.scores) for c in ready}
    missing = _score_against_references(game, ready, found, lend)
    if game.source.scene is not None:
        table = score_semantics([c.text for c in ready], [game.source.scene] * len(ready))
        for candidate, value in zip(ready, table["sem_f"], strict=True):
            found[candidate.index]["sem_f"] = float(value)
    _score_embeddings(game, ready, found, models)
    return [replace(c, scores=found.get(c.index, c.scores)) for c in candidates], missing


def _score_against_references(
    game: Game, ready: Sequence[Candidate], found: dict[int, dict[str, float]], lend: str | None
) -> str:
    """Add caption scores to ``found``; returns why there are none."""
    references = game.source.references
    if not references:
        return "no caption scores: nobody has described this picture"
    home = lend or (game.dataset if game.dataset != OWN else None)
    if home is None:
        return "no caption scores: their word statistics come from a dataset"
    try:
        corpus = corpus_of(home)
        if game.source.id not in corpus.references or game.dataset != home:
            corpus = corpus.borrow({game.source.id: references})
        ids = [game.source.id] * len(ready)
        table = score_candidates(ids, [c.text for c in ready], corpus, QUICK_SCORES)
    except UserError as error:  # such as no Java: the game is worth seeing without these scores
        return f"no caption scores: {error}"
    for candidate, (_, line) in zip(ready, table.iterrows(), strict=True):
        found[candidate.index] |= {name: float(value) for name, value in line.items()}
    return ""


@lru_cache(maxsize=2)
def corpus_of(name: str) -> Corpus:
    """A dataset's references and word statistics, made once."""
    return Corpus.build(dataset(name).references, cache_dir=CACHE)


def _score_embeddings(
    game: Game, ready: Sequence[Candidate], found: dict[int, dict[str, float]], models: Models
) -> None:
    """CLIPScore of captions to the source picture (image task); CLIP score of the message
    pictures to the source text's own picture (text task, 4.3)."""
    picture = game.source_picture()
    needed = ("images", "texts") if game.direction == "image" else ("images",)
    if picture is None or not all(reads(models.encoder, kind) for kind in needed):
        return
    source = models.encoder.embed_images([picture])
    if game.direction == "image":
        name, others = "clipscore", models.encoder.embed_texts([c.text for c in ready])
        values = clipscore(np.repeat(source, len(ready), axis=0), others)
    else:
        name, others = "clip_score", models.encoder.embed_images([c.picture for c in ready])
        values = clip_score(np.repeat(source, len(ready), axis=0), others)
    for candidate, value in zip(ready, values, strict=True):
        found[candidate.index][name] = float(value)
