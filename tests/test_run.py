"""The run command with the real mini models and a few sources, in surroundings that must not leak in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from lib import run
from lib.base import ROOT

FLAGS = ["--n", "6", "--candidates", "3", "--dataset", "picturebook-coco"]
ONLY = "01,02,03,04,05,13,90"  # all others: test_run_own_data


def hostile(place: Path) -> dict[str, str]:
    """An environment in which a careless run goes wrong: a foreign kernel, other plot settings, a long TMPDIR."""
    kernel = place / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "foreign", "language": "python"}))
    (place / "matplotlibrc").write_text("text.usetex: True\nfigure.autolayout: True\n")
    long = place / ("long-" * 20)
    long.mkdir()
    return os.environ | {
        "JUPYTER_PATH": str(kernel.parents[2]), "MPLBACKEND": "agg", "MATPLOTLIBRC": str(place / "matplotlibrc"),
        "TMPDIR": str(long), "COMPENDIUM_DEVICE": "", "COCO_DIR": "", "COMPENDIUM_CALLER": str(place),
        "COMPENDIUM_RUNS": "runs", "COMPENDIUM_FIGURES": "~/figures", "HOME": str(place)}


def command(*flags: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lib.run", *flags], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The place and the output of a whole run of one dataset."""
    place = tmp_path_factory.mktemp("whole")
    return place, command(*FLAGS, "--only", ONLY, "--param", "ROUNDS=3", env=hostile(place))


def test_the_command_ends_with_what_to_read_first(whole):
    place, done = whole
    assert done.returncode == 0, done.stdout + done.stderr
    folder = place / "figures" / "mini--picturebook-coco--n6k3s0"
    assert f"read first: {folder / 'index.html'}\n" in done.stdout
    assert done.stderr.strip() == "" and "KeyboardInterrupt" not in done.stdout
    assert "mini models know" not in done.stdout  # the picture book is what they know
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "<img" in page and 'src="http' not in page and "import(" not in page and str(ROOT) not in page
    assert {path.stem for path in folder.glob("*.pdf")} >= {"figure3", "figure4", "figure13_telephone", "table1_gains"}


