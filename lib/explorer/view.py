"""What the explorer shows, as strings of HTML: every text is escaped, every image embedded."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lib.explorer.session import Candidate, Trip, embeddings, ranked, table
from lib.models import Models

SMALL, LARGEST = 128, 384  # pixels: up to SMALL enlarged without smoothing, above LARGEST reduced
LABELS = {"cider": "CIDEr", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "sem_f": "Semantic F1", "clipscore": "CLIPScore",
          "clip_score": "CLIP score"}
NEAR = 0.001  # similarities that print alike


def style() -> str:
    """Return the page's style sheet."""
    return f"<style>{(Path(__file__).parent / 'style.css').read_text(encoding='utf-8')}</style>"


def picture(image: Image.Image | np.ndarray, alt: str) -> str:
    """Return an image as an ``img`` element with its PNG bytes in it."""
    shown = Image.fromarray(image) if isinstance(image, np.ndarray) else image.copy()
    kind = ' class="small"' if max(shown.size) <= SMALL else ""
    shown.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    shown.convert("RGB").save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img{kind} alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def message(text: str, kind: str = "note", role: str = "status") -> str:
    """Return one line: a note, or an alert that screen readers read at once."""
    return f'<div class="cx"><p class="{kind}" role="{role}">{escape(text)}</p></div>' if text else ""


def number(value: float, digits: int = 3) -> str:
    """Return a number as the page prints it; a dash for none."""
    return "–" if pd.isna(value) else f"{value:.{digits}f}".replace("-", "−")


# --- the source and its candidates -------------------------------------------------------------


def source(trip: Trip) -> str:
    """Return the source with what is known of it."""
    parts = [] if trip.image is None else [picture(trip.image, "the source image")]
    words = f"<p><b>{escape(trip.text)}</b></p>" if trip.text else ""
    if trip.source.references and (trip.task == "image" or trip.image is not None):
        entries = "".join(f"<li>{escape(r)}</li>" for r in trip.source.references[:5])
        words += f"<b>References</b><ul>{entries}</ul>"
    words = words or '<p class="note">No reference captions, so captions get no CIDEr, BLEU or ROUGE-L.</p>'
    return f'<div class="cx"><div class="source">{"".join(parts)}<div>{words}</div></div></div>'


def card(candidate: Candidate, badge: str = "", kind: str = "", lines: Mapping[str, str] | None = None) -> str:
    """Return one candidate: its image, its caption, its numbers."""
    shown = '<div class="waiting">waiting …</div>'
    if candidate.flagged:
        shown = '<div class="waiting">withheld by the safety checker</div>'
    elif candidate.image is not None:
        shown = picture(candidate.image, f"generated: {candidate.caption or ''}")
    mark = f'<span class="badge">{escape(badge)}</span>' if badge else ""
    cut = '<p class="note">The generator read only the beginning of this text.</p>' if candidate.truncated else ""
    return (f'<li class="card {kind}">{shown}{mark}<p class="words">{escape(candidate.caption or "…")}</p>{cut}'
            f"{_numbers(lines or _lines(candidate))}</li>")


def _lines(candidate: Candidate) -> dict[str, str]:
    """A candidate's numbers by name; the first is the similarity."""
    lines = {"Similarity": number(candidate.similarity)}
    if not np.isnan(candidate.second):
        lines["second encoder"] = number(candidate.second)
    lines |= {LABELS[name]: number(value, 2) for name, value in candidate.scores.items() if name in LABELS}
    return lines | ({} if np.isnan(candidate.logprob) else {"log p": number(candidate.logprob, 1)})


def _numbers(lines: Mapping[str, str]) -> str:
    """Names and numbers as a list, the first in bold."""
    rows = [f"<dt{k}>{escape(name)}</dt><dd{k}>{value}</dd>" for i, (name, value) in enumerate(lines.items())
            for k in (' class="main"' if i == 0 else "",)]
    return f"<dl>{''.join(rows)}</dl>"


def cards(candidates: Sequence[Candidate]) -> str:
    """Return candidates from the most to the least similar; the first is marked, "best so far" until all are there."""
    order = ranked(candidates)
    waiting = any(np.isnan(c.similarity) and not c.flagged for c in order)
    badge = "best so far" if waiting else "selected"
    first = order[0] if order and not np.isnan(order[0].similarity) else None
    entries = "".join(card(c, badge, "best") if c is first else card(c) for c in order)
    return f'<ol class="cards" aria-label="candidates, most similar first">{entries}</ol>'


def trip(of: Trip, candidates: Sequence[Candidate], note: str = "") -> str:
    """Return the source beside its candidates, and what the selection rests on."""
    return f'<div class="cx">{lead(candidates)}{_beside(of, cards(candidates))}<p class="note">{escape(note)}</p></div>'


def _beside(of: Trip, shown: str) -> str:
    """The source as a card, and to its right what was made of it."""
    image = "" if of.image is None else picture(of.image, "the source image")
    words = of.text or next(iter(of.source.references), "")
    return (f'<div class="trip"><div class="card origin">{image or "<br>"}<span class="badge">source</span>'
            f'<p class="words">{escape(words)}</p></div>{shown}</div>')


