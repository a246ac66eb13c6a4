"""The look of every figure, and the record that is saved beside it.

One theme, one palette that colour-blind readers can tell apart (Okabe and Ito, 2008), widths of a
two-column paper, direct labels instead of legends.  No other module knows colours or sizes.
Saved files are the same bytes for the same figure: no date, fixed ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib import labels, provenance, ranking
from lib.errors import UserError
from lib.presets import REPO_ROOT, Preset, preset_to_dict
from lib.ranking import Estimate

COLUMN = 3.35  # inches: one column of a two-column paper
PAGE = 6.95  # inches: both columns
DPI = 300
SMALLEST = 6  # points: no smaller text in print

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, INK, GREY, PALE = "#CC79A7", "#56B4E9", "#222222", "#6B6B6B", "#E4E4E4"
SELECTED = "#00775A"  # GREEN, darkened until white words on it and its words on white can be read
COLOURS = {"picturebook-coco": BLUE, "coco": BLUE, "picturebook-nocaps": VERMILLION}
COLOURS |= {"nocaps": VERMILLION, "coco-val2014": SKY, "coco-val2017": PURPLE}
MARKERS = {"picturebook-nocaps": "s", "nocaps": "s", "coco-val2014": "^", "coco-val2017": "D"}

RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 6,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "grid.color": PALE,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.8,
    "figure.dpi": 110,
    "savefig.dpi": DPI,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "compendium",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}


class HasRows(Protocol):
    """What a figure needs to know of a run."""

    path: Path
    name: str


def use_theme() -> None:
    """Set the theme for all figures of this process."""
    import seaborn as sns  # slow to import, and not every caller of this module draws

    sns.set_theme(context="paper", style="ticks", rc=RC)


def _take_off_spines(ax: Axes, left: bool = False) -> None:
    """Leave of a panel's frame what carries a scale."""
    import seaborn as sns

    sns.despine(ax=ax, left=left)


def colour(dataset: str) -> str:
    """The colour of a dataset, the same in every figure."""
    return COLOURS.get(dataset, PURPLE)


def show_rho(estimate: Estimate, symbol: str = "ρ") -> str:
    """A statistic with its 95 % interval, short enough for a direct label."""
    low, high = estimate.interval()
    if np.isnan(low):
        return f"{symbol}: too few sources"
    return f"{symbol} = {estimate.value:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")


# saving


def folder(preset: Preset) -> Path:
    """figures/<preset>/, or below COMPENDIUM_FIGURES where that is set, as the tests do."""
    root = Path(os.environ.get("COMPENDIUM_FIGURES", REPO_ROOT / "figures"))
    return root / preset.name


@dataclass(frozen=True)
class Origin:
    """Where a figure's numbers come from; written beside it."""

    preset: Preset
    runs: tuple[HasRows, ...]
    seed: int
    notebook: str

    def record(self) -> dict:
        """Everything needed to make the figure again, as JSON."""
        rows = [
            {"rows": _relative(run.path / "rows.parquet"), "sha256": _digest(run.path)}
            for run in self.runs
        ]
        extra = {"preset": preset_to_dict(self.preset), "seed": self.seed, "input": rows}
        return provenance.collect(notebook=self.notebook, **extra)


def _relative(path: Path) -> str:
    """A path inside the repository from its root, another one by its last three parts."""
    if path.is_relative_to(REPO_ROOT):
        return path.relative_to(REPO_ROOT).as_posix()
    return Path(*path.parts[-3:]).as_posix()


def _digest(run: Path) -> str:
    with (run / "rows.parquet").open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_figure(fig: Figure, name: str, origin: Origin, title: str, alt: str) -> Path:
    """Write <name>.svg, .pdf, .png (300 dpi) and .json into the preset's folder; the PNG's path.

    title: what the figure answers; alt: what a reader who cannot see it should know.
    """
    target = folder(origin.preset)
    metadata = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "png": {"Software": None},
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        for kind, keys in metadata.items():
            partial = target / f".{name}.partial.{kind}"
            fig.savefig(partial, format=kind, dpi=DPI, metadata=keys)
            os.replace(partial, target / f"{name}.{kind}")
        sidecar = {"figure": name, "title": title, "alt": alt, **origin.record()}
        text = json.dumps(sidecar, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False)
        (target / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target}: cannot save figure {name}: {error.strerror}") from error
    return target / f"{name}.png"