def test_executed_notebooks_hold_images_and_no_error(whole):
    executed = sorted((whole[0] / "figures").glob("*/notebooks/*.ipynb"))
    assert [path.name for path in executed] == [path.name for path in run.select(ONLY)]
    for path in executed:
        outputs = [o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", [])]
        assert not [o for o in outputs if o.output_type == "error"]
        assert any("image/png" in o.get("data", {}) for o in outputs), path.name


def test_rows_make_sense_and_by_hand_is_what_is_stored(whole):
    """The captions and similarities that notebooks 01 and 02 show for their first source are those of the rows."""
    executed = whole[0] / "figures" / "mini--picturebook-coco--n6k3s0" / "notebooks"
    for task, name, said in (("image", "01_image", "message"), ("text", "02_text", "reconstruction")):
        rows = pd.read_parquet(next(whole[0].glob(f"runs/*--{task}--*/rows.parquet")))
        best = rows.groupby("item")["similarity"].transform("max")
        assert len(rows) == 18 and (rows.loc[rows["selected"], "similarity"] == best[rows["selected"]]).all()
        assert rows["similarity"].mean() > 0.3 and rows["sem_f"].mean() > 0.4
        shown = (executed / f"{name}_reconstruction.ipynb").read_text(encoding="utf-8")
        for row in rows[rows["item"] == rows["item"].iloc[0]].to_dict("records"):
            assert row[said] in shown and f"{row['similarity']:.3f}" in shown


def test_a_second_run_reuses_rows_and_takes_other_parameters(whole, tmp_path):
    place, _ = whole
    env = os.environ | {"COMPENDIUM_RUNS": str(place / "runs"), "COMPENDIUM_FIGURES": str(tmp_path)}
    kept = {path: path.stat().st_mtime_ns for path in place.glob("runs/*/rows.parquet")}
    done = command(*FLAGS, "--only", "1,04", "--param", "BINS=3", "--param", "N_BY_HAND=0", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    executed = nbformat.read(next(tmp_path.glob("*/notebooks/04*.ipynb")), 4)
    assert any("BINS = 3" in cell.source and "injected-parameters" in cell.metadata.tags for cell in executed.cells
               if "tags" in cell.metadata)


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Executes code cells as a notebook with given parameters; returns why it stopped and the executed notebook."""

    def executed(*sources: str, **parameters: object) -> tuple[str, nbformat.NotebookNode]:
        cells = [nbformat.v4.new_code_cell(source) for source in ("A = 1", *sources)]
        cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "01.ipynb")
        short = Path(f"/tmp/nb-{os.getpid()}")
        short.mkdir(exist_ok=True)
        trouble = run.execute(tmp_path / "01.ipynb", tmp_path / "done" / "01.ipynb", parameters, short)
        return trouble, nbformat.read(tmp_path / "done" / "01.ipynb", 4)

    return executed


def test_a_user_error_is_one_line_and_the_notebook_is_kept(execute):
    trouble, kept = execute("from lib.base import UserError", "raise UserError('photo.png is cut off: replace it')")
    assert trouble == "photo.png is cut off: replace it"
    assert kept.cells[-1].outputs[0].ename == "UserError"


def test_any_other_error_names_the_executed_notebook(execute, tmp_path):
    trouble, _ = execute("1 / 0")
    assert trouble == f"ZeroDivisionError: division by zero (traceback in {tmp_path / 'done' / '01.ipynb'})"


def test_a_killed_kernel_is_one_line(execute):
    trouble, _ = execute("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert trouble.startswith("its process was killed")


@pytest.mark.parametrize(("flags", "told"), [
    ("--n -1", "--n -1: give a whole number from 1 on"),
    ("--candidates 0", "--candidates 0: give a whole number from 1 on"),
    ("--n 2.5", "invalid int value: '2.5'"),
    ("--datset x", "unrecognized arguments: --datset x; ./run_all.sh --help lists the flags"),
    ("--only 03,77", "--only 77: no such notebook; there are 01_image_reconstruction, 02"),
    ("--param BINN=3", "--param BINN=3: no chosen notebook has a parameter BINN; there are PRESET, "),
    ("--only 01 --param BINS=3", "no chosen notebook has a parameter BINS"),
    ("--param BINS=few", "--param BINS=few: must be of type int, such as"),
    ("--preset papr", "unknown preset 'papr': choose one of"),
    ("--preset no.toml", "no.toml cannot be read"),
    ("--dataset koko", "unknown dataset 'koko': choose one of picturebook-coco"),
    ("--dataset folder:nowhere", "nowhere does not exist: check the path"),
])
def test_a_mistake_is_one_line(flags, told, monkeypatch, capsys):
    monkeypatch.setattr(run, "neutral_surroundings", lambda folder: None)
    monkeypatch.setattr(run, "end_on_signals", lambda *_: None)
    assert run.main(flags.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and told in err and err.count("\n") == 1 and not out


def test_notebooks_are_chosen_by_number_and_name():
    names = [path.stem for path in run.select("")]
    assert names[0] == "01_image_reconstruction" and names[-1] == "90_summary" and "00_explore" not in names
    assert run.select("4, 02_text_reconstruction,03_figure3_reconstruction_rank.ipynb") == run.select("02,03,04")
    assert [path.stem[:2] for path in run.select("2,03")] == ["02", "03"]


def test_parameters_have_the_type_of_their_defaults():
    known = {"BINS": 8, "RATE": 0.5, "NAMES": ["a"], "SHOW": True, "SCORE": "cider"}
    given = run.extra_parameters(["BINS=5", "RATE=2", "NAMES=b,c", "SHOW=false", "SCORE=5"], known)
    assert given == {"BINS": 5, "RATE": 2.0, "NAMES": ["b", "c"], "SHOW": False, "SCORE": "5"}
