"""What every figure promises: the same bytes, a record beside it, readable labels, crisp images; and the table of claims."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from lib.figures import CLAIMS, Cell, claim, image_grid, looks, save_claims, save_figure, show, use_theme

matplotlib.use("Agg")
NONE = float("nan")


@pytest.fixture
def runs(tmp_path: Path) -> SimpleNamespace:
    """What the functions need of `Runs`."""
    return SimpleNamespace(figures=tmp_path / "figures" / "mini", provenance=lambda: {"preset": "mini"})


def red(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "red")


def test_a_figure_is_saved_as_the_same_bytes_with_a_record_beside_it(runs) -> None:
    use_theme()
    data, saved = pd.DataFrame({"rank": [1, 2], "mean": [0.5, NONE]}), []
    for _ in range(2):
        fig, ax = plt.subplots()
        ax.plot([1, 2], [3, 4])
        png = save_figure(fig, "one", runs, "A line that rises.", data)
        saved.append({path.name: path.read_bytes() for path in sorted(runs.figures.iterdir())})
    assert png == runs.figures / "one.png" and list(saved[0]) == ["one.json", "one.pdf", "one.png", "one.svg"]
    assert saved[0] == saved[1]
    record = json.loads(saved[0]["one.json"])
    assert record["alt"] == "A line that rises." and record["provenance"] == {"preset": "mini"}
    assert record["data"] == [{"rank": 1, "mean": 0.5}, {"rank": 2, "mean": None}], "missing is null"


def test_the_theme_does_not_take_over_what_a_user_set() -> None:
    plt.rcParams.update({"text.usetex": True, "figure.autolayout": True, "font.family": "serif"})
    use_theme()
    assert not plt.rcParams["text.usetex"] and not plt.rcParams["figure.autolayout"]
    assert plt.rcParams["font.family"] == ["DejaVu Sans"] and plt.rcParams["font.size"] >= 6.5


def test_looks_are_fixed_for_the_papers_data_and_every_label_and_colour_is_its_own() -> None:
    long = ["images of a very long summer by the sea, first half", "images of another long summer by the sea, first half"]
    found = looks(["nocaps", *long, "picturebook-coco", "my_pictures"])
    assert found["picturebook-coco"] == looks(["picturebook-coco"])["picturebook-coco"]
    assert found["nocaps"].color == looks(["picturebook-nocaps"])["picturebook-nocaps"].color
    assert found["my_pictures"].label == "my_pictures"
    assert len({look.label for look in found.values()}) == len({look.color for look in found.values()}) == 5
    assert max(len(look.label) for look in found.values()) <= 30


def test_an_estimate_in_words() -> None:
    assert show({"estimate": 0.216, "low": 0.153, "high": 0.274}) == "0.22 [0.15, 0.27]"
    assert show({"estimate": -1.25, "low": -3, "high": 0.5}, " %", 1) == "−1.2 % [−3.0, 0.5]"
    assert show({"estimate": 0.3, "low": NONE, "high": NONE}) == "0.30 (no interval)"
    assert show({"estimate": NONE, "low": NONE, "high": NONE}) == "no data"


def test_claims_are_one_table_with_units_verdicts_and_what_could_have_been_found(runs) -> None:
    results = [{"estimate": 9.1, "low": 3.9, "high": 14.4, "n": 120, "p": 0.003, "paper": 7.6},
               {"estimate": 5.8, "low": -0.5, "high": 12.1, "n": 120}, {"estimate": 5.0, "low": NONE, "high": NONE, "n": 4}]
    made = [claim("selected beats nucleus", "image", f"set {k}", "+7.6 %", result, "%", note="CIDEr")
            for k, result in enumerate(results)]
    table = save_claims(made, "05_table1", runs)
    assert table["verdict"].tolist() == ["supported", "inconclusive", "insufficient data"]
    assert table["paper"].tolist() == ["+7.6 %"] * 3 and table["note"][0] == "CIDEr"
    assert table["detectable"].round(1).tolist() == pytest.approx([NONE, 9.0, NONE], nan_ok=True)
    assert table["note"][1] == "CIDEr" and "too few sources" in table["note"][2]
    within = {"low": -7.3, "high": 5.1, "estimate": -1, "n": 20}
    found = claim("by less than 2 %", "image", "all", "", within, "%", margin=2)["detectable"]
    assert found == pytest.approx(2 + 8.86, abs=0.01)
    stored = pd.read_csv(runs.figures / "claims" / "05_table1.csv", keep_default_na=True)
    assert list(stored) == CLAIMS
    assert stored["low"].isna().tolist() == [False, False, True]
    assert list(pd.read_csv((save_claims([], "none", runs), runs.figures / "claims" / "none.csv")[1])) == list(stored)


def test_a_grid_has_a_badge_on_what_is_selected_and_all_words_inside_the_page() -> None:
    use_theme()
    words = "a very long caption of a blue rabbit to the left of two purple canoes on a snowy field " * 3
    rows = [[Cell(None, "the text that was given"), (red(16, 8), words, "similarity 0.98", True), (red(500, 400), "short")],
            [(red(8, 8), "one")]]
    fig = image_grid(rows, ["First", "Second"])
    fig.canvas.draw()
    texts = {text.get_text() for text in fig.findobj(plt.Text)}
    assert {"First", "Second", "similarity 0.98", "selected", "short"} <= texts
    assert any(text.endswith("…") for text in texts), "what is cut is marked"
    page = fig.bbox
    for text in fig.texts:
        box = text.get_window_extent()
        assert box.x0 >= page.x0 and box.x1 <= page.x1 + 1 and box.y0 >= page.y0 and box.y1 <= page.y1 + 1
        assert text.get_fontsize() >= 6


def test_small_images_are_enlarged_by_whole_factors_and_large_ones_reduced() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8))
    small, large = (ax.images[0].get_array() for ax in image_grid([[(image, ""), (red(2000, 1000), "")]]).axes)
    assert small.shape == (120, 240, 3) and (small[::6, ::6] == np.asarray(image)).all()
    assert max(large.shape) <= 400


def test_an_empty_grid_says_so() -> None:
    assert image_grid([]).texts[0].get_text() == "no source of this run fits the rule"
