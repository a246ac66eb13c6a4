"""The Python environment: is the running one suitable, and if none is, make ``.venv``.

Every pin stands once, in ``requirements.lock`` (``requirements-ray.lock`` for what only the engine
"ray" needs); ``pyproject.toml`` names the direct dependencies and what each is for. This module
needs the standard library only, because it runs before anything is installed (``freeze``, for
maintainers, runs afterwards).

    python -m lib.environment setup    # prints the interpreter to use, making .venv if needed
    python -m lib.environment check    # exit 0 if the running interpreter has every pin
    python -m lib.environment freeze   # writes the locks from what is installed
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lib.errors import UserError

REPO_ROOT = Path(__file__).resolve().parent.parent
LOCK_FILE = REPO_ROOT / "requirements.lock"
EXTRA_LOCKS = {"ray": REPO_ROOT / "requirements-ray.lock"}
PROJECT_FILE = REPO_ROOT / "pyproject.toml"
VENV = REPO_ROOT / ".venv"
OLDEST_PYTHON = (3, 11)
LOCK_HEADER = """\
# Everything that runs here, in the exact version it was tested with (Python 3.11).
# The direct dependencies, and what each is for, are named in pyproject.toml.
# Written by `python -m lib.environment freeze`; do not edit by hand.
"""
EXTRA_HEADER = """\
# What the extra '{extra}' of pyproject.toml needs beyond requirements.lock. To install it:
#     .venv/bin/python -m pip install --no-deps -r {file}
# Written by `python -m lib.environment freeze`; do not edit by hand.
"""


# --- the pins --------------------------------------------------------------------------------

def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it: lower case, runs of -_. as one dash."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path = LOCK_FILE) -> dict[str, str]:
    """Return {canonical name: version} of a lock file; UserError for a line that is no exact pin."""
    pins: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!_+-]+)", text)
        if match is None:
            raise UserError(f"{path.name} line {number}: {text!r} is not of the form name==version")
        pins[canonical(match[1])] = match[2]
    return pins


def installed_versions() -> dict[str, str]:
    """Return {canonical name: version} of the running interpreter, without local labels (+cpu)."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed package leaves a nameless folder behind
            # The first hit on sys.path is the one that would be imported.
            versions.setdefault(canonical(name), distribution.version.split("+")[0])
    return versions


def mismatches(pins: dict[str, str]) -> list[str]:
    """Say what keeps the running interpreter from being suitable; empty if nothing does."""
    if sys.version_info < OLDEST_PYTHON:
        return [f"Python {sys.version_info[0]}.{sys.version_info[1]} is older than 3.11"]
    have = installed_versions()
    return [f"{name} {have.get(name, 'is missing')}, pinned {version}"
            for name, version in pins.items() if have.get(name) != version]


# --- choosing and making an environment ------------------------------------------------------

def candidates() -> Iterator[Path]:
    """Interpreters to try, in order: the active environment, the one on the path, ``.venv``."""
    seen: set[Path] = set()
    folders = [os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX")]
    paths = [Path(folder) / "bin" / "python" for folder in folders if folder]
    paths += [Path(found) for found in map(shutil.which, ("python", "python3")) if found]
    for path in [*paths, VENV / "bin" / "python"]:
        if path not in seen and path.exists():
            seen.add(path)
            yield path


def is_suitable(python: Path) -> bool:
    """Whether an interpreter has every pin; asked of the interpreter itself."""
    if python == Path(sys.executable):
        return not mismatches(read_lock())
    answer = subprocess.run([python, "-m", "lib.environment", "check"], cwd=REPO_ROOT,
                            capture_output=True, check=False)
    return answer.returncode == 0


def make_venv() -> Path:
    """Create or complete ``.venv`` with every pin and return its interpreter.

    What is already there in the pinned version stays, so a CPU build of torch that was put into
    ``.venv`` beforehand is kept. An interrupted set-up is completed by the next call.
    """
    python = VENV / "bin" / "python"
    if not python.exists():
        say(f"creating .venv with Python {sys.version.split()[0]}")
        run([sys.executable, "-m", "venv", "--clear", str(VENV)],
            "a virtual environment could not be made: install Python's venv module "
            "(Debian and Ubuntu: apt-get install python3-venv)")
    say(f"installing {len(read_lock())} pinned packages into .venv (once; a few hundred MB, "
        "and on Linux some GB more if the package index serves torch with its CUDA libraries)")
    run([str(python), "-m", "pip", "install", "--disable-pip-version-check", "--only-binary=:all:",
         "-r", str(LOCK_FILE)],
        "the pinned packages could not be installed (pip's message is above): check the network "
        f"and the disk; Python 3.11 has a wheel of every pin, this is {sys.version.split()[0]}")
    link_repository(python)
    if not is_suitable(python):
        raise UserError(f"{VENV} still lacks some pins after installing: delete it and run again")
    return python


def link_repository(python: Path) -> None:
    """Let ``import lib`` work from any folder of this environment (Jupyter starts in notebooks/)."""
    answer = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                            capture_output=True, text=True, check=True)
    (Path(answer.stdout.strip()) / "compendium.pth").write_text(f"{REPO_ROOT}\n", encoding="utf-8")


