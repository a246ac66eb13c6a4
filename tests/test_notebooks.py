"""The real notebooks, run end to end at a small size with the real mini models."""

from __future__ import annotations

import ast
import json
import math

import pandas as pd
import pytest
from PIL import Image

from lib import notebooks, pipeline
from lib.presets import get_preset
from tests.background import N_CANDIDATES, N_SOURCES, SIZE, places

ALL = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
MINI = get_preset("mini")


# --- as committed ----------------------------------------------------------------------------

def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_notebook_keeps_to_the_house_rules(path):
    cells = code_cells(path)
    sources = ["".join(cell["source"]) for cell in cells]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "has outputs"
    assert all(len(source.splitlines()) <= 25 for source in sources), "a cell is too long"
    assert sum(len(source.splitlines()) for source in sources) <= 150, "too much code"
    functions = [node for source in sources for node in ast.walk(ast.parse(source))
                 if isinstance(node, ast.FunctionDef)]
    assert len(functions) <= 1, "functions belong into lib"
    assert "sys.path" not in "".join(sources)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_notebook_takes_the_common_parameters(path):
    flags = pipeline.parse([])
    notebooks.check_parameters(path, pipeline.notebook_parameters(flags, MINI))


def test_manifest_lists_every_notebook():
    listed = notebooks.read_manifest()
    assert listed == sorted(listed)
    assert set(ALL) - set(listed) <= {notebooks.NOTEBOOKS / "00_explore.ipynb"}  # for people


# --- as run ----------------------------------------------------------------------------------

def tables(whole_run):
    """{(dataset, task): rows} of every run in the temporary place."""
    found = {}
    for path in (whole_run / "runs").glob("*/rows.parquet"):
        table = pd.read_parquet(path)
        found[table["dataset"].iloc[0], table["task"].iloc[0]] = table
    return found


def test_both_tasks_of_both_datasets_are_played(whole_run):
    rows = tables(whole_run)
    assert set(rows) == {(dataset, task) for dataset in MINI.datasets for task in ("image", "text")}
    for table in rows.values():
        assert len(table) == N_SOURCES * N_CANDIDATES
        assert table["item"].nunique() == N_SOURCES
        assert (table.groupby("item")["candidate"].apply(sorted).map(tuple)
                == tuple(range(N_CANDIDATES))).all()


def test_rows_make_sense(whole_run):
    for (dataset, task), table in tables(whole_run).items():
        assert table["similarity"].between(-1, 1).all() and table["similarity_judge"].notna().all()
        best = table.groupby("item")["similarity"].transform("max")
        assert (table.groupby("item")["selected"].sum() == 1).all()
        assert (table.loc[table["selected"], "similarity"] == best[table["selected"]]).all()
        assert (table.loc[table["selected"], "rank"] == 1).all()
        texts = table["message"] if task == "image" else table["reconstruction"]
        assert texts.str.split().map(len).between(1, 40).all()
        assert (table["logprob"] < 0).all() and not table["flagged"].any()
        assert table["domain"].notna().any() == (dataset == "picturebook-nocaps")
        assert table["sem_f"].between(0, 1).all()
        if task == "image":
            assert table["cider"].between(0, 10).all() and table["cider"].mean() > 0.2
            assert table[["bleu1", "bleu4", "meteor", "rouge_l", "spice_spacy"]].notna().all(None)
            # Trained models: captions name most of what is there, and pictures resemble sources.
            assert table["sem_f"].mean() > 0.4 and table["similarity"].mean() > 0.3


def test_pictures_exist_and_are_pictures(whole_run):
    for path in (whole_run / "runs").glob("*/rows.parquet"):
        table = pd.read_parquet(path)
        column = "reconstruction" if table["task"].iloc[0] == "image" else "message"
        for relative in table[column].unique()[:5]:
            with Image.open(path.parent / relative) as picture:
                assert picture.size == (64, 64) and len(set(picture.convert("L").tobytes())) > 8


def test_greedy_baseline_is_there(whole_run):
    for dataset in MINI.datasets:
        path, = (whole_run / "runs").glob(f"mini--{dataset}--image--*/baselines.parquet")
        table = pd.read_parquet(path)
        assert set(table["kind"]) == {"greedy"} and table["item"].nunique() == N_SOURCES
        assert table["cider"].notna().all()


def test_every_figure_is_a_vector_a_png_and_a_sidecar(whole_run):
    folder = whole_run / "figures" / "mini"
    pictures = sorted(folder.glob("*.png"))
    # Others depend on whether so few sources hold an example.
    assert {path.stem for path in pictures} >= {"figure3", "figure4", "figure5", "table1", "table1_gains"}
    for path in pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 100
        sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert "mini" in json.dumps(sidecar) and not holds_nan(sidecar)
        for suffix in (".svg", ".pdf"):
            assert path.with_suffix(suffix).stat().st_size > 1000


def holds_nan(value):
    """Whether a NaN, which is no JSON, is anywhere inside."""
    if isinstance(value, dict):
        return any(map(holds_nan, value.values()))
    if isinstance(value, list):
        return any(map(holds_nan, value))
    return isinstance(value, float) and math.isnan(value)


def test_table_1_and_the_report_are_there(whole_run):
    folder = whole_run / "figures" / "mini"
    table = pd.read_csv(folder / "table1.csv")
    assert len(table) and table.notna().any(axis=None)
    assert "CIDEr" in (folder / "table1.tex").read_text(encoding="utf-8")
    assert (folder / "index.html").stat().st_size > 100_000


def test_executed_copies_have_no_errors(whole_run):
    executed = whole_run / "figures" / "mini" / "notebooks"
    copies = sorted(executed.glob("*.ipynb"))
    assert [path.name for path in copies] == [path.name for path in notebooks.read_manifest()]
    for path in copies:
        for cell in code_cells(path):
            assert not [out for out in cell["outputs"] if out["output_type"] == "error"]
        page = path.with_suffix(".html").read_text(encoding="utf-8")
        assert 'src="http' not in page and str(path.parent) not in page


def test_second_run_has_nothing_to_do(whole_run, monkeypatch, capsys):
    for name, place in places(whole_run).items():
        monkeypatch.setenv(name, place)
    assert pipeline.main(SIZE) == 0
    assert capsys.readouterr().out.count("up to date") == len(notebooks.read_manifest())
