"""``python -m lib.metrics check``: does every metric work here, and where does it come from?"""

from __future__ import annotations

import json
import math
import tempfile
from importlib import metadata
from pathlib import Path

from lib.metrics import LABELS, METRICS, Corpus, score_all
from lib.scoring import spice_official
from lib.scoring.java import Java, find_java

EXAMPLE = Path(__file__).with_name("example.json")
TOLERANCE = 1e-6  # rounding of the kept values, and the last digits of floating point
OPTIONAL = ("spice",)  # may be missing, as its parser cannot be shipped


def run() -> int:
    """Score the bundled example, print a table; 0 if all is as expected, else 1."""
    example = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    java = find_java()
    print(f"{java}: {java.executable}")
    with tempfile.TemporaryDirectory() as cache:
        corpus = Corpus.build(example["references"], cache)
        ids, captions = zip(*example["candidates"].items(), strict=False)
        table, values = score_all(ids, captions, corpus)
        missing = table.attrs["missing"]
    wrong = []
    print(f"{'metric':<15}{'value':>9}  {'state':<11}source")
    for name in METRICS:
        state = _state(name, values[name], example["expected"])
        shown = "-" if math.isnan(values[name]) else f"{values[name]:.4f}"
        print(f"{LABELS[name]:<15}{shown:>9}  {state:<11}{source(name, java)}")
        if state == "WRONG" or (state == "missing" and name not in OPTIONAL):
            wrong.append(LABELS[name])
    for name, reason in missing.items():
        print(f"{LABELS[name]} is missing: {reason}")
    print(f"check failed: {', '.join(wrong)}" if wrong else "check passed")
    return 1 if wrong else 0


def _state(name: str, value: float, expected: dict[str, float]) -> str:
    """How a value compares with the one that the example's makers had."""
    if math.isnan(value):
        return "missing"
    if name not in expected:
        return "unchecked"
    return "ok" if abs(value - expected[name]) <= TOLERANCE else "WRONG"


def source(name: str, java: Java) -> str:
    """Which program computes a metric, with its version."""
    library = f"pycocoevalcap {metadata.version('pycocoevalcap')}"
    tokens = f"PTB tokens by {java}"
    if name == "meteor":
        return f"METEOR 1.5 of {library}, {java}"
    if name == "spice":
        return f"spice-1.0.jar of {library} with {spice_official.ARCHIVE}, {java}"
    if name == "spice_spacy":
        try:
            parser = f"spacy {metadata.version('spacy')}"
        except metadata.PackageNotFoundError:
            parser = "spacy, which is not installed"
        return f"ours after Anderson et al. 2016, {parser}; {tokens}"
    if name in ("cider", "cider_d"):
        return f"ours, CIDEr-D equal to {library}; {tokens}"
    return f"{library}; {tokens}"
