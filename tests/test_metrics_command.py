"""The metrics command: files of every form, ids of every form, document frequencies, and one line for bad input."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from lib.base import ROOT
from lib.metrics.__main__ import main

FAST = "bleu,cider,cider_d,rouge_l"
REFERENCES = {"1": ["a cat on a mat", "the cat sits"], "2": ["a dog runs"], "3": ["a red boat"]}
CANDIDATES = [
    {"image_id": 1, "caption": 'a cat\nsits, "here"'},
    {"image_id": 1, "caption": "a dog"},
    {"image_id": 2, "caption": "a dog runs"},
]


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def score(folder: Path, candidates: object, references: object, *options: str) -> int:
    """Run ``score`` on these contents (a text is CSV) with all its files in one folder."""
    names = [f"{name}.{'csv' if isinstance(content, str) else 'json'}"
             for name, content in (("candidates", candidates), ("references", references))]  # fmt: skip
    return main([
        "score", write(folder / names[0], candidates), write(folder / names[1], references),
        "--out", str(folder / "scores.csv"), *(options or ("--metrics", FAST)),
    ])  # fmt: skip


def scores(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "scores.csv").drop(columns=["image_id", "caption"])


def test_it_prints_a_table_and_writes_a_row_a_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(tmp_path, CANDIDATES, REFERENCES) == 0
    shown = capsys.readouterr().out
    names = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr", "CIDEr-D", "ROUGE-L"]
    assert [line.split()[0] for line in shown.splitlines()[1:8]] == names
    assert "1 images of" in shown and "times 100" in shown
    table = pd.read_csv(tmp_path / "scores.csv")
    assert table["candidate"].tolist() == [0, 1, 0] and table["caption"][0] == 'a cat sits, "here"'
    assert table["rouge_l"][2] == 1
    assert score(tmp_path, CANDIDATES, REFERENCES, "--metrics", FAST, "--out", str(tmp_path / "scores.json")) == 0
    rows = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert [row["rouge_l"] for row in rows] == pytest.approx(table["rouge_l"].tolist(), abs=1e-14)


ANNOTATIONS = [{"image_id": int(item), "id": 0, "caption": c} for item, group in REFERENCES.items() for c in group]
COCO = {"images": [{"id": int(item)} for item in REFERENCES], "annotations": ANNOTATIONS}


@pytest.mark.parametrize("references", [
    COCO, ANNOTATIONS, "\r\n".join(["image_id,caption", *(f'{a["image_id"]},"{a["caption"]}"' for a in ANNOTATIONS)]),
])  # fmt: skip
def test_every_form_of_references_gives_equal_scores(tmp_path: Path, references: object) -> None:
    assert score(tmp_path, CANDIDATES, REFERENCES) == 0
    plain = (tmp_path / "scores.csv").read_bytes()
    assert score(tmp_path, CANDIDATES, references) == 0
    assert (tmp_path / "scores.csv").read_bytes() == plain
    if isinstance(references, dict):
        packed = tmp_path / "references.json.gz"
        packed.write_bytes(gzip.compress(json.dumps(references).encode()))
        assert main(["score", str(tmp_path / "candidates.json"), str(packed), "--metrics", FAST, "--out",
                     str(tmp_path / "scores.csv")]) == 0  # fmt: skip
        assert (tmp_path / "scores.csv").read_bytes() == plain


@pytest.mark.parametrize("candidates", [
    [{"image_id": 1.0, "caption": "a cat"}, {"image_id": 2.0, "caption": "a dog"}],
    [{"image_id": "000001", "caption": "a cat"}, {"image_id": "000002", "caption": "a dog"}],
    {"1": "a cat", "2": ["a dog"]},
    {"annotations": [{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": "a dog"}]},
    "image_id,caption\n1,a cat\n2,a dog\n", "\ufefffile_name,width,text\n1.0,8,a cat\n2.0,8,a dog",
])  # fmt: skip
def test_every_form_of_candidates_and_ids_gives_equal_scores(tmp_path: Path, candidates: object) -> None:
    assert score(tmp_path, [{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": "a dog"}], REFERENCES) == 0
    plain = scores(tmp_path)
    assert score(tmp_path, candidates, REFERENCES) == 0
    pd.testing.assert_frame_equal(scores(tmp_path), plain)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    for name, content in (("candidates", CANDIDATES), ("references", REFERENCES)):
        (tmp_path / f"{name}.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    files = [str(tmp_path / f"{name}.json") for name in ("candidates", "references")]
    assert main(["score", *files, "--metrics", "bleu", "--out", str(tmp_path / "scores.csv")]) == 0


def test_document_frequencies_are_those_of_the_scored_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidates = {"1": "x y z w", "2": "p q r s"}
    references = {"1": ["x y z v"], "2": ["p q r s"], "3": ["x y z u"], "4": ["x y"], "5": []}
    assert score(tmp_path, candidates, references, "--metrics", "cider") == 0
    assert "document frequencies of CIDEr: the 2 images that are scored" in capsys.readouterr().out
    # two images share no n-gram: all idf equal, the cosines are 3/4, 2/3, 1/2, 0 of 1- to 4-grams
    assert scores(tmp_path)["cider"].tolist() == pytest.approx([10 / 4 * (3 / 4 + 2 / 3 + 1 / 2), 10])
    assert score(tmp_path, candidates, references, "--metrics", "cider", "--document-frequencies", "file") == 0
    assert "the 4 images of" in capsys.readouterr().out
    # of four images three have x, y and "x y", two have z, "y z" and "x y z", one has v and w
    x, z, v = math.log(4 / 3), math.log(4 / 2), math.log(4)
    cosines = [(2 * x**2 + z**2) / (2 * x**2 + z**2 + v**2), (x**2 + z**2) / (x**2 + z**2 + v**2), z**2 / (z**2 + v**2)]
    assert scores(tmp_path)["cider"].tolist() == pytest.approx([10 / 4 * sum(cosines), 10])


def test_what_is_left_out_is_told_and_spoils_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(tmp_path, CANDIDATES, REFERENCES) == 0
    good = scores(tmp_path)
    bad = [*CANDIDATES, {"image_id": 9, "caption": "a cat"}, {"image_id": 2, "caption": None}]
    assert score(tmp_path, bad, {**REFERENCES, "1": [*REFERENCES["1"], "?!"]}) == 0
    shown = capsys.readouterr().out
    assert "2 captions have no or not every score: image 9 is not among the references" in shown
    assert "1 references have no word and are dropped: image 1: '?!'" in shown
    pd.testing.assert_frame_equal(scores(tmp_path)[:3], good)
    assert scores(tmp_path).loc[3:, "bleu1":].isna().all(axis=None)


@pytest.mark.parametrize(("candidates", "references", "options", "message"), [
    ([], REFERENCES, (), "candidates.json holds no caption"),
    (5, REFERENCES, (), "candidates.json: expected captions"),
    ([{"image_id": 1}], REFERENCES, (), "candidates.json, entry 1: needs image_id and caption, has 'image_id'"),
    (CANDIDATES, {"annotations": [{"id": 1, "caption": "a cat"}]}, (), "entry 1: needs image_id and caption"),
    (CANDIDATES, {"1": [5]}, (), "references.json: a caption of image 1 is not a text"),
    (CANDIDATES, {"8": ["a cat"]}, (), "no caption is of an image in"),
    (CANDIDATES, {"8": ["a cat"]}, (), "ids are, for example, '1' here and '8' there"),
    ({"1": "a cat", "01": "a dog"}, REFERENCES, (), "image ids '1' and '01' are the same number"),
    ("1,a cat\n2,a dog", REFERENCES, (), "candidates.csv line 1: the first line must name the columns"),
    ("image_id,caption\n1,a cat\n2,a dog, running", REFERENCES, (), "candidates.csv line 3 has 3 fields"),
    ('image_id,caption\n1,"a cat\n2,a dog\n', REFERENCES, (), "candidates.csv after line 1: unexpected end of data"),
    (CANDIDATES, REFERENCES, ("--metrics", "cidre"), "unknown cidre; choose from bleu, bleu1"),
    (CANDIDATES, REFERENCES, ("--metrics", ","), "none is named; choose from bleu"),
    (CANDIDATES, REFERENCES, ("--metrics", "bleu", "--out", "/nowhere/x.csv"), "/nowhere"),
])  # fmt: skip
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], candidates: object, references: object,
    options: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    assert score(tmp_path, candidates, references, *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_unreadable_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references = write(tmp_path / "references.json", REFERENCES)
    broken = write(tmp_path / "broken.json", '[{"image_id": 1,')
    for path, message in [(tmp_path / "no.json", "cannot be"), (broken, "not valid JSON"), (tmp_path, "cannot be")]:
        assert main(["score", str(path), references]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {path}") and message in said and said.count("\n") == 1


def test_it_is_a_command_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "lib.metrics", "score", str(tmp_path / "no.json"), "x"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
