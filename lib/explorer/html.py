"""What the page shows, as strings of HTML: no widget here, so it can be tested by reading it.

Every text of unknown origin is escaped, every picture is embedded, nothing comes from a network.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd
from PIL import Image

from lib import figures, labels
from lib.explorer.play import Candidate, Game, Leg, ranked, selected
from lib.images import png_bytes

SMALL = 128  # pixels: pictures up to this side are enlarged without smoothing
PREVIEW = 384  # pixels: larger ones are reduced to it before they travel to the browser
SHOWN = ("cider", "bleu4", "rouge_l", "meteor", "spice_spacy", "sem_f", "clipscore", "clip_score")
TIMES_100 = frozenset(("cider", "bleu4", "rouge_l", "meteor", "spice_spacy"))

CSS = """
.cx { color: var(--jp-ui-font-color1, #222); font-size: 14px; line-height: 1.4; }
.cx h3 { margin: 0 0 .4em; font-size: 15px; }
.cx-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px;
  list-style: none; margin: 6px 0; padding: 0; }
.cx-card { border: 2px solid var(--jp-border-color2, #ddd); border-radius: 8px; padding: 8px;
  background: var(--jp-layout-color1, #fff); position: relative; overflow-wrap: anywhere; }
.cx-card.cx-selected { border: 4px solid SELECTED; padding: 6px; }
.cx-card.cx-yours { border-style: dashed; border-color: ORANGE; }
.cx-card.cx-looked-at { outline: 3px dashed ORANGE; outline-offset: 2px; }
.cx-badge { position: absolute; top: 0; left: 0; background: SELECTED; color: #fff; font-weight: 600;
  padding: 1px 8px; border-radius: 3px 0 8px 0; font-size: 12px; }
.cx-yours .cx-badge { background: #8a5a00; }
.cx-picture { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; border-radius: 4px;
  background: var(--jp-layout-color2, #f2f2f2); }
.cx-crisp { image-rendering: pixelated; }
.cx-waiting { width: 100%; aspect-ratio: 1; display: grid; place-items: center; border-radius: 4px;
  color: var(--jp-ui-font-color2, #666); background: var(--jp-layout-color2, #f2f2f2); }
.cx-words { margin: 6px 0 4px; min-height: 2.8em; }
dl.cx-scores { display: grid; grid-template-columns: 1fr auto; gap: 0 6px; margin: 0; font-size: 12px; }
dl.cx-scores dt, dl.cx-scores dd { float: none; display: block; width: auto; padding: 0; margin: 0; }
dl.cx-scores dt { color: var(--jp-ui-font-color2, #555); font-weight: normal; }
dl.cx-scores dd { text-align: right; font-variant-numeric: tabular-nums; }
dl.cx-scores .cx-main { font-weight: 700; font-size: 13px; color: inherit; }
.cx-source { display: flex; margin: 8px 0; gap: 14px; align-items: flex-start; flex-wrap: wrap; }
.cx-source .cx-picture { width: 170px; flex: none; }
.cx-source ul, .cx-source ol { margin: .2em 0 0; padding-left: 1.2em; }
.cx-source > div { flex: 1 1 220px; }
.cx-alert { border-left: 4px solid VERMILLION; background: var(--jp-layout-color2, #f6f6f6);
  padding: 8px 12px; border-radius: 4px; overflow-wrap: anywhere; }
.cx-note { color: var(--jp-ui-font-color2, #555); font-size: 13px; margin: 4px 0; }
.cx-status { min-height: 1.4em; }
.cx-table { border-collapse: collapse; font-size: 13px; width: 100%; }
.cx-table th, .cx-table td { text-align: left; padding: 3px 8px; border-bottom: 1px solid
  var(--jp-border-color2, #ddd); font-variant-numeric: tabular-nums; }
.cx-scroll { overflow-x: auto; max-width: 100%; }
.cx-scatter { width: 100%; max-width: 640px; height: auto; display: block; }
.cx-scatter:focus-visible { outline: 3px solid ORANGE; }
.cx-dot { fill: BLUE; fill-opacity: .35; cursor: pointer; }
.cx-dot:hover { fill-opacity: 1; }
.cx-won { fill: SELECTED; fill-opacity: .75; }
.cx-chosen { fill: VERMILLION; fill-opacity: 1; stroke: #fff; stroke-width: 1.5; r: 7px; }
.cx-grid { stroke: var(--jp-border-color2, #ddd); stroke-width: .6; }
.cx-axis { stroke: var(--jp-ui-font-color2, #666); }
.cx-tick, .cx-name { fill: var(--jp-ui-font-color1, #222); font: 12px sans-serif; }
.cx-line { fill: none; stroke: BLUE; stroke-width: 2; }
.cx-line.cx-second { stroke: VERMILLION; stroke-dasharray: 5 3; }
.cx-first { fill: BLUE; } .cx-label-second { fill: VERMILLION; }
.cx-panel { max-width: 100%; }
.cx-panel .widget-label { min-width: 0; }
.cx-panel .widget-inline-hbox { box-sizing: border-box; padding-right: 6px; }
.widget-tab > .lm-TabBar .lm-TabBar-tab, .jupyter-widget-tab > .lm-TabBar .lm-TabBar-tab
  { flex: 0 1 auto; min-width: 0; max-width: none; }
@media (max-width: 640px) {
  .cx-cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .cx-source .cx-picture { width: 128px; }
  .cx-panel .widget-label { width: 6.5rem !important; }
  .jupyter-widget-tab > .lm-TabBar, .jupyter-widget-tab > .lm-TabBar .lm-TabBar-content
    { flex-wrap: wrap; height: auto; min-height: 0; max-height: none; }
  .jupyter-widget-tab > .lm-TabBar .lm-TabBar-tab { flex: 0 0 auto; padding: 0 5px; font-size: 12px; }
}
"""


def style() -> str:
    """The page's style sheet, with the colours of the figures."""
    text = CSS
    for name in ("SELECTED", "ORANGE", "BLUE", "VERMILLION"):
        text = text.replace(name, getattr(figures, name))
    return f"<style>{text}</style>"


# --- pieces ------------------------------------------------------------------------------------


def picture(pixels: Image.Image | np.ndarray, alt: str) -> str:
    """A picture as an ``img`` with its bytes in it; small ones stay crisp when enlarged."""
    shown = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels.convert("RGB")
    small = max(shown.size) <= SMALL
    if small:
        kind, data = "png", png_bytes(np.asarray(shown))
    else:
        shown.thumbnail((PREVIEW, PREVIEW))
        buffer = io.BytesIO()
        shown.save(buffer, format="JPEG", quality=90)
        kind, data = "jpeg", buffer.getvalue()
    encoded = base64.b64encode(data).decode("ascii")
    crisp = " cx-crisp" if small else ""
    return (f'<img class="cx-picture{crisp}" alt="{escape(alt, quote=True)}" '
            f'src="data:image/{kind};base64,{encoded}">')


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
        lines.append(("log p of the caption", f"{candidate.logprob:.1f}".replace("-", "−"), ""))
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
    return (f'<li class="{" ".join(kinds)}">{shown}{top}<p class="cx-words">{words}</p>'
            f"{scores(candidate)}</li>")


def cards(candidates: Sequence[Candidate], looked_at: int | None = None) -> str:
    """Candidates, most similar first, the selected one marked."""
    best = selected(candidates)
    entries = "".join(card(c, c is best, c.index == looked_at) for c in ranked(candidates))
    return f'<ol class="cx cx-cards" aria-label="candidates, most similar first">{entries}</ol>'


def side_by_side(sides: Mapping[str, Sequence[Candidate]], captions: Mapping[str, str]) -> str:
    """The candidates of several games, one block each, with what differs in the title."""
    blocks = "".join(f"<h3>{escape(name)}: {escape(captions[name])}</h3>{cards(found)}"
                     for name, found in sides.items())
    return f'<div class="cx">{blocks}</div>'


# --- drift -------------------------------------------------------------------------------------


def legs(game: Game, found: Sequence[Leg]) -> str:
    """The rounds of keeping on playing: a card a round and a curve of how meaning drifts."""
    entries = "".join(_leg(leg) for leg in found)
    start = source_card(game)
    curve = drift_curve(found) if len(found) > 1 else ""
    return (f'<div class="cx">{start}{curve}'
            f'<ol class="cx-cards" aria-label="rounds in order">{entries}</ol></div>')


def _leg(leg: Leg) -> str:
    lines = [("to the first source", number("", leg.to_first)), ("to the last one", number("", leg.to_last))]
    if not math.isnan(leg.sem_f):
        lines.append(("Semantic F1", number("", leg.sem_f)))
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in lines)
    return (f'<li class="cx-card">{picture(leg.winner.picture, f"round {leg.number}: {leg.winner.text}")}'
            f'<span class="cx-badge">round {leg.number}</span>'
            f'<p class="cx-words">{escape(leg.winner.text or "")}</p><dl class="cx-scores">{rows}</dl></li>')


def drift_curve(found: Sequence[Leg]) -> str:
    """Similarity to the first source by round, and Semantic F1 where it is known, as inline SVG."""
    width, height, left, bottom = 520, 190, 44, 34
    curves = [("similarity to the first source", "", [leg.to_first for leg in found])]
    if not any(math.isnan(leg.sem_f) for leg in found):
        curves.append(("semantic F1 against the first scene", "second", [leg.sem_f for leg in found]))
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
        parts.append(f'<text class="cx-tick {label}" x="{left + 8 + 220 * place}" '
                     f'y="{height - bottom - 8}">{name}</text>')
    parts += [f'<text class="cx-tick" x="{left + i * step:.1f}" y="{height - 14}" '
              f'text-anchor="middle">{leg.number}</text>' for i, leg in enumerate(found)]
    said = ", ".join(f"round {leg.number}: {leg.to_first:.2f}" for leg in found)
    return (f'<svg class="cx-scatter" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="Similarity to the first source by round. {said}">{"".join(parts)}</svg>')


# --- finished runs -----------------------------------------------------------------------------


def source_table(found: pd.DataFrame, score: str, limit: int = 12) -> str:
    """The first sources in the order asked for, with their selected candidates."""
    head = ("source", "domain", "selected caption", "similarity", "judge", labels.metric_label(score),
            "disagreement")
    lines = [_table_line(line, score) for line in found.head(limit).itertuples()]
    rest = f"{len(found)} sources" + (f", the first {limit} are listed" if len(found) > limit else "")
    return (f'<div class="cx cx-scroll">{table(head, lines)}</div>' + note(rest))


def _table_line(line: object, score: str) -> tuple[str, ...]:
    words = line.message if line.task == "image" else line.reconstruction
    domain = line.domain if isinstance(line.domain, str) else ""
    return (line.item, domain, words, number("", line.similarity),
            number("", line.similarity_judge), number(score, line.score), f"{line.disagreement:+.2f}")


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A plain table; every cell is escaped."""
    top = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in line) + "</tr>"
                   for line in lines)
    return f'<table class="cx-table"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
