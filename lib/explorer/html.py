"""What the page shows, as strings of HTML: no widget here, so it can be tested by reading it.

Every text of unknown origin is escaped, every picture is embedded, nothing comes from a network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lib import figures, labels
from lib.explorer.play import Candidate, Game, Leg, ranked, selected
from lib.images import data_uri

SMALL = 128  # pixels: pictures up to this side are enlarged without smoothing
PREVIEW = 384  # pixels: larger ones are reduced to it before they travel to the browser
SHOWN = ("cider", "bleu4", "rouge_l", "meteor", "spice_spacy", "sem_f", "clipscore", "clip_score")
TIMES_100 = frozenset(("cider", "bleu4", "rouge_l", "meteor", "spice_spacy"))

NEAR = 0.001  # similarities closer than this are called equal: the last decimal that the page prints


def style() -> str:
    """The page's style sheet, with the colours of the figures."""
    text = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    for name in ("SELECTED", "ORANGE", "BLUE", "GREEN", "VERMILLION"):
        text = text.replace(name, getattr(figures, name))
    return f"<style>{text}</style>"


# --- pieces ------------------------------------------------------------------------------------


def picture(pixels: Image.Image | np.ndarray, alt: str) -> str:
    """A picture as an ``img`` with its bytes in it; small ones stay crisp when enlarged."""
    uri, crisp = data_uri(pixels, SMALL, PREVIEW)
    kind = " cx-crisp" if crisp else ""
    return f'<img class="cx-picture{kind}" alt="{escape(alt, quote=True)}" src="{uri}">'


def number(name: str, value: float) -> str:
    """A score as tables print it: captions' scores times 100."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.1f}" if name in TIMES_100 else f"{value:.3f}".replace("-", "−")


def alert(message: str) -> str:
    """An error for the user, read out by screen readers at once."""
    return f'<div class="cx cx-alert" role="alert"><b>That did not work.</b> {escape(message)}</div>'


def status(message: str) -> str:
    """What is going on, read out when there is time."""
    return f'<div class="cx cx-status" role="status" aria-live="polite">{escape(message)}</div>'


def note(message: str) -> str:
    """A remark in small print."""
    return f'<p class="cx cx-note">{escape(message)}</p>' if message else ""


# --- the source and its candidates -------------------------------------------------------------


def source_card(game: Game) -> str:
    """The source and what is known about it: the picture, the text, what annotators wrote."""
    shown, text = game.source_picture(), game.source_text
    parts = []
    if shown is not None:
        hint = "; ".join(game.source.references[:1]) or "no description"
        parts.append(picture(shown, f"the source picture: {hint}"))
    words = f"<h3>The game starts from this text</h3><p><b>{escape(text)}</b></p>" if text else ""
    title = "What annotators wrote" if not text else "All that annotators wrote about its picture"
    if game.source.references and (shown is not None or not text):
        entries = "".join(f"<li>{escape(r)}</li>" for r in game.source.references)
        words += f"<h3>{title}</h3><ul>{entries}</ul>"
    if game.source.domain:
        words += note(f"domain: {labels.DOMAINS.get(game.source.domain, game.source.domain)}")
    if not words:
        words = note("Nobody has described this picture, so captions cannot be scored.")
    return f'<div class="cx cx-source">{"".join(parts)}<div>{words}</div></div>'


def scores(candidate: Candidate) -> str:
    """Similarity, judge and scores of one candidate as a list."""
    lines = [("Similarity", number("", candidate.similarity), ' class="cx-main"')]
    if not math.isnan(candidate.judged):
        lines.append(("by the judge", number("", candidate.judged), ""))
    lines += [(labels.metric_label(name), number(name, candidate.scores[name]), "")
              for name in SHOWN if not math.isnan(candidate.scores.get(name, math.nan))]
    if not math.isnan(candidate.logprob):
        lines.append(("log p", f"{candidate.logprob:.1f}".replace("-", "−"), ""))
    rows = "".join(f"<dt{kind}>{escape(name)}</dt><dd{kind}>{value}</dd>" for name, value, kind in lines)
    return f'<dl class="cx-scores">{rows}</dl>'


def card(
    candidate: Candidate, is_selected: bool, looked_at: bool = False, badge: str = "",
) -> str:
    """One candidate: its picture, its words, its scores."""
    kinds = ["cx-card"] + ["cx-selected"] * is_selected + ["cx-looked-at"] * looked_at
    kinds += ["cx-yours"] * (candidate.index < 0)
    mark = badge or ("selected" if is_selected else "yours" if candidate.index < 0 else "")
    shown = '<div class="cx-waiting">drawing …</div>'
    if candidate.flagged:
        shown = '<div class="cx-waiting">withheld by the safety checker</div>'
    elif candidate.picture is not None:
        shown = picture(candidate.picture, f"drawn: {candidate.text or 'not read yet'}")
    words = escape(candidate.text) if candidate.text is not None else "reading …"
    top = f'<span class="cx-badge">{escape(mark)}</span>' if mark else ""
    cut = note("The generator has read only the beginning: the text is too long for it.") * candidate.cut
    return (f'<li class="{" ".join(kinds)}">{shown}{top}<p class="cx-words">{words}</p>'
            f"{cut}{scores(candidate)}</li>")


def cards(candidates: Sequence[Candidate], looked_at: int | None = None) -> str:
    """Candidates, most similar first, the selected one marked."""
    best = selected(candidates)
    entries = "".join(card(c, c is best, c.index == looked_at) for c in ranked(candidates))
    return f'<ol class="cx cx-cards" aria-label="candidates, most similar first">{entries}</ol>'


def origin_card(game: Game) -> str:
    """The source as a card, to stand beside what was made of it."""
    shown, text = game.source_picture(), game.source_text
    given = "" if shown is None else picture(shown, "the source picture")
    hint = "<b>" + escape(text) + "</b>" if text else escape("; ".join(game.source.references[:1]))
    whose = "" if shown is None or not text else note("Its own picture, which the game has not seen.")
    return (f'<div class="cx-card cx-origin">{given or "<br>"}<span class="cx-badge">source</span>'
            f'<p class="cx-words">{hint}</p>{whose}</div>')


def round_trip(game: Game, candidates: Sequence[Candidate], missing: str = "") -> str:
    """The source beside its candidates, what the selection rests on, and what is missing."""
    return (f'<div class="cx">{lead(candidates)}<div class="cx-round">{origin_card(game)}'
            f"{cards(candidates)}</div>{note(missing)}</div>")


def lead(candidates: Sequence[Candidate]) -> str:
    """By how much the selected candidate leads, once all are compared; "" before."""
    order = [c.similarity for c in ranked(candidates) if not c.flagged]
    if len(order) < 2 or any(math.isnan(value) for value in order):
        return ""
    close = sum(order[0] - value < NEAR for value in order[1:])
    words = f"The selected candidate leads by {order[0] - order[1]:.3f}."
    if close:
        others = "another one is" if close == 1 else f"{close} others are"
        words = f"{others} as similar, to within {NEAR:g}: luck decides between them.".capitalize()
    return note(f"{words} Similarity of the best {number('', order[0])}, of all on average "
                f"{number('', sum(order) / len(order))}.")


def contest(game: Game, tries: Sequence[Candidate], theirs: Sequence[Candidate]) -> str:
    """The captions by hand beside the source, the last one first; below them the captioner's own."""
    if not tries:
        return round_trip(game, theirs)
    mine = "".join(card(one, False) for one in reversed(tries))
    board = f'<ol class="cx-cards" aria-label="your captions, the last one first">{mine}</ol>'
    return (f'<div class="cx">{duel(tries[-1], theirs)}<div class="cx-round">{origin_card(game)}{board}</div>'
            f"<h3>The captioner's candidates</h3>{lead(theirs)}{cards(theirs)}</div>")


