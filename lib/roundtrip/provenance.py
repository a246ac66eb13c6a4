"""Where a result comes from: commit, versions, machine. Never keys, environment variables or paths of this machine."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from functools import lru_cache
from typing import Any

from lib.base import ROOT

PACKAGES = ("torch", "transformers", "diffusers", "numpy", "scipy", "pillow", "pyarrow", "pandas", "pycocoevalcap")
# Uncommitted changes here make a result one of a changed program; figures and runs do not.
CODE = ("lib", "notebooks", "data/models", "data/picturebook", "data/presets", "requirements.lock")


def _git(*arguments: str) -> str | None:
    """What git answers; None without git or outside a checkout."""
    with suppress(OSError):
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None
    return None


@lru_cache(maxsize=1)
def collect() -> dict[str, Any]:
    """The program's commit, whether its code was changed since (None where unknown), versions and system."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", *CODE)
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"commit": commit, "dirty": None if changes is None else bool(changes), "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}", "versions": versions}
