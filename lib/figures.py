"""The look of every figure, the record saved beside it, a grid of images with captions, and the table of claims."""

import io
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from lib import ranking
from lib.base import write_atomic
from lib.metrics import LABELS
from lib.roundtrip import Runs

PAGE = 6.95  # inches: the width of a two-column paper
SMALL = 6.5  # points: no smaller text in print
# Colours that colour-blind readers can tell apart (Okabe and Ito 2008).
PALETTE = BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
INK, GREY, PALE, SELECTED = "#222222", "#6B6B6B", "#E4E4E4", "#00775A"
RC = {
    "figure.dpi": 120, "savefig.dpi": 300, "svg.hashsalt": "compendium", "pdf.fonttype": 42,
    "font.family": "DejaVu Sans", "font.size": 7, "axes.labelsize": 7, "axes.titlesize": 8, "legend.fontsize": SMALL,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "grid.color": PALE, "grid.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 1.3, "lines.markersize": 4, "legend.frameon": False,
}
DATASETS = {"picturebook-coco": "COCO-like", "picturebook-nocaps": "NoCaps-like", "coco": "COCO", "nocaps": "NoCaps",
            "coco-val2014": "COCO val 2014", "coco-val2017": "COCO val 2017"}
SCORES = {**LABELS, "clipscore": "CLIPScore", "ref_clipscore": "RefCLIPScore", "clip_score": "CLIP score",
          "clip_score_second": "CLIP score (second encoder)", "sem_f": "Semantic F1"}
CLAIMS = ["claim", "task", "dataset", "paper", "estimate", "low", "high", "n", "unit", "verdict", "detectable", "note"]


def use_theme() -> None:
    """Set the project's theme, whatever matplotlibrc or MPLBACKEND say; a notebook shows figures inline."""
    if hasattr(shell := get_ipython(), "kernel"):
        shell.run_line_magic("matplotlib", "inline")
    plt.rcdefaults()
    sns.set_theme(context="paper", style="ticks", palette=PALETTE, rc=RC)


class Look(NamedTuple):
    """How a dataset is drawn in every figure."""

    label: str
    color: str
    marker: str


def looks(datasets: Sequence[str]) -> dict[str, Look]:
    """Return label (at most 30 characters, each its own), colour and marker of each dataset."""
    known = {d: "nocaps" in d for d in datasets if d in list(DATASETS)[:4]}
    others = [d for d in datasets if d not in known]
    free = [k for k in range(6) if k not in known.values()] * (1 + len(datasets))
    style = known | dict(zip(others, free, strict=False))
    short = [DATASETS.get(d, d if len(d) <= 26 else f"{d[:10]}…{d[-15:]}") for d in datasets]
    labels = [s if s not in short[:k] else f"{s} #{short[:k].count(s) + 1}" for k, s in enumerate(short)]
    return {d: Look(s, PALETTE[style[d]], "osD^vP"[style[d]]) for d, s in zip(datasets, labels, strict=True)}


def score_label(column: str) -> str:
    """Return the printed name of a score column."""
    return SCORES.get(column, column.replace("sem_", "semantic ").replace("_", " "))


def show(result: Mapping[str, float], unit: str = "", digits: int = 2) -> str:
    """Return an estimate with its 95 % interval as text, such as 0.22 [0.15, 0.28]."""
    if pd.isna(result["estimate"]):
        return "no data"
    low, high = (f"{result[end]:.{digits}f}" for end in ("low", "high"))
    between = "(no interval)" if pd.isna(result["low"]) else f"[{low}, {high}]"
    return f"{result['estimate']:.{digits}f}{unit} {between}".replace("-", "−")


