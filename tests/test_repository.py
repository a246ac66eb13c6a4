"""What the repository promises by its files: commands, pins, notebooks as committed, README, style."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lib import run
from lib.base import ROOT
from lib.roundtrip import open_runs

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMON = {"PRESET": "mini", "DATASET": "all", "N_SOURCES": 0, "N_CANDIDATES": 0, "SEED": 0}


# the commands


def test_help_needs_nothing_installed(tmp_path):
    (tmp_path / "lib").mkdir()
    for name in ("run_all.sh", "requirements.lock", "lib/__init__.py", "lib/base.py", "lib/run.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    venv.create(tmp_path / "bare", with_pip=False)
    bare = {"PATH": f"{tmp_path / 'bare' / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run([tmp_path / "run_all.sh", "--help"], env=bare, capture_output=True, text=True, check=True)
    assert "--dataset folder:DIR" in done.stdout and not (tmp_path / ".venv").exists()


def test_the_active_environment_is_used():
    pins = re.findall(r"(?m)^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"))
    have = {name: importlib.metadata.version(name).partition("+")[0] for name, _ in pins}
    assert have == dict(pins), "this environment is not the one of requirements.lock"


def test_the_lock_is_what_the_direct_dependencies_need():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pinned = {canonicalize_name(name) for name in re.findall(r"(?m)^([\w.-]+)==", lock)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["test"], "setuptools"]
    queue = [Requirement(text) for text in direct]
    needed, seen = set(), set()
    while queue:
        wanted = queue.pop()
        needed.add(canonicalize_name(wanted.name))
        for extra in {"", *wanted.extras} - {extra for name, extra in seen if name == wanted.name}:
            seen.add((wanted.name, extra))
            below = map(Requirement, importlib.metadata.distribution(wanted.name).requires or [])
            queue += [one for one in below if one.marker is None or one.marker.evaluate({"extra": extra})]
    cuda = re.compile(r"nvidia-|cuda-|triton$")  # torch pins its own, and a CPU build has none
    assert {name for name in needed if not cuda.match(name)} == pinned
    for name in pinned:
        wanted = importlib.metadata.metadata(name)["Requires-Python"] or ""
        assert "3.11.2" in SpecifierSet(wanted), f"{name}: Debian 12 has Python 3.11.2"


# files


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_no_run_writes_into_the_committed_figures(monkeypatch):
    monkeypatch.delenv("COMPENDIUM_FIGURES")
    places = [open_runs(dataset=dataset, seed=seed).figures for dataset in ("all", "picturebook-coco") for seed in (0, 3)]
    assert len({*places, ROOT / "figures" / "mini"}) == 5 and {place.parent for place in places} == {ROOT / "figures"}
    if (ROOT / ".git").exists():
        assert git("check-ignore", *map(str, places)).split() == [str(place) for place in places]


def test_line_ends_stay_as_they_are():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    assert git("check-attr", "eol", "run_all.sh", "tests/run.sh").count("eol: lf") == 2


def test_a_kernel_in_the_notebooks_folder_uses_the_lib_beside_it(tmp_path):
    """Two clones may share an environment: Jupyter starts kernels in notebooks/, where a link leads to its own lib."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").touch()
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "lib", tmp_path / "notebooks" / "lib", follow_symlinks=False)
    done = subprocess.run([sys.executable, "-c", "import lib; print(lib.__file__)"], cwd=tmp_path / "notebooks",
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "notebooks" / "lib" / "__init__.py")


# notebooks and README


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_and_the_common_parameters(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    known = run.declared(path)
    assert {name: known[name] for name in COMMON} == COMMON


def test_the_readme_shows_the_committed_results():
    results = (ROOT / "figures" / "mini" / "results.md").read_text(encoding="utf-8")
    assert f"<!-- results -->\n{results}<!-- end of results -->" in README, "copy figures/mini/results.md into it"
    assert len(README.splitlines()) <= 150


def test_what_the_readme_names_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in NOTEBOOKS:
        assert path.name in README
    flags = set(re.findall(r"(?<=\s)--[a-z]+", "\n".join(re.findall(r"(?m)^\./run_all\.sh.*$", README))))
    assert flags <= {f"--{name}" for name in vars(run.parse([]))}


def test_the_committed_notebooks_are_small_and_whole():
    executed = sorted((ROOT / "figures" / "mini" / "notebooks").glob("*.ipynb"))
    assert [path.name for path in executed] == [path.name for path in run.select("")]
    assert sum(path.stat().st_size for path in executed) < 5e6


def test_ruff_finds_nothing():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
