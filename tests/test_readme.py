"""The README says what the committed results say, and what it names exists."""

from __future__ import annotations

import re

from lib import readme
from lib.presets import REPO_ROOT

TEXT = readme.README.read_text(encoding="utf-8")


def test_tables_are_those_of_the_committed_results():
    assert readme.rewrite(TEXT) == TEXT, "run python -m lib.readme --write"
    assert len(readme.result_lines()) > 8 and len(readme.model_lines()) > 8


def test_what_it_links_and_runs_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (REPO_ROOT / path).exists(), path
    for path in re.findall(r"^(?:\./)([\w./]+)", TEXT, flags=re.MULTILINE):
        assert (REPO_ROOT / path).exists(), path


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 300


def test_a_greedy_lead_is_told_beside_the_claim(tmp_path):
    (tmp_path / "table1.csv").write_text(
        "dataset,domain,metric,nucleus,selected,likeliest,greedy,oracle\n"
        "picturebook-coco,all,cider,2.0,2.2,2.3,2.4,3.0\npicturebook-coco,all,bleu1,0.1,0.1,0.1,0.1,0.1\n")
    assert readme.greedy_lines(tmp_path) == [
        "- CIDEr, COCO-like: nucleus 200, selected 220, most probable candidate 230, greedy 240, oracle 300."]
    (tmp_path / "table1_rivals.csv").write_text(
        "dataset,rival,score,lead,low,high\n"
        "picturebook-coco,greedy,cider,9.1,2,16\npicturebook-coco,greedy,sem_f,-3,-5,-1\n"
        "picturebook-coco,most probable,cider,4.5,1,8\n")
    _, greedy = readme.greedy_lines(tmp_path)
    assert greedy.startswith("- COCO-like, greedy against selected: CIDEr +9.1 % [+2.0, +16.0]")
    assert greedy.endswith("ahead in CIDEr; yet its captions say less that is true.")
