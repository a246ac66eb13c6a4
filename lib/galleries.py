"""Galleries: a source with its true text, then candidates in order of similarity (Figures 5, 6).

What is shown is chosen by a rule from the rows, never by hand; the rule is part of the strip's
title.  Pixels are enlarged by whole numbers without smoothing, captions are wrapped by their
measured width, and the selected candidate has a thick green frame and says so.  A gallery is saved
twice: as a figure for print, and as its parts, which the report sets to the width of a screen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextToPath
from PIL import Image

from lib import figures, labels
from lib.figures import GREY, INK, PAGE, PALE, SELECTED, SMALLEST
from lib.images import data_uri

SHOWN = 4
REFERENCES = 3  # human captions printed beside a source picture
ENLARGED = 256  # pixels: small pictures are enlarged to about this side
LINE = 0.103  # inches: a line of 6 points
SMALL, ON_SCREEN = 128, 384  # pixels: up to the first kept as they are, others reduced to the second


class Pictures(Protocol):
    """A run's pictures by the path that a row gives."""

    def image(self, relative: str) -> Any: ...


class Source(Protocol):
    """A dataset's item."""

    references: tuple[str, ...]

    def image(self) -> Image.Image: ...


@dataclass(frozen=True)
class Cell:
    """One candidate: its picture, its text, what is printed under it, whether it was selected."""

    picture: Image.Image
    text: str
    scores: str
    selected: bool = False


@dataclass(frozen=True)
class Strip:
    """One row of a gallery: a title, the source pair, the candidates in order of similarity.

    texts: the source text, or what annotators wrote about the source picture.
    """

    title: str
    picture: Image.Image | None
    texts: tuple[str, ...]
    given: str
    cells: tuple[Cell, ...]


# choosing


def spaced(rows: pd.DataFrame, n: int = SHOWN) -> pd.DataFrame:
    """n candidates of one source, best and worst among them, evenly spaced by rank.

    Candidates with equal messages and equal reconstructions are one.
    """
    distinct = rows.sort_values("rank").drop_duplicates(["message", "reconstruction"])
    places = np.linspace(0, len(distinct) - 1, min(n, len(distinct))).round().astype(int)
    return distinct.iloc[places]


def nearest(rows: pd.DataFrame, n: int = SHOWN) -> pd.DataFrame:
    """The n most similar candidates with different messages."""
    return rows.sort_values("rank").drop_duplicates("message").head(n)


def best_example(rows: pd.DataFrame, score: str, rank: int = 0) -> str | None:
    """The item where selection gains most over the source's mean score, among the varied ones.

    Varied: at least four different candidates.  rank 1 is the runner-up, and so on; None where
    there are fewer such sources.
    """
    table = rows.assign(score=rows[score].astype(float))
    varied = table.drop_duplicates(["item", "message", "reconstruction"]).groupby("item").size()
    mean = table.groupby("item")["score"].mean()
    gain = table[table["rank"] == 1].set_index("item")["score"] - mean
    order = gain[varied >= SHOWN].dropna().sort_values(ascending=False, kind="stable")
    return str(order.index[rank]) if len(order) > rank else None


# strips


def strip(
    rows: pd.DataFrame,
    run: Pictures,
    source: Source,
    title: str,
    score: str,
    shown: pd.DataFrame | None = None,
) -> Strip:
    """The strip of one source: rows are those of one item, shown the candidates to print."""
    task = str(rows["task"].iloc[0])
    shown = spaced(rows) if shown is None else shown
    path, words = ("reconstruction", "message") if task == "image" else ("message", "reconstruction")
    factor, name = (100, labels.metric_label(score)) if task == "image" else (1, "CLIP")
    cells = tuple(
        Cell(
            run.image(line[path]),
            line[words],
            f"similarity {line['similarity']:.2f} · {name} "
            + (f"{factor * line[score]:.0f}" if factor > 1 else f"{line[score]:.2f}"),
            bool(line["selected"]),
        )
        for _, line in shown.iterrows()
    )
    texts = tuple(source.references[:REFERENCES])
    texts = texts if task == "image" else (str(rows["source_text"].iloc[0]),)
    picture = source.image() if getattr(source, "path", True) is not None else None
    given = {"image": "given: the picture", "text": "given: the text"}[task]
    return Strip(title, picture, texts, given, cells)


# drawing

@lru_cache(maxsize=4096)
def _width(text: str, size: float) -> float:
    """Width of a text in inches."""
    font = FontProperties(family="DejaVu Sans", size=size)
    return TextToPath().get_text_width_height_descent(text, font, ismath=False)[0] / 72


def wrap(text: str, width: float, size: float, lines: int) -> str:
    """Break a text to a width in inches; what does not fit into `lines` ends in an ellipsis."""
    broken: list[str] = []
    for word in text.split():
        longer = f"{broken[-1]} {word}" if broken else word
        if broken and _width(longer, size) <= width:
            broken[-1] = longer
        else:
            broken.append(word)
    if len(broken) > lines:
        broken = broken[:lines]
        while broken[-1] and _width(broken[-1] + " …", size) > width:
            broken[-1] = broken[-1].rpartition(" ")[0]
        broken[-1] += " …"
    return "\n".join(broken)


def enlarge(picture: Image.Image) -> np.ndarray:
    """The picture as (H, W, 3) uint8, small ones enlarged by a whole factor: crisp pixels."""
    pixels = np.asarray(picture.convert("RGB"))
    factor = max(1, round(ENLARGED / max(pixels.shape[:2])))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


