"""Figures: the same bytes for the same figure, honest sidecars, crisp galleries; a page that loads nothing."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
from PIL import Image

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.text import Text

from lib import claims, failures, figures, galleries, labels, notebooks, report
from lib.errors import UserError
from lib.presets import get_preset
from tests.planted import planted_image, planted_rows, planted_scenes

MINI = get_preset("mini")


@dataclass(frozen=True)
class PlantedRun:
    """A run's folder with little synthetic pictures."""

    path: Path
    name: str = "planted"

    def image(self, relative: str) -> Image.Image:
        item = relative.split("/")[1]
        return planted_image(planted_scenes(60)[item], seed=len(relative))


@dataclass(frozen=True)
class PlantedItem:
    """A source as a dataset gives it."""

    item: str
    references: tuple[str, ...] = ("a reference caption of this picture",)

    def image(self) -> Image.Image:
        return planted_image(planted_scenes(60)[self.item])


@pytest.fixture
def origin(tmp_path, monkeypatch) -> figures.Origin:
    monkeypatch.setenv("COMPENDIUM_FIGURES", str(tmp_path / "figures"))
    run = PlantedRun(tmp_path / "runs" / "planted")
    run.path.mkdir(parents=True)
    planted_rows(0.3, n_sources=4).to_parquet(run.path / "rows.parquet")
    figures.use_theme()
    yield figures.Origin(MINI, (run,), 0, "03_figure3")
    plt.close("all")


def draw():
    """Figure 3's left panel from planted rows."""
    rows = claims.prepare(planted_rows(0.3, n_sources=40))
    fig, ax = plt.subplots(figsize=(figures.COLUMN, 2.5), layout="constrained")
    rho = claims.rank_verdicts(rows, "cider", 0)[0].estimate
    profile = claims.rank_profile(rows, "cider")
    figures.rank_panel(ax, {"coco": profile}, {"coco": rho}, "(a)", "CIDEr (× 100)", 100)
    return fig


def test_same_figure_same_bytes_and_a_sidecar(origin, tmp_path) -> None:
    folder = tmp_path / "figures" / "mini"
    figures.save_figure(draw(), "figure3", origin, "A question?", "What is seen.")
    first = {kind: (folder / f"figure3.{kind}").read_bytes() for kind in ("svg", "pdf", "png")}
    figures.save_figure(draw(), "figure3", origin, "A question?", "What is seen.")
    assert first == {kind: (folder / f"figure3.{kind}").read_bytes() for kind in first}
    with Image.open(folder / "figure3.png") as picture:
        assert picture.size[0] == round(figures.COLUMN * 300)
    sidecar = json.loads((folder / "figure3.json").read_text())
    assert sidecar["preset"]["name"] == "mini" and sidecar["alt"] == "What is seen."
    assert re.fullmatch("[0-9a-f]{64}", sidecar["input"][0]["sha256"])
    assert str(tmp_path) not in json.dumps(sidecar), "no path of this machine"
    assert not list(folder.glob(".*partial*"))


def test_panels_draw_few_and_missing_sources() -> None:
    rows = claims.prepare(planted_rows(0.3, n_sources=6, n_candidates=4))
    means = claims.source_means(rows, "cider")
    means.loc[0, "score"] = np.nan
    fig, axes = plt.subplots(1, 2)
    figures.bin_panel(axes[0], means, "picturebook-coco", 8)
    marked = failures.describe(rows, planted_scenes(6))
    counts = failures.counts(marked)
    figures.share_panel(axes[1], counts[counts["kind"] == "generation bias"])
    fig.canvas.draw()
    plt.close(fig)


def texts_of(fig) -> list[Text]:
    """All texts of a figure that are drawn: matplotlib keeps labels of ticks outside of the axes, too."""
    found = list(fig.texts)
    for ax in fig.axes:
        found += [child for child in ax.get_children() if isinstance(child, Text)]
        found += [ax.xaxis.label, ax.yaxis.label]
        for axis, ends in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            ticks = axis.get_major_ticks() if ax.axison else []
            found += [tick.label1 for tick in ticks if min(ends) <= tick.get_loc() <= max(ends)]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def readable(fig) -> list[str]:
    """What a reader of the printed figure could not read: small, cut off or overlapping texts."""
    fig.canvas.draw()
    page, texts = fig.bbox.padded(1), texts_of(fig)
    wrong = [f"small: {text.get_text()}" for text in texts if text.get_fontsize() < figures.SMALLEST]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    wrong += [f"cut off: {words}" for words, box in boxes
              if not page.contains(*box.p0) or not page.contains(*box.p1)]
    for number, (words, box) in enumerate(boxes):
        inner = box.padded(-1)  # a line's box has room above its letters
        wrong += [f"overlap: {words} / {other}" for other, there in boxes[:number]
                  if inner.overlaps(there.padded(-1))]
    return wrong


