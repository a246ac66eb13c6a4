"""The runner of the notebooks: order, parameters, errors, and what is up to date.

The notebooks here are small ones of the tests' own; the real ones run in test_notebooks.py.
"""

from __future__ import annotations

import io
import json
import os

import nbformat
import pytest

from lib import notebooks, pipeline
from lib.errors import UserError

PARAMETERS = 'PRESET = "mini"\nDATASET = "all"\nN_SOURCES = 0\nN_CANDIDATES = 0\nSEED = 0\n'


def write_notebook(path, *cells, parameters=PARAMETERS):
    """Write a notebook with a parameters cell and the given code cells."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    document = nbformat.v4.new_notebook(
        cells=[first, *map(nbformat.v4.new_code_cell, cells)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    nbformat.write(document, path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty notebooks folder, with figures and rows sent to a temporary place."""
    monkeypatch.setenv("COMPENDIUM_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("COMPENDIUM_RUNS", str(tmp_path / "runs"))
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def set_manifest(folder, *names):
    (folder / "manifest.txt").write_text("# order\n" + "\n".join(names) + "\n", encoding="utf-8")


def test_runs_in_order_keeps_copies_and_skips_what_is_up_to_date(folder, tmp_path, capsys):
    figure = tmp_path / "figures" / "mini" / "square.csv"
    write_notebook(folder / "01_first.ipynb", "print('sources:', N_SOURCES, 'seed:', SEED)",
                   "import sys; print('half', file=sys.stderr)")
    write_notebook(folder / "02_second.ipynb", "import lib.errors, pathlib",
                   f"pathlib.Path({str(figure)!r}).write_text(str(FACTOR ** 2))",
                   parameters=PARAMETERS + "FACTOR = 2.0\n")
    set_manifest(folder, "01_first.ipynb", "02_second")
    flags = pipeline.parse(["--n", "7", "--seed", "3", "--param", "FACTOR=5"])

    outcome = pipeline.run_all(flags, folder)
    pipeline.summarise(outcome, pipeline.write_report(outcome))
    out = capsys.readouterr().out
    assert "2 notebooks run" in out and "report" not in out  # there is no figure to report on
    assert "[1/2] 01_first\n      sources: 7 seed: 3\n      half\n      done in " in out
    assert "[2/2] 02_second  " in out and "square.csv" in out
    assert figure.read_text() == "25.0"
    executed = figure.parent / "notebooks"
    assert {path.name for path in executed.iterdir()} >= {
        "01_first.ipynb", "01_first.html", "02_second.ipynb", "02_second.html"}
    page = (executed / "01_first.html").read_text(encoding="utf-8")
    assert "sources: 7" in page and 'src="http' not in page and "import(" not in page

    pipeline.run_all(flags, folder)
    assert capsys.readouterr().out.count("up to date") == 2
    figure.unlink()  # a figure that is gone is drawn again, and only that one
    pipeline.run_all(flags, folder)
    assert capsys.readouterr().out.count("up to date") == 1 and figure.exists()
    pipeline.run_all(pipeline.parse(["--only", "first", "--n", "8"]), folder)
    assert "sources: 8" in capsys.readouterr().out


def test_up_to_date_depends_on_rows_parameters_and_source(folder, tmp_path):
    path = write_notebook(folder / "01_a.ipynb", "x = 1")
    given = {"PRESET": "mini", "N_SOURCES": 1}
    program, data = pipeline.program_digest(path, given), pipeline.data_digest()
    assert (pipeline.program_digest(path, given), pipeline.data_digest()) == (program, data)
    assert pipeline.program_digest(path, {**given, "N_SOURCES": 2}) != program
    run = tmp_path / "runs" / "mini--x"
    run.mkdir(parents=True)
    (run / "rows.parquet").write_bytes(b"rows")
    assert pipeline.data_digest() != data
    write_notebook(path, "x = 2")
    assert pipeline.program_digest(path, given) != program


def test_user_error_is_one_line_and_the_copy_is_kept(folder, tmp_path, monkeypatch, capsys):
    write_notebook(folder / "01_bad.ipynb", "from lib.errors import UserError",
                   "raise UserError('photo.png is truncated: replace it')")
    set_manifest(folder, "01_bad.ipynb")
    with pytest.raises(UserError, match=r"^photo.png is truncated: replace it$"):
        pipeline.run_all(pipeline.parse([]), folder)
    kept = tmp_path / "figures" / "mini" / "notebooks" / "01_bad.ipynb"
    assert "UserError" in kept.read_text(encoding="utf-8")
    assert not kept.with_suffix(".stamp.json").exists()


def test_other_errors_name_notebook_cell_and_copy(folder):
    write_notebook(folder / "01_bug.ipynb", "value = 1", "value / 0")
    set_manifest(folder, "01_bug.ipynb")
    with pytest.raises(notebooks.NotebookFailure, match="01_bug.ipynb, cell .*ZeroDivisionError"):
        pipeline.run_all(pipeline.parse([]), folder)


def test_a_killed_kernel_is_one_line(folder):
    write_notebook(folder / "01_killed.ipynb", "import os, signal",
                   "os.kill(os.getpid(), signal.SIGKILL)")
    set_manifest(folder, "01_killed.ipynb")
    with pytest.raises(UserError, match="01_killed.ipynb: its Python process was killed"):
        pipeline.run_all(pipeline.parse([]), folder)


def test_unknown_parameter_and_wrong_type_are_errors(folder):
    path = write_notebook(folder / "03_x.ipynb", parameters='PRESET = "mini"\nRATE: float = 0.5\n')
    notebooks.check_parameters(path, {"PRESET": "paper", "RATE": 1})
    with pytest.raises(UserError, match="no parameter 'PRESETT'; it has PRESET, RATE"):
        notebooks.check_parameters(path, {"PRESETT": "mini"})
    with pytest.raises(UserError, match="RATE = 'fast' must be of type float"):
        notebooks.check_parameters(path, {"RATE": "fast"})
    with pytest.raises(UserError, match="no chosen notebook has this parameter"):
        pipeline.extra_parameters(["SPEED=1"], [path])
    with pytest.raises(UserError, match="not of type float"):
        pipeline.extra_parameters(["RATE=fast"], [path])
    assert pipeline.extra_parameters(["RATE=2"], [path]) == {path: {"RATE": 2.0}}


def test_selection_by_number_and_name(folder):
    paths = [folder / name for name in ("01_play.ipynb", "03_figure3.ipynb", "10_more.ipynb")]
    assert notebooks.select(paths, None) == paths
    assert notebooks.select(paths, "10, 3") == [paths[1], paths[2]]
    assert notebooks.select(paths, "play") == notebooks.select(paths, "01_play.ipynb") == paths[:1]
    with pytest.raises(UserError, match="'04' matches no notebook; there are 01_play"):
        notebooks.select(paths, "01,04")
    with pytest.raises(UserError, match="--only is empty"):
        notebooks.select(paths, ",")


def test_broken_manifest_and_notebook(folder):
    with pytest.raises(UserError, match="manifest.txt is missing"):
        notebooks.read_manifest(folder)
    set_manifest(folder, "01_gone.ipynb")
    with pytest.raises(UserError, match="01_gone.ipynb, which is not in"):
        notebooks.read_manifest(folder)
    broken = folder / "02_broken.ipynb"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is not a notebook"):
        notebooks.declared_parameters(broken)
    untagged = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("A = 1")])
    broken.write_text(json.dumps(untagged), encoding="utf-8")
    with pytest.raises(UserError, match="has 0 cells tagged 'parameters'"):
        notebooks.declared_parameters(broken)


