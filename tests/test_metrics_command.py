"""The command line: scoring files, the self-check, and one clear line for each bad input."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import lib
from lib.scoring.command import main
from lib.scoring.selfcheck import EXAMPLE

ROOT = Path(lib.__file__).parent.parent
FAST = "bleu,cider,cider_d,rouge_l"
REFERENCES = {"1": ["a cat on a mat", "the cat sits"], "2": ["a dog runs"], "3": ["a red boat"]}
CANDIDATES = [
    {"image_id": 1, "caption": "a cat\nsits, \"here\""},
    {"image_id": 1, "caption": "a dog"},
    {"image_id": 2, "caption": "a dog runs"},
]


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def score(folder: Path, candidates: object, references: object, *options: str) -> int:
    """Run ``score`` on these contents with all its files in one folder."""
    return main([
        "score", write(folder / "candidates.json", candidates),
        write(folder / "references.json", references),
        "--out", str(folder / "scores.csv"), "--cache", str(folder / "cache"),
        *(options or ("--metrics", FAST)),
    ])


def test_it_prints_a_table_and_writes_a_line_a_caption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(tmp_path, CANDIDATES, REFERENCES) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:8]] == [
        "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr", "CIDEr-D", "ROUGE-L",
    ]
    assert "1 images have references but no candidate" in shown
    assert len((tmp_path / "scores.csv").read_text(encoding="utf-8").splitlines()) == 4
    table = pd.read_csv(tmp_path / "scores.csv")
    assert table["candidate"].tolist() == [0, 1, 0]
    assert table["caption"][0] == 'a cat sits, "here"'
    assert table["rouge_l"][2] == 1


def test_both_reference_formats_give_equal_scores(tmp_path: Path) -> None:
    coco = {
        "images": [{"id": int(item)} for item in REFERENCES],
        "annotations": [
            {"image_id": int(item), "id": 0, "caption": caption}
            for item, captions in REFERENCES.items() for caption in captions
        ],
    }
    assert score(tmp_path, CANDIDATES, REFERENCES) == 0
    plain = (tmp_path / "scores.csv").read_bytes()
    assert score(tmp_path, CANDIDATES, coco) == 0
    assert (tmp_path / "scores.csv").read_bytes() == plain
    packed = tmp_path / "references.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(coco).encode()))
    options = ["--metrics", FAST, "--out", str(tmp_path / "scores.csv")]
    files = [str(tmp_path / "candidates.json"), str(packed)]
    assert main(["score", *files, *options, "--cache", str(tmp_path / "cache")]) == 0
    assert (tmp_path / "scores.csv").read_bytes() == plain


def test_bad_rows_are_told_and_spoil_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [*CANDIDATES, {"image_id": 9, "caption": "a cat"}, {"image_id": 2, "caption": None}]
    assert score(tmp_path, CANDIDATES, REFERENCES) == 0
    good = pd.read_csv(tmp_path / "scores.csv")
    assert score(tmp_path, bad, REFERENCES) == 0
    assert "2 captions have no score, the first: item 9: not among" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "scores.csv")
    pd.testing.assert_frame_equal(table[:3], good)
    assert table.loc[3:, "bleu1":].isna().all(axis=None)


@pytest.mark.parametrize(("candidates", "references", "options", "message"), [
    ([], REFERENCES, (), "candidates.json: expected a list"),
    ({"1": "a cat"}, REFERENCES, (), "candidates.json: expected a list"),
    ([{"image_id": 1}], REFERENCES, (), "candidates.json: entry 0 needs an image_id"),
    (CANDIDATES, {}, (), "references.json: expected COCO captions"),
    (CANDIDATES, {"1": "a cat"}, (), "references of '1' are not a list"),
    (CANDIDATES, {"annotations": [{"image_id": 1}]}, (), "annotation 0 has no caption"),
    (CANDIDATES, {"annotations": []}, (), "holds no caption at all"),
    (CANDIDATES, {"8": ["a cat"]}, (), "none of its 2 image ids is in"),
    (CANDIDATES, REFERENCES, ("--metrics", "cidre"), "unknown cidre; choose from bleu1"),
    (CANDIDATES, REFERENCES, ("--metrics", ","), "name at least one of bleu"),
    (CANDIDATES, REFERENCES, ("--metrics", FAST, "--out", "/nowhere/x.csv"), "cannot be written"),
])
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], candidates: object, references: object,
    options: tuple[str, ...], message: str,
) -> None:
    assert score(tmp_path, candidates, references, *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_unreadable_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references = write(tmp_path / "references.json", REFERENCES)
    broken = tmp_path / "broken.json"
    broken.write_text('[{"image_id": 1,')
    for path, message in [(tmp_path / "no.json", "cannot be read"), (broken, "not valid JSON"),
                          (tmp_path, "cannot be read")]:
        assert main(["score", str(path), references]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {path}") and message in said and said.count("\n") == 1


def test_the_check_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    assert "check passed" in said and said.count(" ok ") == 9


def test_it_is_a_command_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lib.metrics", "score", str(tmp_path / "no.json"), "x"], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_bundled_example_has_every_expected_value() -> None:
    example = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    assert example["candidates"].keys() == example["references"].keys()
    assert len(example["expected"]) == 9 and "spice" not in example["expected"]
