"""Own images and texts through the run command, from another folder and by an own preset, to the summary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import nbformat

from lib import run
from lib.base import ROOT

BOOK = sorted((ROOT / "data" / "picturebook" / "coco" / "images").glob("*.png"))
CAPTIONS = ["a red owl on a beach", "two white dogs in the snow", "a zebra on a bicycle"]


def test_own_data_run_to_the_summary(tmp_path):
    """Two folders of one name, one of them without captions, and a text file: what lacks a half is skipped and named."""
    for folder, paths in (("a b", BOOK[:3]), ("b", BOOK[3:9])):
        (tmp_path / folder / "set").mkdir(parents=True)
        for path in paths:
            shutil.copy(path, tmp_path / folder / "set")
    (tmp_path / "b" / "set" / "captions.json").write_text(json.dumps({path.name: CAPTIONS[:2] for path in BOOK[3:9]}))
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    (tmp_path / "mine.toml").write_text(
        'base = "mini"\ndatasets = ["folder:./a b/set/", "folder:b/set", "texts:prompts.txt"]\n')
    command = [sys.executable, "-m", "lib.run", "--candidates", "2", "--preset", "mine.toml",
               "--param", "REPEATS=3", "--param", "ROUNDS=3"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"COMPENDIUM_CALLER": str(tmp_path)}, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    (folder,) = (tmp_path / "figures").iterdir()
    executed = sorted(folder.glob("notebooks/*.ipynb"))
    assert (folder / "index.html").is_file() and len(executed) == len(run.select(""))
    assert "Warning" not in (folder / "index.html").read_text(encoding="utf-8")
    assert "set (2)" in nbformat.writes(nbformat.read(executed[0], 4))
    for told in ("set: 3 images, 0 captions", "has no captions, which text reconstruction starts from", "zebra, bicycle",
                 "has no images, which image reconstruction starts from",
                 "the mini models know only the objects of their picture book"):
        assert told in done.stdout, told
    assert done.stdout.count("skipped: ") == 2
