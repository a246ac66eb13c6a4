"""What all tests share: one thread a process, and places of their own instead of the user's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Read when torch is imported. Tests run beside each other, so threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("COMPENDIUM_") or name in ("COCO_DIR", "NOCAPS_DIR")]:
    del os.environ[name]


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the repository's runs or figures."""
    monkeypatch.setenv("COMPENDIUM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COMPENDIUM_FIGURES", str(tmp_path / "figures"))
