"""The code keeps to the style that pyproject.toml sets."""

from __future__ import annotations

import subprocess
import sys

from lib.presets import REPO_ROOT


def test_ruff_finds_nothing():
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."],
        cwd=REPO_ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