def table_layout(columns) -> pd.DataFrame:
    """A table with the widest cells that occur."""
    rows = {"Nucleus": "238.2", "Selected": "264.0", "Gain (%)": "+110.8", "Interval": "−111.2 to +113.4",
            "Gain at equal length (%)": "+10.1", "Oracle": "356.6"}
    return pd.DataFrame({name: list(rows.values()) for name in columns}, index=list(rows))


def test_texts_of_figures_can_be_read_in_print(tmp_path) -> None:
    figures.use_theme()
    names = [labels.metric_label(m) for m in (*(f"bleu{n}" for n in (1, 2, 3, 4)), "cider", "cider_d",
                                              "meteor", "rouge_l", "spice", "spice_spacy")]
    title = "Picture book (NoCaps-like), out-of-domain (n = 4500)"
    wide = figures.table_figure([(title, table_layout(names))], "Scores × 100.")
    few = figures.table_figure([(title, table_layout(["CLIP score", "CLIP score (judge)"]))], "A note.")
    rows = claims.prepare(planted_rows(0.3, n_sources=8))
    item = galleries.best_example(rows, "cider")
    run, source = PlantedRun(tmp_path), PlantedItem(item, ("many words about a picture " * 4,) * 3)
    strip = galleries.strip(rows[rows["item"] == item], run, source, "A title", "cider")
    panels, axes = plt.subplots(1, 2, figsize=(figures.PAGE, 2.6), layout="constrained")
    figures.bin_panel(axes[0], claims.source_means(rows, "cider"), "picturebook-coco", 8)
    gains = pd.DataFrame({"gain": [10.0] * 9, "low": [-5.0] * 9, "high": [20.0] * 9})
    figures.gain_panel(axes[1], names[:9], gains, figures.BLUE)
    for fig in (wide, few, galleries.gallery([strip]), panels, draw()):
        assert readable(fig) == []
    plt.close("all")


