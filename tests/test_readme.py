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