def choose() -> Path:
    """Return a suitable interpreter, making ``.venv`` if there is none."""
    for python in candidates():
        if is_suitable(python):
            return python
    with LOCK_FILE.open(encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once: the second waits, then finds it made
        python = VENV / "bin" / "python"
        return python if python.exists() and is_suitable(python) else make_venv()


def run(command: list[str], failure: str) -> None:
    """Run a command with its output on stderr; UserError with ``failure`` if it fails."""
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise UserError(failure)


def say(message: str) -> None:
    """Progress goes to stderr: stdout carries the answer alone."""
    print(message, file=sys.stderr, flush=True)


# --- writing the lock ------------------------------------------------------------------------

def direct_requirements(extra: str = "test") -> list[str]:
    """The direct dependencies of ``pyproject.toml``, those of an extra included."""
    import tomllib
    project = tomllib.loads(PROJECT_FILE.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"][extra]]


def closure(direct: list[str]) -> dict[str, str]:
    """Return {name: version} of the direct dependencies and all that they require, as installed.

    CUDA libraries are left out: torch pins its own, and a CPU build has none.
    """
    from packaging.requirements import Requirement
    found: dict[str, str] = {}
    queue = [Requirement(text) for text in direct]
    visited: set[tuple[str, str]] = set()
    while queue:
        requirement = queue.pop()
        name = canonical(requirement.name)
        extras = requirement.extras or {""}
        distribution = importlib.metadata.distribution(requirement.name)
        found[name] = distribution.version.split("+")[0]
        for extra in extras | {""}:
            if (name, extra) in visited:
                continue
            visited.add((name, extra))
            children = [Requirement(text) for text in distribution.requires or []]
            queue += [child for child in children
                      if (child.marker is None or child.marker.evaluate({"extra": extra}))
                      and not re.match(r"nvidia-|cuda-|triton$", canonical(child.name))]
    return found


def extra_pins(extra: str) -> dict[str, str]:
    """{name: version} of what an extra needs and the lock file has not."""
    pins = closure(direct_requirements())
    return {name: version for name, version in closure(direct_requirements(extra)).items()
            if name not in pins}


def freeze() -> None:
    """Write the lock files from the running environment; that of an absent extra stays as it is."""
    _write_lock(LOCK_FILE, LOCK_HEADER, closure(direct_requirements()))
    for extra, path in EXTRA_LOCKS.items():
        try:
            _write_lock(path, EXTRA_HEADER.format(extra=extra, file=path.name), extra_pins(extra))
        except importlib.metadata.PackageNotFoundError as error:
            say(f"{path.name} stays as it is: {error.name} is not installed")


def _write_lock(path: Path, header: str, pins: dict[str, str]) -> None:
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    path.write_text(header + "".join(lines), encoding="utf-8")
    say(f"wrote {path.name}: {len(pins)} pins")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lib.environment", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("setup", "check", "freeze"))
    action = parser.parse_args(arguments).action
    try:
        if action == "setup":
            print(choose())
        elif action == "freeze":
            freeze()
        else:
            problems = mismatches(read_lock())
            print("\n".join(problems))
            return int(bool(problems))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
