"""One round of the game told step by step, with every quantity on the way (the paper's Figures 1, 2).

Strings of HTML like those of :mod:`lib.explorer.html`; the page and notebook 00 show the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from lib import labels
from lib.explorer import html
from lib.explorer.play import Candidate, Game, noise_seeds, ranked, selected

FIRST = 5  # numbers of an embedding that are printed


@dataclass(frozen=True)
class Words:
    """What a direction calls its players and steps."""

    sender: str
    receiver: str
    send: str
    receive: str
    select: str


WORDS = {
    "image": Words(
        "captioner", "generator",
        "The captioner {decodes}. The source is x; log p is the log-probability that it gives to the "
        "whole caption.",
        "The generator has not seen the source. It starts from noise and removes it in {steps} steps, "
        "guided by the caption (guidance {guidance:g}). {noise}",
        "The best caption is selected"),
    "text": Words(
        "generator", "captioner",
        "The generator draws {k} pictures x of the text y: each starts from its own noise and is "
        "denoised in {steps} steps with guidance {guidance:g}.",
        "The captioner has not seen the text. It reads each picture{decodes}: one caption y′ a picture.",
        "The best picture is selected"),
}


def flow(game: Game, best: Candidate) -> str:
    """The round trip of one candidate as a row: source, message, reconstruction, similarity (Figure 1)."""
    words, source = WORDS[game.direction], game.source_picture()
    drawn = html.picture(best.picture, f"drawn: {best.text}")
    said = f"<q>{escape(best.text or '')}</q>"
    if game.direction == "image":
        stations = [("source x", html.picture(source, "the source picture")), ("message y", said),
                    ("reconstruction x′", drawn)]
    else:
        stations = [("source y", f"<q>{escape(game.source_text or '')}</q>"), ("message x", drawn),
                    ("reconstruction y′", said)]
    models = [words.sender, words.receiver, "encoder"]
    stations.append(("similarity", f"<b>{html.number('', best.similarity)}</b>"))
    parts = [_station(*stations[0])]
    for model, station in zip(models, stations[1:], strict=True):
        parts += [f'<li class="cx-model"><b aria-hidden="true">→</b>{model}</li>', _station(*station)]
    return f'<ol class="cx cx-flow" aria-label="one round trip">{"".join(parts)}</ol>'


def _station(name: str, shown: str) -> str:
    return f"<li>{shown}<small>{name}</small></li>"


def sent(game: Game, candidates: Sequence[Candidate]) -> str:
    """Step 1: the messages."""
    k, sender = game.n_candidates, game.preset.captioner.sender
    decodes = (f"samples {k} caption{'s' * (k > 1)} y from p(y | x), each repeatable by its seed"
               if not sender.deterministic else "finds one caption y by greedy decoding or beam search")
    how = WORDS[game.direction].send.format(
        k=k, steps=game.preset.generator.steps, guidance=game.preset.generator.guidance, decodes=decodes)
    if game.direction == "image":
        lines = [(c.index, c.text, f"{c.logprob:.2f}".replace("-", "−"), len(c.text.split()), c.seed)
                 for c in candidates]
        shown = html.table(("k", "caption yₖ", "log p", "words", "seed"), lines, 3)
    else:
        shown = html.table(("k", "noise seed"), [(c.index, c.seed) for c in candidates])
    return _step("1 · The sender's messages", how, shown)


def received(game: Game, candidates: Sequence[Candidate]) -> str:
    """Step 2: the reconstructions, with the pictures between."""
    seeds = sorted(set(noise_seeds(game)))
    shared = (f"All share one noise (seed {seeds[0]}), so equal captions give equal pictures."
              if len(seeds) == 1 else "Each has noise of its own.")
    how = WORDS[game.direction].receive.format(
        steps=game.preset.generator.steps, guidance=game.preset.generator.guidance, noise=shared,
        decodes=", here without sampling" * game.preset.captioner.receiver.deterministic)
    entries = "".join(
        f'<li class="cx-card">{html.picture(c.picture, f"drawn: {c.text}")}<p class="cx-words">'
        f"{c.index} · {escape(c.text or '')}</p></li>" for c in candidates if c.complete)
    shown = f'<ol class="cx-cards" aria-label="reconstructions in order of k">{entries}</ol>'
    return _step("2 · The receiver's reconstructions", how, shown)


def compared(game: Game, candidates: Sequence[Candidate], source: np.ndarray, others: np.ndarray) -> str:
    """Step 3: the embeddings and their cosines, worked out by hand.

    source: (d,) and others: (K, d), raw embeddings as :func:`lib.explorer.play.embeddings` gives them.
    """
    products, lengths = others @ source, np.linalg.norm(others, axis=1) * np.linalg.norm(source)
    first = ", ".join(f"{value:.3f}" for value in source[:FIRST]).replace("-", "−")
    what = "pictures" if game.direction == "image" else "texts"
    how = (f"The encoder turns both {what} into vectors of {source.size} numbers. The source's begins "
           f"with {first} and has length {np.linalg.norm(source):.3f}. The cosine of source and "
           "reconstruction is the similarity.")
    lines = [(c.index, f"{product:.3f}", f"{length:.3f}", f"{product / length:.4f}")
             for c, product, length in zip(candidates, products, lengths, strict=True)]
    lines = [tuple(str(cell).replace("-", "−") for cell in line) for line in lines]
    head = ("k", "e · e′ₖ", "|e| |e′ₖ|", "cosine = e · e′ₖ / |e| |e′ₖ|")
    return _step("3 · The encoder compares", how, html.table(head, lines, 3))


def chosen(game: Game, candidates: Sequence[Candidate]) -> str:
    """Step 4: the ranking, the selected candidate and its scores."""
    best, known = selected(candidates), labels.PRIMARY[game.direction]
    how = (f"Rank 1 is the most similar reconstruction: candidate {best.index}. The scores come from "
           "what annotators wrote or from the source's own picture, which the game has not seen: where "
           "the paper is right, they fall from the first rank to the last.")
    names = [name for name in dict.fromkeys((known, *html.SHOWN)) if name in best.scores]
    head = ("rank", "k", "caption", "similarity", *map(labels.metric_label, names))
    lines = [(rank, c.index, c.text, html.number("", c.similarity),
              *(html.number(name, c.scores.get(name, np.nan)) for name in names))
             for rank, c in enumerate(ranked(candidates), start=1)]
    shown = html.table(head, lines, 1 + len(names))
    return _step(f"4 · {WORDS[game.direction].select}", how, shown)


def _step(title: str, how: str, shown: str) -> str:
    return (f'<section class="cx cx-step"><h4>{title}</h4><p>{escape(how)}</p>'
            f'<div class="cx-scroll">{shown}</div></section>')