@dataclass(frozen=True)
class Grid:
    """Measures of a gallery in inches; y counts from the top of the page."""

    picture: float
    pitch: float
    words: float
    left: float = 0.04
    gap: float = 0.14

    def caption(self, cell: Cell) -> str:
        """A candidate's words, broken to the width of its column."""
        return wrap(cell.text, self.pitch - 0.1, SMALLEST, 4)

    def height(self, strip: Strip) -> float:
        """One strip: title, picture, scores, the longest caption, room below."""
        lines = max([1 + self.caption(cell).count("\n") for cell in strip.cells], default=1)
        return 0.24 + self.picture + 0.16 + LINE * lines + 0.14


def _place(fig: Figure, picture: Image.Image, x: float, y: float, side: float, mark: bool) -> None:
    """Put a picture with its upper left corner at (x, y), letterboxed in a square."""
    width, height = fig.get_size_inches()
    ax = fig.add_axes((x / width, 1 - (y + side) / height, side / width, side / height))
    ax.imshow(enlarge(picture), interpolation="none")
    ax.set_xticks([])
    ax.set_yticks([])
    for edge in ax.spines.values():
        edge.set(color=SELECTED if mark else PALE, linewidth=2.4 if mark else 0.6)


def _write(fig: Figure, x: float, y: float, text: str, **style: Any) -> None:
    width, height = fig.get_size_inches()
    fig.text(x / width, 1 - y / height, text, va="top", **style)


def _draw_strip(fig: Figure, strip: Strip, top: float, grid: Grid) -> None:
    width, height = fig.get_size_inches()
    _write(fig, grid.left, top, strip.title, weight="bold", fontsize=7, color=INK)
    y = top + 0.24
    if strip.picture is not None:
        _place(fig, strip.picture, grid.left, y, grid.picture, False)
    side = grid.left + grid.picture + 0.08
    line = y
    for text in strip.texts:
        broken = wrap(text, grid.words, SMALLEST, 10 // len(strip.texts))
        _write(fig, side, line, broken, fontsize=SMALLEST, color=INK, linespacing=1.1)
        line += LINE * (broken.count("\n") + 1) + 0.05
    _write(fig, grid.left, y + grid.picture + 0.05, strip.given, fontsize=SMALLEST, color=GREY)
    x = side + grid.words + grid.gap
    bar = ((x - 0.09) / width, 1 - (y + grid.picture) / height)
    fig.add_artist(Rectangle(bar, 0.004 / width * 3, grid.picture / height, color=PALE, lw=0))
    for place, cell in enumerate(strip.cells):
        _draw_cell(fig, cell, x + place * grid.pitch, y, grid)


def _draw_cell(fig: Figure, cell: Cell, x: float, y: float, grid: Grid) -> None:
    _place(fig, cell.picture, x, y, grid.picture, cell.selected)
    below = y + grid.picture + 0.05
    if cell.selected:
        badge = {"facecolor": SELECTED, "edgecolor": "none", "pad": 1.8}
        _write(fig, x + 0.02, y - 0.12, "selected", fontsize=SMALLEST, color="white", bbox=badge)
    _write(fig, x, below, cell.scores, fontsize=SMALLEST, color=SELECTED if cell.selected else GREY)
    _write(fig, x, below + 0.11, grid.caption(cell), fontsize=SMALLEST, color=INK, linespacing=1.1)


def gallery(strips: Sequence[Strip], columns: int = SHOWN) -> Figure:
    """Draw strips one below the other at page width."""
    picture = min(1.06, 0.98 * 4 / columns)
    words = 1.02
    rest = PAGE - 0.04 - picture - 0.08 - words - 0.14
    grid = Grid(picture, rest / columns, words)
    heights = [grid.height(one) for one in strips]
    fig = plt.figure(figsize=(PAGE, max(1.0, sum(heights))))
    if not strips:
        fig.text(0.5, 0.5, "no source of this run fits the rule", ha="center", color=GREY)
    for number, one in enumerate(strips):
        _draw_strip(fig, one, 0.04 + sum(heights[:number]), grid)
    return fig


def described(strips: Iterable[Strip]) -> str:
    """What a gallery shows, for readers who cannot see it."""
    parts = []
    for one in strips:
        chosen = next((cell.text for cell in one.cells if cell.selected), "none of those shown")
        words = " / ".join(one.texts)
        parts.append(f"{one.title}. Source text: {words}. Selected: {chosen}.")
    return " ".join(parts) or "No source of this run fits the rule."


# saving


def save_gallery(strips: Sequence[Strip], name: str, origin: figures.Origin, title: str) -> Path:
    """Write the gallery as a figure and its parts as <name>.strips.json; the PNG's path."""
    folder = figures.folder(origin.preset)
    shown = figures.save_figure(gallery(strips), name, origin, title, described(strips))
    partial = folder / f".{name}.strips.partial"
    text = json.dumps([_parts(one) for one in strips], indent=1, ensure_ascii=False)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, folder / f"{name}.strips.json")
    return shown


def _parts(strip: Strip) -> dict[str, Any]:
    """A strip as JSON with its pictures in it."""
    cells = [
        {**_embedded(cell.picture), "text": cell.text, "scores": cell.scores, "selected": cell.selected}
        for cell in strip.cells
    ]
    source = _embedded(strip.picture) if strip.picture is not None else {}
    return {"title": strip.title, "texts": strip.texts, "given": strip.given, **source, "cells": cells}


def _embedded(picture: Image.Image) -> dict[str, Any]:
    uri, crisp = data_uri(picture, SMALL, ON_SCREEN)
    return {"uri": uri, "crisp": crisp}