# Figure 3


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move label positions apart to at least `gap`, keeping their order and their middle."""
    order = np.argsort(positions)
    moved = np.array(positions, dtype=float)[order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    moved += np.mean(positions) - moved.mean()
    result = np.empty(len(moved))
    result[order] = moved
    return result.tolist()


def _plain(value: float) -> str:
    """Two figures where they matter, never an exponent."""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"


def rank_panel(
    ax: Axes,
    profiles: Mapping[str, pd.DataFrame],
    rhos: Mapping[str, Estimate],
    title: str,
    score_label: str,
    factor: float = 1.0,
) -> None:
    """Figure 3: mean score by rank of reconstruction, one curve a dataset, bars of one SE.

    profiles: dataset -> rank, mean, se, sd; rhos: dataset -> within-source rho.  Datasets stand a
    little apart, so that bars do not hide each other.
    """
    apart = 0.14 * (np.arange(len(profiles)) - (len(profiles) - 1) / 2)
    for shift, (dataset, table) in zip(apart, profiles.items(), strict=True):
        ax.errorbar(
            table["rank"] + shift,
            factor * table["mean"],
            yerr=factor * table["se"],
            color=colour(dataset),
            marker=MARKERS.get(dataset, "o"),
            markeredgecolor="white",
            markeredgewidth=0.5,
            elinewidth=1.0,
            capsize=2,
        )
    last = max(int(table["rank"].max()) for table in profiles.values())
    ax.set_xlim(0.5, last + 0.5)
    ax.set_xticks(range(1, last + 1))
    ax.set_ylabel(f"Mean {score_label}")
    ax.grid(axis="y")
    _take_off_spines(ax)
    bottom, top = ax.get_ylim()
    ends = [factor * table["mean"].iloc[-1] for table in profiles.values()]
    places = np.array(_spread(ends, 0.27 * (top - bottom)))
    places += max(0.0, bottom + 0.12 * (top - bottom) - places.min())
    for dataset, y in zip(profiles, places, strict=True):
        low, high = rhos[dataset].interval()
        text = f"{labels.short_label(dataset)}\nρ = {rhos[dataset].value:.2f}\n"
        spread = factor * profiles[dataset]["sd"].mean()
        text += "no interval\n" if np.isnan(low) else f"[{low:.2f}, {high:.2f}]\n"
        text += "" if np.isnan(spread) else f"SD {spread:.{0 if spread >= 10 else 2}f}"
        ax.annotate(
            text.replace("-0.", "−0."),
            (1.02, y),
            xycoords=("axes fraction", "data"),
            color=colour(dataset),
            va="center",
            fontsize=6.5,
            annotation_clip=False,
        )
    axis = "Rank of the reconstruction (1 = most similar)"
    ax.set_xlabel(f"{axis}\nbars: one standard error; SD: between sources; [ ]: 95 %")
    ax.set_title(title)


# Figure 4


def bin_panel(ax: Axes, means: pd.DataFrame, dataset: str, bins: int, factor: float = 1.0) -> None:
    """Figure 4: a dot a source, a box a bin of equal width, the curve of bin means.

    Boxes hold half of a bin's sources, whiskers reach 1.5 IQR; a bin with fewer than five sources
    shows its dots only.
    """
    x, y = means["similarity"].to_numpy(), factor * means["score"].to_numpy()
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    edges, index = ranking.equal_width_bins(x, bins)
    middles, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    ax.scatter(x, y, s=5, color=colour(dataset), alpha=0.35, linewidths=0, zorder=2)
    groups = [y[index == b] for b in range(bins)]
    boxed = [b for b in range(bins) if len(groups[b]) >= 5]
    if boxed:
        ax.boxplot(
            [groups[b] for b in boxed],
            positions=middles[boxed],
            widths=0.72 * width,
            whis=1.5,
            showfliers=False,
            manage_ticks=False,
            patch_artist=True,
            boxprops={"facecolor": "none", "edgecolor": colour(dataset), "linewidth": 0.9},
            medianprops={"color": colour(dataset), "linewidth": 0.9},
            whiskerprops={"color": colour(dataset), "linewidth": 0.7},
            capprops={"color": colour(dataset), "linewidth": 0.7},
            zorder=3,
        )
    filled = [b for b in range(bins) if len(groups[b])]
    curve = [groups[b].mean() for b in filled]
    ax.plot(middles[filled], curve, color=INK, linewidth=2.6, zorder=4)
    ax.plot(middles[filled], curve, color=ORANGE, marker="o", markersize=3.2, zorder=5)
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom - 0.12 * (top - bottom), top + 0.06 * (top - bottom))
    left = edges[0] - 0.3 * width
    counts = [("n:", left + 0.1 * width), *((str(len(groups[b])), middles[b]) for b in filled)]
    for words, place in counts:
        where = {"xycoords": ("data", "axes fraction"), "ha": "center" if words != "n:" else "left"}
        ax.annotate(words, (place, 0.015), fontsize=SMALLEST, color=GREY, **where)
    ax.set_xlim(left, edges[-1] + 0.3 * width)
    ax.grid(axis="y")
    _take_off_spines(ax)


def corner_note(ax: Axes, text: str) -> None:
    """A short statement in the upper left of a panel, readable over dots."""
    ax.annotate(
        text,
        (0.02, 0.98),
        xycoords="axes fraction",
        va="top",
        fontsize=6.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        zorder=6,
    )


# Table 1


def gain_panel(ax: Axes, names: Sequence[str], table: pd.DataFrame, hue: str) -> None:
    """Gains in percent with their intervals, one line a name; filled where zero is excluded."""
    for y, line in zip(range(len(table), 0, -1), table.itertuples(), strict=True):
        decided = line.low > 0 or line.high < 0
        ax.plot([line.low, line.high], [y, y], color=hue, linewidth=1.4, solid_capstyle="round")
        face = hue if decided else "white"
        ax.plot(line.gain, y, "o", color=hue, markerfacecolor=face, markersize=4.5)
    ax.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(table), 0, -1), names)
    ax.set_ylim(0.4, len(table) + 0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("Gain (%), interval as in Table 1\nfilled: without zero")
    ax.grid(axis="x")
    _take_off_spines(ax, left=True)


def table_figure(blocks: Sequence[tuple[str, pd.DataFrame]], note: str = "") -> Figure:
    """Draw tables of text cells, one block below the other, as a paper sets them.

    blocks: (title, layout) with row names in the index; the row "Selected" is set bold and the
    context rows grey.  Columns of all blocks share their places; few columns make one text column.
    """
    width = max(layout.shape[1] for _, layout in blocks)
    lines = sum(sum(_heights(layout)) + 2.4 for _, layout in blocks) + 1.2
    step = 0.155
    few = width <= 3
    fig = plt.figure(figsize=(COLUMN if few else PAGE, step * lines + 0.1))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 1), ylim=(lines, -0.4))
    ax.axis("off")
    first, y = 0.3 if few else 0.2, 0.6
    places = first + (0.995 - first) * (np.arange(width) + 1) / width
    for title, layout in blocks:
        ax.hlines(y - 0.75, 0.005, 0.995, color=INK, linewidth=0.8)
        ax.text(0.005, y, title, weight="bold", va="center", fontsize=7)
        for place, name in zip(places, layout.columns, strict=False):
            head = name.replace(" (", "\n(")
            size = 6.5 if head == name else SMALLEST
            ax.text(place, y + 1.3, head, ha="right", va="bottom", fontsize=size, linespacing=0.95)
        ax.hlines(y + 1.5, 0.005, 0.995, color=GREY, linewidth=0.4)
        heights = _heights(layout)
        for number, (name, cells) in enumerate(layout.iterrows()):
            middle = y + 1.5 + sum(heights[:number]) + heights[number] / 2
            _table_line(ax, middle, places, str(name), cells)
        y += sum(heights) + 2.4
    ax.hlines(y - 0.9, 0.005, 0.995, color=INK, linewidth=0.8)
    ax.text(0.005, y - 0.2, note, va="center", fontsize=SMALLEST, color=GREY)
    return fig


def _heights(layout: pd.DataFrame) -> list[float]:
    """Height of each row in lines: an interval takes two, one for each end."""
    return [1.5 if name == "Interval" else 1.0 for name in layout.index]


def _table_line(ax: Axes, y: float, places: np.ndarray, name: str, cells: Iterable[str]) -> None:
    context = name in ("Most probable", "Greedy", "Oracle", "Gain at equal length (%)", "Interval")
    style = {"va": "center", "color": GREY if context else INK}
    style |= {"weight": "bold" if name in ("Selected", "Gain (%)") else "normal"}
    ax.text(0.015, y, name, fontsize=6.5, **style)
    for place, cell in zip(places, cells, strict=False):
        words, size = (cell.replace(" to ", " to\n"), SMALLEST) if name == "Interval" else (cell, 6.5)
        ax.text(place, y, words, ha="right", fontsize=size, linespacing=1.0, **style)


# failures


def share_panel(ax: Axes, counts: pd.DataFrame) -> None:
    """Shares of failures, planted beside control, with Wilson intervals and k of n in words.

    counts: group, sources, failures, share, low, high of one kind of failure.
    """
    for y, line in zip(range(len(counts), 0, -1), counts.itertuples(), strict=True):
        hue = VERMILLION if line.group == "planted" else GREY
        text = f"{line.failures} of {line.sources}" if line.sources else "no such source"
        if line.sources:
            ax.barh(y, 100 * line.share, height=0.5, color=hue, alpha=0.85)
            ax.plot([100 * line.low, 100 * line.high], [y, y], color=INK, linewidth=1.0)
        end = 100 * line.high if line.sources else 0
        ax.annotate(text, (end, y), (4, 0), textcoords="offset points", va="center", fontsize=6.5)
    ax.set_yticks(range(len(counts), 0, -1), counts["group"])
    ax.set_ylim(0.4, len(counts) + 0.6)
    ax.set_xlim(0, 125)  # the same in all panels, with room for the words
    ax.set_xticks(range(0, 101, 20))
    ax.spines["bottom"].set_bounds(0, 100)
    ax.set_xlabel("Sources (%), Wilson's 95 % interval", x=0.4)
    ax.tick_params(axis="y", length=0)
    _take_off_spines(ax, left=True)


__all__ = [
    "COLUMN",
    "PAGE",
    "Origin",
    "bin_panel",
    "colour",
    "corner_note",
    "folder",
    "gain_panel",
    "rank_panel",
    "save_figure",
    "share_panel",
    "show_rho",
    "table_figure",
    "use_theme",
]