@pytest.mark.parametrize(("flags", "culprit"), [
    (["--n", "0"], "'0'"), (["--n", "-1"], "--n"), (["--n", "many"], "'many'"),
    (["--n", "1.5"], "'1.5'"), (["--candidates", "0"], "--candidates"),
    (["--seed", "-2"], "--seed"), (["--datset", "x"], "--datset"), (["--n"], "--n"),
])
def test_wrong_flags_are_one_line(flags, culprit):
    with pytest.raises(UserError) as caught:
        pipeline.parse(flags)
    assert culprit in str(caught.value) and "\n" not in str(caught.value)


def test_lines_of_a_notebook_are_set_in_as_they_come():
    out = io.StringIO()
    stream = notebooks.Indented(out, prefix="> ")
    for piece in ("\r10 %", "\r20 %", "\r20 %", "\n", "a\nb\n", ""):
        stream.write(piece)
    assert out.getvalue() == "\n> 10 %\n> 20 %\n> a\n> b\n" and stream.used


def test_surroundings_are_put_back(monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", "mine")
    monkeypatch.delenv("JUPYTER_RUNTIME_DIR", raising=False)
    with notebooks.kernel_surroundings() as runtime:
        assert os.environ["JUPYTER_RUNTIME_DIR"] == runtime and len(runtime) < 60
    assert os.environ["IPYTHONDIR"] == "mine" and "JUPYTER_RUNTIME_DIR" not in os.environ


def test_durations():
    assert pipeline.duration(4.24) == "4.2 s" and pipeline.duration(187) == "3 min 07 s"
