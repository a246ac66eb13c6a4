"""Own images and texts through the run command, from another folder, to the summary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from lib import run
from lib.base import ROOT

BOOK = sorted((ROOT / "data" / "picturebook" / "coco" / "images").glob("*.png"))
CAPTIONS = ["a red owl on a beach", "two white dogs in the snow", "a boat and a tree in a meadow"]


def images(folder: Path, n: int, captions: bool = False) -> None:
    """Put n images into a folder, with captions on request."""
    folder.mkdir(parents=True)
    for path in BOOK[:n]:
        shutil.copy(path, folder)
    if captions:
        known = {path.name: CAPTIONS[: 1 + k % 3] for k, path in enumerate(BOOK[:n])}
        (folder / "captions.json").write_text(json.dumps(known))


def call(caller: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the command as if it were called from a folder."""
    command = [sys.executable, "-m", "lib.run", "--candidates", "2", *flags]
    surroundings = os.environ | {"COMPENDIUM_CALLER": str(caller)}
    return subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)


def whole(caller: Path, *flags: str) -> tuple[str, list[Path]]:
    """Run the command to its end; return its output and the executed notebooks."""
    done = call(caller, *flags)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    (folder,) = (caller / "figures").iterdir()
    assert (folder / "index.html").is_file()
    return done.stdout, sorted(folder.glob("notebooks/*.ipynb"))


def test_images_without_captions_run_to_the_summary(tmp_path):
    images(tmp_path / "my images", 3)
    out, executed = whole(tmp_path, "--dataset", "folder:./my images/")
    assert len(executed) == len(run.select(""))
    assert "my images: 3 images, 0 captions" in out
    assert out.count("skipped: ") == 1 and "has no captions, which text reconstruction starts from" in out
    assert "the mini models know only the objects of their picture book" in out


def test_texts_run_to_the_summary(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    out, executed = whole(tmp_path, "--dataset", "texts:prompts.txt")
    assert len(executed) == len(run.select(""))
    assert out.count("skipped: ") == 1 and "has no images, which image reconstruction starts from" in out


def test_several_own_folders_of_one_name_in_a_preset(tmp_path):
    images(tmp_path / "a" / "set", 3, captions=True)
    images(tmp_path / "b" / "set", 6, captions=True)
    (tmp_path / "mine.toml").write_text('base = "mini"\ndatasets = ["folder:a/set", "folder:b/set"]\n')
    _, executed = whole(tmp_path, "--preset", "mine.toml", "--only", "01,02,03,05,90")
    assert len(executed) == 5
    assert "set (2)" in nbformat.writes(nbformat.read(executed[0], 4))


def test_words_that_the_mini_models_do_not_know_are_named(tmp_path):
    (tmp_path / "prompts.txt").write_text("a zebra on a bicycle", encoding="utf-8")
    done = call(tmp_path, "--dataset", "texts:prompts.txt", "--only", "02")
    assert "zebra" in done.stdout and "bicycle" in done.stdout