def lead(candidates: Sequence[Candidate]) -> str:
    """Return by how much the selected candidate leads, once all are compared."""
    values = [c.similarity for c in ranked(candidates) if not c.flagged]
    if len(values) < 2 or np.isnan(values).any():
        return ""
    tied = sum(values[0] - value < NEAR for value in values[1:])
    said = (f"{tied} other{'s' * (tied > 1)} within {NEAR:g} of the selected one: a tie for practical purposes." if tied
            else f"The selected candidate leads by {values[0] - values[1]:.3f}.")
    return f'<p class="note">{said} Mean similarity of all {np.mean(values):.3f}.</p>'


def contest(of: Trip, tries: Sequence[Candidate], candidates: Sequence[Candidate]) -> str:
    """Return captions by hand (the last one first) beside the source, then the captioner's candidates."""
    if not tries:
        return trip(of, candidates)
    mine, best = tries[-1], ranked(candidates)[0]
    ahead = mine.similarity - best.similarity
    words = "ties with" if abs(ahead) < NEAR else "is closer than" if ahead > 0 else "is less close than"
    said = f"Your caption's image {words} the selected one: {number(mine.similarity)} against {number(best.similarity)}."
    board = "".join(card(c, "yours", "own") for c in reversed(tries))
    return (f'<div class="cx"><p class="verdict" role="status">{said}</p>{_beside(of, f"""<ol class="cards">{board}</ol>""")}'
            f"<h3>The captioner's candidates</h3>{lead(candidates)}{cards(candidates)}</div>")


def sides(of: Trip, found: Mapping[str, Sequence[Candidate]], titles: Mapping[str, str]) -> str:
    """Return the candidates of several settings on one source, a column each."""
    columns = "".join(f'<section><h3>{escape(name)}</h3><p class="note">{escape(titles[name])}</p>{lead(c)}{cards(c)}'
                      "</section>" for name, c in found.items())
    return f'{source(of)}<div class="cx"><div class="sides">{columns}</div></div>'


def rounds(of: Trip, records: Sequence[Mapping]) -> str:
    """Return the rounds of a chain, a card each."""
    entries = []
    for record in records:
        lines = {"to the source": number(record["to_first"]), "to the last": number(record["to_last"])}
        if record["sem_f"] is not None:
            lines["Semantic F1"] = number(record["sem_f"], 2)
        entries.append(card(record["best"], f"round {record['round']}", "round", lines))
    return f'<div class="cx">{_beside(of, f"""<ol class="cards">{"".join(entries)}</ol>""")}</div>'


# --- step by step ------------------------------------------------------------------------------


def steps(of: Trip, candidates: Sequence[Candidate], models: Models) -> str:
    """Return one round trip with every number on the way (the paper's Figures 1 and 2)."""
    done = [c for c in candidates if not np.isnan(c.similarity)]
    pairs = [embeddings(of, c, models.encoder) for c in done]
    source_vector = pairs[0][0][0]
    dots = np.array([float(a[0] @ b[0]) for a, b in pairs])
    norms = np.array([float(np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs])
    by_hand = pd.DataFrame({"candidate": [c.index for c in done], "e · e′": dots, "|e| |e′|": norms,
                            "cosine": dots / norms})
    drawing, k = of.preset.generator, len(candidates)
    draw = f"{drawing.steps} denoising steps, guidance scale {drawing.guidance:g}, {drawing.output_size} px"
    first = pd.DataFrame([{"candidate": c.index, "seed": c.seed, "caption": c.caption, "log p": c.logprob} for c in candidates])
    if of.task == "image":
        said = [f"1 · The captioner samples {k} captions y of the image x.", f"2 · The generator draws each caption ({draw})."]
    else:
        said = [f"1 · The generator draws {k} images x of the text y ({draw}).", "2 · The captioner captions each image."]
    images = "".join(card(c, str(c.index)) for c in candidates)
    return (f'<div class="cx">{_flow(of, ranked(candidates)[0])}<h4>{said[0]}</h4>{_table(first)}<h4>{said[1]}</h4>'
            f'<ol class="cards">{images}</ol><h4>3 · The encoder compares: {source_vector.size} numbers each, by hand</h4>'
            f"{_table(by_hand)}<h4>4 · Rank 1 is selected</h4>{_table(table(candidates))}</div>")


def _flow(of: Trip, best: Candidate) -> str:
    """The selected round trip as a row: source, candidate, reconstruction, similarity (Figure 1)."""
    words = f"<q>{escape(best.caption or '')}</q>"
    image = picture(best.image, "the generated image")
    if of.task == "image":
        stations = [picture(of.image, "the source image"), "captioner", words, "generator", image]
    else:
        stations = [f"<q>{escape(of.text)}</q>", "generator", image, "captioner", words]
    stations += ["encoder", f"<b>similarity {number(best.similarity)}</b>"]
    items = "".join(f'<li class="model">→<br>{s}</li>' if i % 2 else f"<li>{s}</li>" for i, s in enumerate(stations))
    return f'<ol class="flow" aria-label="one round trip">{items}</ol>'


def _table(frame: pd.DataFrame) -> str:
    return f'<div class="scroll">{frame.to_html(index=False, border=0, na_rep="–", float_format="{:.3f}".format)}</div>'
