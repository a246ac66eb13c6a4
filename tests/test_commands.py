"""The two commands from nothing: choosing or making an environment, help, wrong flags."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lib import environment
from lib.errors import UserError

ROOT = environment.REPO_ROOT
BARE = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}


def call(*command, cwd=ROOT, env=None):
    """Run a command with exactly this environment and return its completed process."""
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


# --- the pins --------------------------------------------------------------------------------

def test_lock_holds_exactly_what_the_direct_dependencies_need():
    pins = environment.read_lock()
    assert not environment.mismatches(pins)
    assert environment.closure(environment.direct_requirements()) == pins


def test_pins_stand_once_and_without_cuda():
    pins = environment.read_lock()
    assert pins["torch"] == pins["torch"].split("+")[0] and "torchvision" not in pins
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert "==" not in environment.PROJECT_FILE.read_text(encoding="utf-8")
    conda = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "==" not in conda and "-r requirements.lock" in conda


def test_every_pin_accepts_the_python_of_debian_12():
    from packaging.specifiers import SpecifierSet
    for name in environment.read_lock():
        needed = importlib.metadata.metadata(name)["Requires-Python"]
        assert needed is None or "3.11.2" in SpecifierSet(needed), name


def test_what_keeps_an_environment_from_being_suitable(tmp_path):
    have = environment.installed_versions()
    assert environment.mismatches({"numpy": have["numpy"]}) == []
    assert environment.mismatches({"numpy": "0.1"}) == [f"numpy {have['numpy']}, pinned 0.1"]
    assert environment.mismatches({"no-such": "1"}) == ["no-such is missing, pinned 1"]
    lock = tmp_path / "requirements.lock"
    lock.write_text("# comment\nA_b.c==1.0  # why\n\n", encoding="utf-8")
    assert environment.read_lock(lock) == {"a-b-c": "1.0"}
    lock.write_text("numpy>=2\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1: 'numpy>=2' is not of the form name==version"):
        environment.read_lock(lock)


def test_the_active_environment_comes_first(tmp_path, monkeypatch):
    active = tmp_path / "active" / "bin" / "python"
    active.parent.mkdir(parents=True)
    active.symlink_to(sys.executable)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "active"))
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "gone"))
    assert next(environment.candidates()) == active


# --- set-up from nothing ---------------------------------------------------------------------

def write_wheel(folder, version):
    """Make the smallest installable wheel, so that set-up is tried without any index."""
    info = f"tiny_pin-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"tiny_pin-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_pin.py", "")
        wheel.writestr(f"{info}/METADATA",
                       f"Metadata-Version: 2.1\nName: tiny-pin\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\n"
                                        "Root-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"tiny_pin.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n"
                                         f"{info}/RECORD,,\n")


def bare_clone(place):
    """A copy of the set-up's own files with a lock of one tiny package, and a bare environment."""
    clone, home = place / "clone", place / "home"
    (clone / "lib").mkdir(parents=True)
    for name in ("lib/__init__.py", "lib/errors.py", "lib/environment.py", ".setup.sh"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    (clone / "requirements.lock").write_text("tiny-pin==1.0\n", encoding="utf-8")
    write_wheel(place / "wheels", "1.0")
    home.mkdir()
    env = {"PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin", "HOME": str(home),
           "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(place / "wheels"),
           "PIP_CONFIG_FILE": os.devnull}
    return clone, env


def choose(clone, env):
    return call("bash", "-c", 'set -euo pipefail; source .setup.sh; choose_environment; echo "$PYTHON"',
                cwd=clone, env=env)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bare clone, its environment variables, and what its first set-up, from nothing, has said."""
    clone, env = bare_clone(tmp_path_factory.mktemp("made"))
    return clone, env, choose(clone, env)


def test_set_up_makes_completes_and_reuses_an_environment(made, tmp_path):
    clone, env, first = made
    python = clone / ".venv" / "bin" / "python"
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(python) and "creating .venv" in first.stderr
    elsewhere = call(str(python), "-c", "import lib, tiny_pin; print(lib.__file__)", cwd=tmp_path)
    assert elsewhere.stdout.strip() == str(clone / "lib" / "__init__.py")

    second = choose(clone, env)
    assert second.stdout.strip() == str(python) and second.stderr == ""

    assert call(str(python), "-m", "pip", "uninstall", "-y", "tiny-pin").returncode == 0
    third = choose(clone, env)
    assert third.returncode == 0 and "creating" not in third.stderr and "1 pinned" in third.stderr


def test_an_installed_cpu_build_is_accepted(tmp_path):
    clone, env = bare_clone(tmp_path)
    own = tmp_path / "own"
    assert call(sys.executable, "-m", "venv", "--without-pip", str(own)).returncode == 0
    write_wheel(tmp_path, "1.0+cpu")
    with zipfile.ZipFile(tmp_path / "tiny_pin-1.0+cpu-py3-none-any.whl") as wheel:
        wheel.extractall(next(own.glob("lib/python*/site-packages")))
    answer = choose(clone, {**env, "VIRTUAL_ENV": str(own)})
    assert answer.stdout.strip() == str(own / "bin" / "python")
    assert not (clone / ".venv").exists()


def test_a_pin_that_cannot_be_had_is_one_clear_line(made):
    clone, env, _ = made
    lock = clone / "requirements.lock"
    before = lock.read_bytes()
    lock.write_text("tiny-pin==2.0\n", encoding="utf-8")
    answer = choose(clone, env)
    lock.write_bytes(before)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.strip().splitlines()[-1].startswith(
        "error: the pinned packages could not be installed")


def test_without_python_the_command_says_so(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(f"/bin/{tool}" if Path(f"/bin/{tool}").exists() else f"/usr/bin/{tool}")
    answer = call("bash", "run_all.sh", "--help", env={"PATH": str(tools)})
    assert answer.returncode == 2 and answer.stderr.startswith("error: no Python 3.11 or newer")


# --- the commands ----------------------------------------------------------------------------

@pytest.fixture
def active():
    """The environment variables of a shell in which the tests' own environment is active."""
    return {**os.environ, "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_help_needs_nothing_installed():
    answer = call("./run_all.sh", "--help",
                  env={**BARE, "PATH": f"{sys.base_prefix}/bin:{BARE['PATH']}"})
    assert answer.returncode == 0, answer.stderr
    for flag in ("--preset", "--dataset", "--n", "--only", "--force", "--candidates", "--seed"):
        assert flag in answer.stdout


@pytest.mark.parametrize(("flags", "culprit"), [
    (["--n", "0"], "'0'"),
    (["--n", "-1"], "--n"),
    (["--n", "ten"], "'ten'"),
    (["--preset", "papr"], "unknown preset 'papr'"),
    (["--preset", "mine.toml"], "mine.toml does not exist"),
    (["--dataset", "koko"], "unknown dataset 'koko'"),
    (["--dataset", "folder:"], "unknown dataset 'folder:'"),
    (["--only", "99"], "'99'"),
    (["--param", "SPEED=1"], "SPEED=1"),
    (["--verbose"], "--verbose"),
])
def test_bad_input_is_one_line_and_exit_2(flags, culprit, active):
    answer = call("./run_all.sh", *flags, env=active)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith("error: ") and culprit in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_paths_in_flags_are_meant_from_where_the_command_is_called(active, tmp_path):
    answer = call(str(ROOT / "run_all.sh"), "--preset", "mine.toml", env=active, cwd=tmp_path)
    assert answer.stderr == f"error: preset file {tmp_path / 'mine.toml'} does not exist: check the path\n"
