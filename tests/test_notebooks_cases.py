"""Notebooks 06, 07, 08 and 90 on rows with a planted answer: the rules find it, a parameter changes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import planted
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from lib.base import ROOT
from lib.figures import CLAIMS, claim, save_claims
from lib.roundtrip import Runs, open_runs
from lib.roundtrip.run import ranked

matplotlib.use("Agg")
COCO = "picturebook-coco"


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run a notebook's cells in this process with other parameters; its names, with all it displayed in "__shown__".

    Figures are drawn once and small: three large files for each would take most of the time.
    """
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, to, format, **options: (
        save(self, to, format="png", dpi=30) if format == "png" else to.write(b"not drawn")))

    def run(number: str, **parameters: Any) -> dict[str, Any]:
        path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        names: dict[str, Any] = {"__shown__": []}
        monkeypatch.setattr("IPython.display.display", lambda *things: names["__shown__"].extend(things))
        for cell in cells:
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                assert set(parameters) <= set(names), "an unknown parameter"
                names |= parameters
        plt.close("all")
        return names

    return run


def text_of(names: dict[str, Any]) -> str:
    return "\n".join(str(getattr(thing, "data", thing)) for thing in names["__shown__"])


def neutral(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that no rule picks: every candidate of every source alike, but for its words."""
    words = [f"a thing number {k}" for k in rows["candidate"]]
    rows = rows.assign(similarity=0.5 - 0.01 * rows["candidate"], cider=1.0)
    rows = rows.assign(**dict.fromkeys(("clipscore", "clip_score", "sem_object_p", "sem_f"), 0.5))
    rows["message" if rows["task"].iloc[0] == "image" else "reconstruction"] = words
    return rows


def sources(n: int, kind: Callable[[Any], bool] = lambda item: True) -> list[str]:
    """Ids of the drawn COCO-like sources of a kind."""
    items = open_runs("mini", COCO, n).runs[COCO, "image"].dataset.items
    return [item.id for item in items if kind(item)]


def written(n: int, change: Callable[[pd.DataFrame], pd.DataFrame]) -> dict[str, Any]:
    """Planted COCO-like runs of n sources with four candidates; the parameters that a notebook needs to read them."""
    planted.write("mini", COCO, n, 4, change=lambda rows: ranked(change(neutral(rows))))
    return {"DATASET": COCO, "N_SOURCES": n, "N_CANDIDATES": 4}


def put(rows: pd.DataFrame, item: str, candidate: int, **values: Any) -> None:
    for column, value in values.items():
        rows.loc[(rows["item"] == item) & (rows["candidate"] == candidate), column] = value


def claims_of(names: dict[str, Any], words: str) -> pd.DataFrame:
    """The stored claims with these words."""
    stored = map(pd.read_csv, (names["runs"].figures / "claims").glob("*.csv"))
    table = pd.concat([pd.DataFrame(columns=CLAIMS), *stored])
    return table[table["claim"].astype(str).str.contains(words)]


# --- Figure 5 -------------------------------------------------------------------------------------


def is_snowman(item: Any) -> bool:
    return (item.scene["planted"] == "accessory" and item.scene["entities"][0]["category"] == "snowman"
            and any("scar" in text and "snowm" in text for text in item.references))


@pytest.fixture
def figure5_parameters() -> dict[str, Any]:
    """Two sources where selection gains (the larger gain from a bad reconstruction), one failure of each kind."""
    snowman = sources(120, is_snowman)[0]
    good, bad, imperfect = [item for item in sources(120) if item != snowman][:3]
    right = {"sem_object_p": 1.0, "sem_f": 1.0}

    def change(rows: pd.DataFrame) -> pd.DataFrame:
        put(rows, good, 0, similarity=0.9, cider=2.0, **right)
        put(rows, bad, 0, similarity=0.2, cider=9.0, **right)
        for k in (1, 2, 3):
            put(rows, bad, k, similarity=0.1)
        put(rows, imperfect, 0, similarity=0.9, cider=0.1, **right)
        put(rows, snowman, 0, similarity=0.9, cider=0.2, **right)
        if rows["task"].iloc[0] == "image":
            put(rows, snowman, 0, message="a snowman in the snow")
        return rows

    return written(120, change) | {"expected": (good, imperfect, snowman)}


def test_figure5_shows_what_its_rows_claim(notebook, figure5_parameters) -> None:
    good, imperfect, snowman = figure5_parameters.pop("expected")
    names = notebook("06", **figure5_parameters)
    works = names["works"].query("task == 'image'")["item"].tolist()
    assert works == [good]  # not the larger gain of a bad reconstruction
    assert names["imperfect"]["item"].tolist() == [imperfect]
    assert names["biased"]["item"].tolist() == [snowman]  # names the snowman, leaves out the scarf, all else is right
    stored = json.loads((names["runs"].figures / "figure5.json").read_text(encoding="utf-8"))
    assert [row["item"] for row in stored["data"][-3:]] == [good, imperfect, snowman]
    assert len(stored["alt"]) < 600


def test_figure5_rules_follow_their_parameters(notebook, figure5_parameters) -> None:
    imperfect, snowman = figure5_parameters.pop("expected")[1:]
    names = notebook("06", **figure5_parameters, N_EXAMPLES=2, COMES_WITH={"doctor": "stethoscope"})
    assert sorted(names["imperfect"]["item"]) == sorted([imperfect, snowman])
    assert names["biased"].empty
    assert [len(row) for row in names["strips"]] == [5] * len(names["chosen"])


# --- Figure 6 -------------------------------------------------------------------------------------


def test_figure6_tests_the_single_object(notebook) -> None:
    single = sources(24, lambda item: sum(entity["count"] for entity in item.scene["entities"]) == 1)
    assert len(single) >= 6

    def change(rows: pd.DataFrame) -> pd.DataFrame:
        easy = rows["item"].map({item: 0.001 * k for k, item in enumerate(single, 1)}).fillna(0)
        return rows.assign(similarity=rows["similarity"] + easy + 0.1 * (easy > 0), cider=rows["cider"] + easy)

    parameters = written(24, change)
    line = claims_of(notebook("07", **parameters, EASY=0.75), "salient").iloc[0]
    assert line["estimate"] == pytest.approx(1 - (len(single) - 6) / 18)
    assert (line["verdict"], line["n"]) == ("supported", 24)
    line = claims_of(notebook("07", **parameters, EASY=0.9), "salient").iloc[0]
    assert line["verdict"] == "insufficient data"  # fewer than six easy images


# --- failures -------------------------------------------------------------------------------------


def test_imperfect_annotation_is_counted_beside_controls(notebook) -> None:
    vague = sources(120, lambda item: item.scene["planted"] == "family")
    failing, n = vague[:8], len(vague)
    assert n >= 8

    def change(rows: pd.DataFrame) -> pd.DataFrame:
        for item in failing:
            put(rows, item, 0, similarity=0.9, cider=0.1, sem_object_p=1.0)
        return rows

    parameters = written(120, change)
    names = notebook("08", **parameters)
    assert names["counts"].loc[(COCO, "planted"), ["sum", "size"]].tolist() == [8, n]
    assert names["counts"].loc[(COCO, "control"), "sum"] == 0
    line = claims_of(names, "imperfect annotation").iloc[0]
    assert line["estimate"] == pytest.approx(8 / n) and line["verdict"] == "supported"
    drawn = json.loads((names["runs"].figures / "failures_counts.json").read_text(encoding="utf-8"))["data"]
    assert [row["estimate"] for row in drawn if row["group"] == "planted"] == [pytest.approx(8 / n, abs=1e-5)]
    names = notebook("08", **parameters, LOW=0.001)
    assert names["counts"]["sum"].sum() == 0  # the threshold is a parameter


def test_what_is_drawn_unasked_is_counted_beside_controls(notebook) -> None:
    def change(rows: pd.DataFrame) -> pd.DataFrame:
        if rows["task"].iloc[0] == "text":
            place = rows["item"].map({item: k for k, item in enumerate(rows["item"].unique())})
            things = place.map(lambda k: "snowman" if k < 8 else "cat" if k < 16 else "ball")
            rows["source_text"] = "a " + things + " in the snow"
            rows["reconstruction"] = rows["source_text"].where((things != "snowman") | (rows["candidate"] % 2 == 0),
                                                               "a snowman with a scarf")
        return rows

    parameters = written(24, change)
    names = notebook("08", **parameters)
    line = claims_of(names, "unasked what").iloc[0]
    assert (line["estimate"], line["n"], line["verdict"]) == (0.5, 16, "supported")
    pair = names["both"].nlargest(1, "lift").iloc[0]
    assert (pair["asked"], pair["unasked"]) == ("snowman", "scarf") or pair["unasked"] == "with"  # found without a list
    names = notebook("08", **parameters, PLANTED={"doctor": "stethoscope"})
    assert claims_of(names, "unasked what")["verdict"].tolist() == ["insufficient data"]


# --- the summary ----------------------------------------------------------------------------------


def test_summary_shows_the_claims_beside_the_paper(notebook) -> None:
    planted.write("mini", COCO, 6, 2)
    runs = open_runs("mini", COCO, 6, 2)

    def line(text: str, estimate: float, low: float, high: float, paper: str) -> dict:
        return claim(text, "image", COCO, paper, {"estimate": estimate, "low": low, "high": high, "n": 60}, "%")

    main = line("the selected caption beats nucleus sampling in CIDEr (Table 1)", 5.5, 4.0, 7.0, "+2.2 %")
    others = [line("a claim of a failure", 1.0, -0.5, 2.5, "one example"), line("another one", -3.0, -4.0, -2.0, "yes"),
              line("weak", 1.0, 0.02, 1.98, "yes")]
    answer = line("one image tells more of its caption than of its noise (shared noise)", 1.0, -1.0, 3.0, "no value")
    save_claims([main], "05_table1", runs), save_claims(others, "08_failures", runs)
    save_claims([answer], "10_seed_luck", runs)
    names = notebook("90", DATASET=COCO, N_SOURCES=6, N_CANDIDATES=2)
    page, results = text_of(names), (runs.figures / "results.md").read_text(encoding="utf-8")
    assert results in page and len(results.splitlines()) == 4  # the main claim and an answer beyond the paper: the README's
    assert "| 10 | image | one image tells" in results and "inconclusive (detectable: 2.9) |" in results
    assert all(word in results for word in ("+2.2 %", "5.50\u00a0%\u00a0[4.00,\u00a07.00]", "| 60 |", "supported"))
    assert "5 claims: 2 supported, 2 inconclusive, 1 contradicted" in page
    assert "remain: 1 supported, 1 contradicted" in page  # the weak one does not survive Holm
    assert (names["claims"].set_index("claim").loc[["weak", "another one"], "after Holm"] == ["no", "yes"]).all()
    assert (names["coverage"].filter(like="sources") >= 93).all(axis=None)
    assert "one example" in page and "spice is missing: planted rows have none" in page


def test_summary_embeds_every_figure_with_its_text(notebook) -> None:
    planted.write("mini", COCO, 6, 2)
    parameters = {"DATASET": COCO, "N_SOURCES": 6, "N_CANDIDATES": 2}
    notebook("07", **parameters)
    images = [thing for thing in notebook("90", **parameters)["__shown__"] if hasattr(thing, "alt")]
    assert [image.alt for image in images] and all(image.data.startswith(b"\x89PNG") for image in images)


# --- own data -------------------------------------------------------------------------------------


def own_folder(tmp_path: Path) -> tuple[str, str]:
    folder = tmp_path / "my images"
    folder.mkdir()
    for k in range(7):
        Image.new("RGB", (40, 30), (30 * k, 90, 200)).save(folder / f"photo {k}.png")
    return f"folder:{folder}", "has no captions"


def own_texts(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "prompts.txt").write_text("a red ball\na snowman in the snow\na blue bus at night\n")
    return f"texts:{tmp_path / 'prompts.txt'}", "has no images"


def without_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows as a dataset without references and without true scenes leaves them."""
    empty = [c for c in rows if c.startswith(("sem_", "bleu", "cider", "spice", "meteor", "rouge_l", "ref_clipscore"))]
    return rows.assign(**dict.fromkeys(empty, None)).astype(dict.fromkeys(empty, float))


@pytest.mark.parametrize("make", [own_folder, own_texts])
def test_own_data_runs_to_the_summary_and_says_what_is_missing(notebook, tmp_path: Path, make) -> None:
    dataset, reason = make(tmp_path)
    runs: Runs = planted.write("mini", dataset, 0, 3, change=without_scores)
    for number in ("06", "07", "08", "90"):
        names = notebook(number, DATASET=dataset, N_CANDIDATES=3)
        assert reason in text_of(names)
    assert {"figure5.png", "figure6.png", "failures_counts.png"} <= {path.name for path in runs.figures.glob("*.png")}
    assert claims_of(names, "imperfect").empty  # nothing is counted that cannot be known
    assert set(claims_of(names, "")["verdict"]) <= {"insufficient data"}
