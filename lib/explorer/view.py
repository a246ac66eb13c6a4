"""What the explorer shows, as strings of HTML: every text is escaped, every image embedded."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from lib.explorer.session import Trip, ranked

SMALL, LARGEST = 128, 384  # pixels: up to SMALL enlarged without smoothing, above LARGEST reduced
LABELS = {"cider": "CIDEr", "clip_score": "CLIP score", "sem_f": "Semantic F1", "bleu4": "BLEU-4", "meteor": "METEOR",
          "rouge_l": "ROUGE-L", "spice_spacy": "SPICE (spaCy)", "spice": "SPICE", "clipscore": "CLIPScore"}
COMPARED = {"first": "to the source", "similarity": "similarity", "second": "second encoder"}
NEAR = 0.001  # similarities that print alike
STYLE = f"<style>{Path(__file__).with_name('style.css').read_text(encoding='utf-8')}</style>"


def picture(image: Image.Image, alt: str) -> str:
    """Return an image as an ``img`` element with its PNG bytes in it."""
    small, shown, stream = ' class="small"' * (max(image.size) <= SMALL), image.convert("RGB"), io.BytesIO()
    shown.thumbnail((LARGEST, LARGEST))
    shown.save(stream, "PNG")
    content = base64.b64encode(stream.getvalue()).decode()
    return f'<img{small} alt="{escape(alt)}" src="data:image/png;base64,{content}">'


def message(text: str, kind: str = "note", role: str = "status") -> str:
    """Return one line: a note, or an alert that screen readers read at once."""
    return f'<div class="cx"><p class="{kind}" role="{role}">{escape(text)}</p></div>' if text else ""


def number(value: float, digits: int = 3) -> str:
    """Return a number as the page prints it; a dash for none."""
    return "–" if pd.isna(value) else f"{value:.{digits}f}".replace("-", "−")


def source(trip: Trip, note: str = "") -> str:
    """Return the source with what is known of it."""
    image = "" if trip.image is None else picture(trip.image, "the source image")
    words = f"<p><b>{escape(trip.text)}</b></p>" if trip.text else ""
    if trip.source.references and image:
        entries = "".join(f"<li>{escape(r)}</li>" for r in trip.source.references[:5])
        words += f"<b>References</b><ul>{entries}</ul>"
    elif image:
        note = f"No reference captions, so captions get no CIDEr, BLEU-4 or ROUGE-L. {note}"
    return f'<div class="cx"><div class="source">{image}<div>{words}{message(note)}</div></div></div>'


def card(one: Any, badge: str = "", kind: str = "") -> str:
    """Return one candidate, a row of the table: its image, its caption, its numbers."""
    shown = '<div class="waiting">waiting …</div>'
    if one["flagged"]:
        shown = '<div class="waiting">withheld by the safety checker</div>'
    elif one["image"] is not None:
        shown = picture(one["image"], f"generated: {one['caption']}")
    lines = {name: number(one[key]) for key, name in COMPARED.items() if key == "similarity" or pd.notna(one.get(key))}
    lines |= {name: number(100 * one[key], 1) for key, name in LABELS.items() if pd.notna(one.get(key))}
    lines |= {"log p": number(one["logprob"], 1)} if pd.notna(one.get("logprob")) else {}
    badge = f'<span class="badge">{escape(badge)}</span>' if badge else ""
    cut = '<p class="note">The generator read only the beginning of this text.</p>' if one["truncated"] else ""
    numbers = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in lines.items())
    return (f'<li class="card {kind}">{shown}{badge}<p class="words">{escape(one["caption"] or "…")}</p>{cut}'
            f"<dl>{numbers}</dl></li>")


def beside(of: Trip, entries: str) -> str:
    """Return a row of cards that begins with the source."""
    image = "" if of.image is None else picture(of.image, "the source image")
    words = of.text or next(iter(of.source.references), "")
    return (f'<ol class="cards"><li class="card origin">{image or "<br>"}<span class="badge">source</span>'
            f'<p class="words">{escape(words)}</p></li>{entries}</ol>')


def cards(of: Trip, made: pd.DataFrame, note: str = "") -> str:
    """Return the source and its candidates, the most similar first: "best so far" until all are there."""
    order = ranked(made)
    values, waiting = order["similarity"][~order["flagged"]].to_numpy(), bool((made["image"].isna()).any())
    if len(values) > 1 and not waiting:
        tied = int((values[0] - values[1:] < NEAR).sum())
        note += (f"{tied} other{'s' * (tied > 1)} within {NEAR:g} of the selected one: a tie for practical purposes."
                 if tied else f"The selected candidate leads by {values[0] - values[1]:.3f}.")
        note += f" Mean similarity of all {number(values.mean())}. Scores are multiplied by 100."
    marks = ("best so far" if waiting else "selected", "best") if pd.notna(order["similarity"].iloc[0]) else ()
    entries = "".join(card(one, *marks * (place == 0)) for place, (_, one) in enumerate(order.iterrows()))
    return f'<div class="cx"><p class="note">{escape(note)}</p>{beside(of, entries)}</div>'


def contest(of: Trip, tries: Sequence[pd.DataFrame], made: pd.DataFrame) -> str:
    """Return captions by hand, the last one first, then the captioner's candidates."""
    mine, best = tries[-1]["similarity"][0], made["similarity"].max()
    words = "ties with" if abs(mine - best) < NEAR else "is closer than" if mine > best else "is less close than"
    said = f"Your caption's image {words} the selected one: {number(mine)} against {number(best)}."
    board = "".join(card(one.iloc[0], "yours") for one in reversed(tries))
    return (f'<div class="cx"><p class="verdict" role="status">{said}</p>{beside(of, board)}'
            f"<h3>The captioner's candidates</h3></div>{cards(of, made)}")


def sides(of: Trip, found: Mapping[str, pd.DataFrame]) -> str:
    """Return the candidates of several settings, whose words are the keys, a column each."""
    columns = "".join(f"<section><h3>{escape(name)}</h3>{cards(of, made)}</section>" for name, made in found.items())
    return f'<div class="cx sides">{columns}</div>'


def rounds(of: Trip, found: pd.DataFrame) -> str:
    """Return the rounds of a chain, a card each."""
    entries = "".join(card(one, f"round {k + 1}") for k, one in found.iterrows())
    return f'<div class="cx">{beside(of, entries)}</div>'


def steps(of: Trip, made: pd.DataFrame) -> str:
    """Return one round trip with every number on the way (the paper's Figures 1 and 2)."""
    draws, images = of.preset.generator, "".join(card(one, str(k)) for k, one in made.iterrows())
    how = f"({draws.steps} denoising steps, guidance scale {draws.guidance:g})"
    said = [f"The captioner samples captions of the image, the generator draws each {how}",
            f"The generator draws the text several times {how}, the captioner captions each image"][of.task == "text"]
    table = ranked(made.rename_axis("candidate").reset_index()).assign(rank=range(1, len(made) + 1)).rename(columns={
        "logprob": "log p", "dot": "e · e′", "norms": "|e| |e′|", "second": "second encoder"}).to_html(
        index=False, border=0, na_rep="–", float_format=number, columns=[
            "rank", "candidate", "seed", "caption", "log p", "e · e′", "|e| |e′|", "similarity", "second encoder"])
    return (f'<div class="cx"><h4>1 · {said}</h4>{beside(of, images)}<h4>2 · The encoder compares embeddings e of the '
            f'source and e′ of the reconstruction; rank 1 is selected</h4><div class="scroll">{table}</div></div>')
