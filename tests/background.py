"""The run command at work beside the tests: all notebooks at a small size, into a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lib.presets import REPO_ROOT

N_SOURCES, N_CANDIDATES = 12, 4
SIZE = ("--n", str(N_SOURCES), "--candidates", str(N_CANDIDATES))


def places(root: Path) -> dict[str, str]:
    """The environment variables that send runs and figures to a folder."""
    return {"COMPENDIUM_RUNS": str(root / "runs"), "COMPENDIUM_FIGURES": str(root / "figures")}


@dataclass(frozen=True)
class Playing:
    """The command, its folder, and there its log."""

    root: Path
    process: subprocess.Popen

    @classmethod
    def start(cls, root: Path) -> Playing:
        """Start it, politely: the tests go on beside it."""
        with (root / "first.log").open("wb") as log:
            return cls(root, subprocess.Popen(
                ["nice", "-n", "5", sys.executable, "-m", "lib.pipeline", *SIZE], cwd=REPO_ROOT,
                env={**os.environ, **places(root)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT))

    def finish(self) -> Path:
        """Wait for its end; returns the folder, or fails with what it has said."""
        status = self.process.wait()
        assert status == 0, (self.root / "first.log").read_text(encoding="utf-8")[-3000:]
        return self.root

    def stop(self) -> None:
        """End it, if the tests end before it: as Ctrl-C does, its notebook's process too."""
        self.process.terminate()
        self.process.wait()
