"""The metrics command: files of every form, ids of every form, document frequencies, and one line for bad input."""

from __future__ import annotations

import gzip
import json
import math
import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

from lib.metrics.__main__ import main

FAST = "bleu,cider,cider_d,rouge_l"
REFERENCES = {"1": ["a cat on a mat", "the cat sits"], "2": ["a dog runs"], "3": ["a red boat"]}
CANDIDATES = [{"image_id": 1, "caption": 'a cat\nsits, "here"'}, {"image_id": 1, "caption": "a dog"},
              {"image_id": 2, "caption": "a dog runs"}]


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions are split here and not by a Java that takes a second to start: no test is about tokens."""
    monkeypatch.setattr("lib.metrics.scores.tokenize",
                        lambda captions: {c: " ".join(re.findall(r"\w+", c.lower())) for c in captions})


def score(folder: Path, candidates: object, references: object, *options: str) -> int:
    """Run ``score`` on these contents (bytes as they are, a text is CSV) with all its files in one folder."""
    files = []
    for name, content in (("candidates", candidates), ("references", references)):
        files.append(folder / f"{name}.{'csv' if isinstance(content, str) else 'json'}")
        raw = content if isinstance(content, str | bytes) else json.dumps(content)
        files[-1].write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return main(["score", *map(str, files), "--out", str(folder / "scores.csv"), *(options or ("--metrics", FAST))])


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


CAPTIONS = [{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": "a dog"}]
ANNOTATIONS = [{"image_id": int(item), "id": 0, "caption": c} for item, group in REFERENCES.items() for c in group]
COCO = {"images": [{"id": int(item)} for item in REFERENCES], "annotations": ANNOTATIONS}


@pytest.mark.parametrize(("candidates", "references"), [
    (CAPTIONS, COCO), (CAPTIONS, ANNOTATIONS),
    (CAPTIONS, "\r\n".join(["image_id,caption", *(f'{a["image_id"]},"{a["caption"]}"' for a in ANNOTATIONS)])),
    ([{"image_id": 1.0, "caption": "a cat"}, {"image_id": 2.0, "caption": "a dog"}], REFERENCES),
    ([{"image_id": "000001", "caption": "a cat"}, {"image_id": "000002", "caption": "a dog"}], REFERENCES),
    ({"1": "a cat", "2": ["a dog"]}, REFERENCES), ({"annotations": CAPTIONS}, REFERENCES),
    ("image_id;caption\n1;a cat\n2;a dog\n", REFERENCES), (json.dumps(CAPTIONS).encode("utf-8-sig"), REFERENCES),
    ("\ufefffile_name,width,text\n1.0,8,a cat\n2.0,8,a dog", REFERENCES),
])
def test_every_form_of_files_and_ids_gives_equal_scores(tmp_path: Path, candidates: object, references: object) -> None:
    assert score(tmp_path, CAPTIONS, REFERENCES) == 0
    plain = scores(tmp_path)
    assert score(tmp_path, candidates, references) == 0
    pd.testing.assert_frame_equal(scores(tmp_path), plain)


def test_json_lines_and_packed_files(tmp_path: Path) -> None:
    assert score(tmp_path, CAPTIONS, REFERENCES) == 0
    plain = (tmp_path / "scores.csv").read_bytes()
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, CAPTIONS)))
    (tmp_path / "r.json.gz").write_bytes(gzip.compress(json.dumps(COCO).encode()))
    assert main(["score", str(tmp_path / "c.jsonl"), str(tmp_path / "r.json.gz"), "--metrics", FAST, "--out",
                 str(tmp_path / "scores.csv")]) == 0
    assert (tmp_path / "scores.csv").read_bytes() == plain


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
    assert score(tmp_path, bad, {**REFERENCES, "1": [*REFERENCES["1"], "?!", None]}) == 0
    shown = capsys.readouterr().out
    assert "2 captions have no or not every score: image 9 is not among the references; image 2: the caption" in shown
    assert "2 references have no word and are dropped: image 1: '?!'" in shown
    pd.testing.assert_frame_equal(scores(tmp_path)[:3], good)
    assert scores(tmp_path).loc[3:, "bleu1":].isna().all(axis=None)


@pytest.mark.parametrize(("candidates", "references", "options", "message"), [
    ([], REFERENCES, (), "candidates.json holds no caption"),
    (5, REFERENCES, (), "candidates.json"),
    (b'[{"image_id": 1,', REFERENCES, (), "candidates.json: Invalid JSON"),
    ([{"image_id": 1}], REFERENCES, (), "candidates.json entry 1.captions: Field required (given: {'image_id': 1})"),
    (CANDIDATES, {"annotations": [{"id": 1, "caption": "a cat"}]}, (), "references.json entry 1.image_id: Field req"),
    (CANDIDATES, {"annotations": 5}, (), "references.json.annotations: Input should be a valid list"),
    (CANDIDATES, {"1": [5]}, (), "references.json entry 1.captions.0: Input should be a valid string (given: 5)"),
    (CANDIDATES, {"8": ["a cat"]}, (), "no caption is of an image in"),
    (CANDIDATES, {"8": ["a cat"]}, (), "ids are, for example, '1' here and '8' there"),
    ({"1": "a cat", "01": "a dog"}, REFERENCES, (), "image ids '1' and '01' are the same number"),
    ("1,a cat\n2,a dog", REFERENCES, (), "candidates.csv line 1 needs a column file_name (or image_id)"),
    (CANDIDATES, REFERENCES, ("--metrics", "cidre"), "unknown cidre; choose from bleu, bleu1"),
    (CANDIDATES, REFERENCES, ("--metrics", ","), "none is named; choose from bleu"),
    (CANDIDATES, REFERENCES, ("--metrics", "bleu", "--out", "/nowhere/x.csv"), "/nowhere"),
])
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], candidates: object, references: object,
    options: tuple[str, ...], message: str,
) -> None:
    assert score(tmp_path, candidates, references, *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_it_is_a_command_and_says_what_an_absent_file_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, what in ((tmp_path / "no.json", "is absent: check the path"), (tmp_path, "is a folder: check the path")):
        monkeypatch.setattr("sys.argv", ["lib.metrics", "score", str(path), "x"])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_module("lib.metrics", run_name="__main__")
        assert capsys.readouterr().err == f"error: {path} {what}\n"