def duel(mine: Candidate, theirs: Sequence[Candidate]) -> str:
    """Whether a caption by hand beats the captioner: by similarity, and by what annotators wrote."""
    best = selected(theirs)
    if best is None or math.isnan(mine.similarity):
        return ""
    ahead = mine.similarity - best.similarity
    words = "draws level with" if abs(ahead) < NEAR else "beats" if ahead > 0 else "does not beat"
    said = (f"<b>Your caption {words} the captioner</b>: similarity {number('', mine.similarity)}, its "
            f"best candidate has {number('', best.similarity)}.")
    better = sum(one.similarity > mine.similarity + NEAR for one in theirs)
    if better:
        said += f" {better} of its {len(theirs)} candidates {'comes' if better == 1 else 'come'} closer."
    known = [one.scores.get("cider", math.nan) for one in (mine, best)]
    if not any(math.isnan(value) for value in known):
        said += (f" Against what annotators wrote, CIDEr is {number('cider', known[0])} for yours and "
                 f"{number('cider', known[1])} for the selected one.")
    return f'<p class="cx cx-verdict" role="status">{said}</p>'


def side_by_side(
    game: Game, sides: Mapping[str, Sequence[Candidate]], captions: Mapping[str, str]
) -> str:
    """The candidates of several games on one source, a column each, with what differs in the title."""
    columns = "".join(
        f"<section><h3>{escape(name)}</h3>{note(captions[name])}{_means(found)}{cards(found)}</section>"
        for name, found in sides.items())
    return f'<div class="cx">{source_card(game)}<div class="cx-sides">{columns}</div></div>'


def _means(candidates: Sequence[Candidate]) -> str:
    """A side of a comparison in one line."""
    known = [c for c in candidates if not math.isnan(c.similarity)]
    if not known:
        return ""
    mean = sum(c.similarity for c in known) / len(known)
    said = [f"best similarity {number('', known[0].similarity)}", f"mean {number('', mean)}",
            f"different captions: {len({c.text for c in known})}"]
    cider = known[0].scores.get("cider", math.nan)
    said += [] if math.isnan(cider) else [f"CIDEr of the selected {number('cider', cider)}"]
    return f"<p>{escape(', '.join(said))}</p>"