def save_figure(fig: Figure, name: str, runs: Runs, alt: str, data: pd.DataFrame | None = None) -> Path:
    """Write <name>.svg, .pdf, .png (300 dpi) and .json into `runs.figures`; return the PNG's path.

    The JSON holds alt, a sentence or two for who cannot see the figure, data, the numbers drawn, and their provenance.
    """
    # Without dates the same figure is saved as the same bytes.
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None},
                "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    for kind, keys in metadata.items():
        stream = io.BytesIO()
        fig.savefig(stream, format=kind, metadata=keys)
        if kind == "png":  # 256 colours: a third of the size
            image = Image.open(stream).convert("RGB").quantize(256)
            image.save(stream := io.BytesIO(), "PNG", optimize=True, dpi=(RC["savefig.dpi"],) * 2)
        write_atomic(runs.figures / f"{name}.{kind}", stream.getvalue())
    drawn = [] if data is None else json.loads(data.to_json(orient="records", double_precision=6))
    record = {"figure": name, "alt": alt, "data": drawn, "provenance": runs.provenance()}
    write_atomic(runs.figures / f"{name}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return runs.figures / f"{name}.png"


def claim(text: str, task: str, dataset: str, paper: str, result: Mapping[str, float], unit: str = "",
          direction: int = 1, margin: float | None = None, note: str = "") -> dict[str, object]:
    """Return one line of the table of claims: what the paper says, what came out here and the verdict.

    result: estimate, low, high and n as `lib.ranking` gives them; direction and margin: as `ranking.verdict`.
    detectable: the smallest true effect that would have decided an inconclusive claim with 80 % power.
    """
    low, high = result["low"], result["high"]
    verdict = ranking.verdict(low, high, direction, margin)
    smallest = (margin or 0) + ranking.detectable(low, high) if verdict == "inconclusive" and low < high else np.nan
    reason = "no source differs" if low == high else pd.isna(low) and "too few sources for an interval"
    numbers, notes = (result[key] for key in ("estimate", "low", "high", "n")), "; ".join(filter(None, [note, reason]))
    return dict(zip(CLAIMS, [text, task, dataset, paper, *numbers, unit, verdict, smallest, notes], strict=True))


def save_claims(table: pd.DataFrame | Iterable[dict], name: str, runs: Runs) -> pd.DataFrame:
    """Write claims to <runs.figures>/claims/<name>.csv, from which notebook 90 reads them; return the table."""
    table = pd.DataFrame(table, columns=CLAIMS)
    write_atomic(runs.figures / "claims" / f"{name}.csv", table.to_csv(index=False))
    return table


class Cell(NamedTuple):
    """One image of a grid with what stands below it, a grey note and a caption; without image the caption is framed."""

    image: Image.Image | None
    caption: str = ""
    note: str = ""
    highlighted: bool = False


def image_grid(rows: Sequence[Sequence[Cell | tuple]], titles: Sequence[str] = ()) -> Figure:
    """Return a figure of images with captions, one row a source, a title above each row.

    Small images are enlarged by whole factors, captions cut after five lines; highlighted ones are "selected".
    """
    rows = [[Cell(*cell) for cell in row] for row in rows]
    pitch = min(1.7, (PAGE - 0.08) / max((len(row) for row in rows), default=1))
    side, line = min(1.2, pitch - 0.12), 0.105
    wrap = textwrap.TextWrapper(int((pitch - 0.06) / 0.0505), max_lines=5, placeholder=" …")
    captions = [[wrap.wrap(cell.caption) for cell in row] for row in rows]
    heights = [0.62 + side + line * max((len(c) for c in row), default=1) for row in captions]
    fig = plt.figure(figsize=(PAGE, max(0.6, sum(heights))))
    width, height = fig.get_size_inches()
    top = height
    for number, (row, broken) in enumerate(zip(rows, captions, strict=True)):
        title = titles[number] if number < len(titles) else ""
        fig.text(0.04 / width, (top - 0.06) / height, title, va="top", weight="bold", fontsize=8, color=INK)
        for place, (cell, lines) in enumerate(zip(row, broken, strict=True)):
            _draw_cell(fig, cell, "\n".join(lines), (0.04 + place * pitch, top - 0.34 - side), side)
        top -= heights[number]
    if not rows:
        fig.text(0.5, 0.5, "no source of this run fits the rule", ha="center", color=GREY)
    return fig


def _draw_cell(fig: Figure, cell: Cell, caption: str, corner: tuple[float, float], side: float) -> None:
    """Draw one cell; corner: the image's lower left, in inches from the figure's."""
    (width, height), (x, y), colour = fig.get_size_inches(), corner, SELECTED if cell.highlighted else GREY
    ax = fig.add_axes((x / width, y / height, side / width, side / height), xticks=[], yticks=[])
    if cell.image is not None:
        image = cell.image.convert("RGB")
        image.thumbnail((400, 400))
        factor = max(1, 240 // max(image.size))
        ax.imshow(np.asarray(image).repeat(factor, axis=0).repeat(factor, axis=1), interpolation="none")
    ax.spines[:].set(visible=True, color=PALE, linewidth=0.6)
    if cell.highlighted:
        ax.spines[:].set(color=SELECTED, linewidth=2.4)
        ax.annotate("selected", (0, 1), (2, 2), xycoords="axes fraction", textcoords="offset points", color="white",
                    fontsize=6, va="bottom", bbox={"facecolor": SELECTED, "edgecolor": "none", "pad": 1.6})
    fig.text(x / width, (y - 0.05) / height, cell.note, va="top", fontsize=6, color=colour)
    # a text as source stands in the frame
    right, up = (0.05, side - 0.05) if cell.image is None else (0, -0.17 if cell.note else -0.05)
    fig.text((x + right) / width, (y + up) / height, caption, va="top", fontsize=6, color=INK, linespacing=1.15)