def test_the_colour_of_the_selected_one_can_be_read() -> None:
    rgb = np.array([int(figures.SELECTED[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.5, "WCAG 2.2, 1.4.3, on white"


def test_enlarging_repeats_pixels_and_nothing_else() -> None:
    small = planted_image(planted_scenes(1)["0000"])
    large = galleries.enlarge(small)
    assert large.shape == (256, 256, 3)
    assert (large[::4, ::4] == np.asarray(small)).all() and (large[1::4, 3::4] == large[::4, ::4]).all()
    assert galleries.enlarge(Image.new("RGB", (300, 200))).shape == (200, 300, 3)


def test_wrapping_keeps_to_the_width_and_marks_what_is_cut() -> None:
    text = "a small red bird sitting on a branch next to a big green tree in the snow"
    lines = galleries.wrap(text, 0.9, 6, 20).split("\n")
    assert " ".join(lines) == text and len(lines) > 2
    short = galleries.wrap(text, 0.9, 6, 2).split("\n")
    assert len(short) == 2 and short[-1].endswith("…")
    assert galleries.wrap("unbreakableverylongword", 0.1, 6, 3) == "unbreakableverylongword"
    assert galleries.wrap("", 1, 6, 3) == ""


def test_gallery_shows_best_to_worst_and_the_selected_one(tmp_path) -> None:
    rows = claims.prepare(planted_rows(0.3, n_sources=8))
    item = galleries.best_example(rows, "cider")
    one = rows[rows["item"] == item]
    strip = galleries.strip(one, PlantedRun(tmp_path), PlantedItem(item), "A title", "cider")
    assert len(strip.cells) == 4 and [cell.selected for cell in strip.cells] == [True] + 3 * [False]
    shown = galleries.spaced(one)
    assert shown["rank"].is_monotonic_increasing and shown["rank"].iloc[0] == 1
    fig = galleries.gallery([strip, strip])
    fig.canvas.draw()
    assert "A title" in galleries.described([strip])
    galleries.gallery([]).canvas.draw()
    plt.close("all")


def test_a_saved_gallery_is_a_figure_and_its_parts(origin, tmp_path) -> None:
    rows = claims.prepare(planted_rows(0.3, n_sources=8))
    item = galleries.best_example(rows, "cider")
    one = rows[rows["item"] == item]
    strip = galleries.strip(one, PlantedRun(tmp_path), PlantedItem(item), "A <title>", "cider")
    galleries.save_gallery([strip], "figure5", origin, "What?")
    folder = tmp_path / "figures" / "mini"
    parts, = json.loads((folder / "figure5.strips.json").read_text())
    assert parts["crisp"] and [cell["selected"] for cell in parts["cells"]] == [True] + 3 * [False]
    pixels = base64.b64decode(parts["uri"].partition(",")[2])
    assert (np.asarray(Image.open(io.BytesIO(pixels))) == np.asarray(PlantedItem(item).image())).all()
    text = report.build_report("mini").read_text(encoding="utf-8")
    assert text.count('class="zoom"') == 5 and text.count('class="badge"') == 1
    assert "A &lt;title&gt;" in text and "a reference caption of this picture" in text


def test_intervals_of_one_claim_share_their_scale() -> None:
    scale = report.Scale.around([(-0.1, 0.4), (0.02, 0.05)])
    assert scale.reach == pytest.approx(0.46) and scale.words(-0.1) == "−0.100"
    assert scale.place(0) == 50 and scale.place(0.46) == 100 and scale.place(-0.23) == 25
    assert report.Scale.around([]).words(1) == "1.00"
    assert report.Scale.around([(0.0, 0.0)]).place(0.0) == 50


def test_equal_candidates_are_shown_once() -> None:
    rows = planted_rows(0.3, n_sources=1)
    rows["message"], rows["reconstruction"] = "the same", "images/0000/0.png"
    assert len(galleries.spaced(rows)) == 1
    assert galleries.best_example(rows, "cider") is None


class Page(HTMLParser):
    """Collects what a page refers to, and what a screen reader could not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.loads, self.links, self.silent, self.open = [], [], 0, []
        self.headings: list[int] = []

    def handle_starttag(self, tag, attrs) -> None:
        values = dict(attrs)
        self.loads += [values["src"]] if "src" in values else []
        if tag in ("a", "link"):
            self.links.append(values.get("href", ""))
        # A button has its own name and hides what is within it, an alternative text, too.
        self.silent += tag == "img" and ("alt" not in values or "button" in self.open)
        self.silent += tag == "th" and "scope" not in values
        self.headings += [int(tag[1])] if tag in ("h1", "h2", "h3", "h4") else []
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag, f"{tag} closed out of order"


def test_report_is_one_page_that_loads_nothing(origin, tmp_path) -> None:
    figures.save_figure(draw(), "figure3", origin, "Is it <better>?", 'Said "so" & shown.')
    folder = tmp_path / "figures" / "mini"
    found = claims.rank_verdicts(claims.prepare(planted_rows(0.4, n_sources=40)), "cider", 0)
    claims.write_verdicts(found, folder / "figure3.verdict.json")
    path = report.build_report("mini")
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == [] and page.silent == 0 and '<html lang="en">' in text
    assert page.headings[0] == 1 and all(b - a <= 1 for a, b in pairwise(page.headings))
    assert page.loads and all(load.startswith("data:") for load in page.loads)
    outside = [link for link in page.links if not link.startswith(("#", "data:"))]
    assert all((folder / link).is_file() for link in outside)
    assert "Figure 3 of the paper" in text and "03_figure3_reconstruction_rank" in text
    assert re.search("[2-9]</b>hold<", text), "a number of verdicts, so not: holds"
    assert "Is it &lt;better&gt;?" in text and "holds" in text and str(tmp_path) not in text
    assert "prefers-color-scheme: dark" in text and "viewport" in text


def test_figures_of_an_executed_notebook_have_their_texts(origin, tmp_path) -> None:
    figures.save_figure(draw(), "figure3", origin, "A question?", 'It says "so" & falls.')
    dot = base64.b64encode((tmp_path / "figures" / "mini" / "figure3.png").read_bytes()).decode()
    made = nbformat.v4.new_output("display_data", {"image/png": dot})
    sources = ("plt.plot()", 'figures.save_figure(fig, "figure3", origin, title, alt);', "plt.plot()")
    cells = [nbformat.v4.new_markdown_cell("# 03 · A title\n\n## One round")]
    cells += [nbformat.v4.new_code_cell(source, outputs=[made]) for source in sources]
    executed = tmp_path / "figures" / "mini" / "notebooks" / "03.ipynb"
    executed.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), executed)
    text = notebooks.export_html(executed).read_text(encoding="utf-8")
    alone = "Figure to the section: One round"
    assert re.findall('alt="([^"]+)"', text) == [alone, "It says &quot;so&quot; &amp; falls.", alone]
    assert "<title>03 · A title</title>" in text


def test_the_report_says_whether_one_needs_the_game(origin, tmp_path) -> None:
    figures.save_figure(draw(), "table1_gains", origin, "t", "a")
    folder = tmp_path / "figures" / "mini"
    assert "need the game" not in report.build_report("mini").read_text(encoding="utf-8")
    (folder / "table1_rivals.csv").write_text(
        "dataset,rival,score,lead,low,high\npicturebook-coco,greedy,cider,13.4,4,22\n"
        "picturebook-coco,greedy,sem_f,-6,-8,-4\n", encoding="utf-8")
    text = report.build_report("mini").read_text(encoding="utf-8")
    assert "need the game" in text and "yet its captions say less that is true" in text
    for damaged in ("", "garbage\n1\n"):
        (folder / "table1_rivals.csv").write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match=r"table1_rivals.csv cannot be read as a table .*: run its notebook"):
            report.build_report("mini")


def test_report_without_figures_or_with_a_damaged_file(origin, tmp_path) -> None:
    with pytest.raises(UserError, match="has no figures"):
        report.build_report("mini")
    figures.save_figure(draw(), "figure3", origin, "t", "a")
    (tmp_path / "figures" / "mini" / "figure3.verdict.json").write_text("{")
    with pytest.raises(UserError, match="run its notebook again"):
        report.build_report("mini")