# --- drift -------------------------------------------------------------------------------------


def legs(game: Game, found: Sequence[Leg]) -> str:
    """The rounds of keeping on playing: the source, a card a round, a curve of how meaning drifts."""
    entries = "".join(_leg(leg) for leg in found)
    curve = drift_curve(found) if len(found) > 1 else ""
    return (f'<div class="cx"><div class="cx-round">{origin_card(game)}'
            f'<ol class="cx-cards" aria-label="rounds in order">{entries}</ol></div>{curve}</div>')


def _leg(leg: Leg) -> str:
    lines = [("to the source", number("", leg.to_first)), ("to the last", number("", leg.to_last))]
    if not math.isnan(leg.sem_f):
        lines.append(("Semantic F1", number("", leg.sem_f)))
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in lines)
    return (f'<li class="cx-card">{picture(leg.winner.picture, f"round {leg.number}: {leg.winner.text}")}'
            f'<span class="cx-badge cx-round-number">round {leg.number}</span>'
            f'<p class="cx-words">{escape(leg.winner.text or "")}</p><dl class="cx-scores">{rows}</dl></li>')


def drift_curve(found: Sequence[Leg]) -> str:
    """Similarity to the source by round, and Semantic F1 where it is known, as inline SVG."""
    width, height, left, bottom = 520, 200, 44, 44
    curves = [("similarity to the source", "", [leg.to_first for leg in found])]
    if not any(math.isnan(leg.sem_f) for leg in found):
        curves.append(("semantic F1 against its scene", "second", [leg.sem_f for leg in found]))
    values = [v for _, _, curve in curves for v in curve]
    low, high = min(0.0, *values), max(1.0, *values)
    step = (width - left - 20) / (len(found) - 1)

    def y(value: float) -> float:
        return 12 + (high - value) / (high - low) * (height - bottom - 12)

    parts = [f'<line class="cx-grid" x1="{left}" x2="{width - 20}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
             f'<text class="cx-tick" x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.1f}</text>'
             for v in (0.0, 0.5, 1.0)]
    for place, (name, kind, curve) in enumerate(curves):
        path = " ".join(f"{left + i * step:.1f},{y(v):.1f}" for i, v in enumerate(curve))
        second = f" cx-{kind}" if kind else ""
        label = "cx-label-second" if kind else "cx-first"
        parts.append(f'<polyline class="cx-line{second}" points="{path}"/>')
        parts.append(f'<text class="cx-tick {label}" x="{left + 8}" '
                     f'y="{height - bottom - 8 - 18 * (1 - place)}">{name}</text>')
    parts += [f'<text class="cx-tick" x="{left + i * step:.1f}" y="{height - 26}" '
              f'text-anchor="middle">{leg.number}</text>' for i, leg in enumerate(found)]
    parts.append(f'<text class="cx-name" x="{(left + width - 20) / 2}" y="{height - 6}" '
                 'text-anchor="middle">round</text>')
    said = ", ".join(f"round {leg.number}: {leg.to_first:.2f}" for leg in found)
    return (f'<svg class="cx-scatter" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="Similarity to the source by round. {said}">{"".join(parts)}</svg>')


# --- finished runs -----------------------------------------------------------------------------


def source_table(found: pd.DataFrame, score: str, limit: int = 12) -> str:
    """The first sources in the order asked for, each with its best candidate within the view."""
    head = ("source", "domain", "caption", "similarity", "judge", labels.metric_label(score),
            "disagreement")
    lines = [_table_line(line, score) for line in found.head(limit).itertuples()]
    rest = f"{len(found)} sources" + (f", the first {limit} are listed" if len(found) > limit else "")
    rest += (", each with its best candidate within the filters. Disagreement: percentile of the similarity "
             "minus percentile of the score.")
    return f'<div class="cx cx-scroll">{table(head, lines, 4)}</div>' + note(rest)


def _table_line(line: object, score: str) -> tuple[str, ...]:
    words = line.message if line.task == "image" else line.reconstruction
    domain = labels.DOMAINS.get(line.domain, line.domain) if isinstance(line.domain, str) else ""
    return (line.item, domain, words, number("", line.similarity), number("", line.similarity_judge),
            number(score, line.score), f"{line.disagreement:+.2f}".replace("-", "−"))


def table(head: Iterable[str], lines: Iterable[Iterable[str]], numbers: int = 0) -> str:
    """A plain table; every cell is escaped, the last ``numbers`` columns are flush right."""
    names = list(map(str, head))

    def row(cells: Iterable[str], tag: str, scope: str = "") -> str:
        kinds = ["" if place < len(names) - numbers else ' class="cx-number"' for place in range(len(names))]
        return "".join(f"<{tag}{scope}{kind}>{escape(str(cell))}</{tag}>"
                       for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{row(line, 'td')}</tr>" for line in lines)
    top = row(names, "th", ' scope="col"')
    return f'<table class="cx-table"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
