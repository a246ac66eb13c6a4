"""The references of a dataset, made ready once: tokens, document frequencies, scene graphs."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import lib
from lib.errors import UserError
from lib.scoring import spice_spacy
from lib.scoring.cider import Frequencies
from lib.scoring.java import Java, JavaFailed, find_java
from lib.scoring.meteor import Meteor, shared
from lib.scoring.spice_graph import Fact, Graph, merge
from lib.scoring.tokens import tokenize
from lib.scoring.wordnet import load_wordnet

DEFAULT_CACHE = Path(lib.__file__).parent.parent / "data" / "cache"
FORMAT = 1  # counts up when tokens or the file's layout change
# Items whose references' graphs share a file: reading and writing stay linear in the items.
GRAPHS_TOGETHER = 1000

log = logging.getLogger(__name__)


class Corpus:
    """References of a full evaluation split, and what every metric needs from them.

    Document frequencies come from all of ``references``, whatever part of it a run plays, and
    stay fixed. Candidates that were tokenised, parsed or aligned once are remembered, so that
    several calls on the same corpus repeat no work. Make one with :meth:`build`.
    """

    def __init__(
        self, references: dict[str, tuple[str, ...]], tokens: dict[str, str], cache: Path,
        frequencies: Frequencies | None = None,
    ) -> None:
        self.references = references
        self.tokens = tokens  # caption -> its PTB tokens, the references' first
        self._n_own = len(tokens)
        self.cache = cache
        self.meteor_statistics: dict[tuple[str, str], str] = {}  # (item, tokens) -> statistics
        self.graphs: dict[str, Graph] = {}  # tokens -> scene graph
        self._scenes: dict[str, list[Fact]] = {}  # item -> the merged graph of its references
        self._borrowed = frequencies

    @classmethod
    def build(
        cls, references: Mapping[str, Sequence[str]], cache_dir: Path | str | None = None
    ) -> Corpus:
        """Tokenise the references, or read their tokens from the cache.

        Args:
            references: item id -> captions. An item may have none: it then has no scores.
            cache_dir: where to keep what was computed, by hash of the content; ``data/cache``
                of the repository when not given.

        Raises:
            UserError: no references at all, one that is not text, or no Java.
        """
        checked = _checked(references)
        cache = Path(cache_dir) if cache_dir is not None else DEFAULT_CACHE
        captions = sorted({caption for group in checked.values() for caption in group})
        path = cache / f"tokens-{content_hash(FORMAT, captions)}.json.gz"
        tokens = read_cache(path)
        if tokens is None or not tokens.keys() >= set(captions):
            tokens = _tokenized(captions, find_java())
            write_cache(path, tokens)
        return cls(checked, tokens, cache)

    def borrow(self, references: Mapping[str, Sequence[str]]) -> Corpus:
        """A corpus of other references with this one's document frequencies (for uploads)."""
        checked = _checked(references)
        self.tokenize([caption for captions in checked.values() for caption in captions])
        return Corpus(checked, self.tokens, self.cache, self.frequencies)

    @cached_property
    def java(self) -> Java:
        """The Java that this corpus uses."""
        return find_java()

    @cached_property
    def frequencies(self) -> Frequencies:
        """Document frequencies of all items that have references (or the borrowed ones)."""
        if self._borrowed is not None:
            return self._borrowed
        documents = (self.reference_tokens(item) for item in self.references)
        return Frequencies.count(document for document in documents if document)

    def reference_tokens(self, item: str) -> tuple[str, ...]:
        """PTB tokens of an item's references; one without any token counts as no reference."""
        captions = (self.tokens[caption] for caption in self.references.get(item, ()))
        return tuple(caption for caption in captions if caption)

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        """PTB tokens of captions; all that are new go through one process.

        Raises:
            UserError: no Java, or the tokenizer's process failed.
        """
        new = sorted({caption for caption in captions if caption not in self.tokens})
        if new:
            self.tokens.update(_tokenized(new, self.java))
        return [self.tokens[caption] for caption in captions]

    def scenes(self, items: Iterable[str]) -> dict[str, list[Fact]]:
        """The merged scene graph of each item's references; parsed once and cached on disk.

        Raises:
            NoParser: spaCy or its model is missing.
        """
        new = [item for item in dict.fromkeys(items) if item not in self._scenes]
        groups: dict[int, set[str]] = {}
        for item in new:
            groups.setdefault(self._groups[item], set()).update(self.reference_tokens(item))
        for group, wanted in groups.items():
            if not wanted <= self.graphs.keys():
                self._read_graphs(group, wanted)
        for item in new:
            graphs = [self.graphs[caption] for caption in self.reference_tokens(item)]
            self._scenes[item] = merge(graphs, load_wordnet())
        return self._scenes

    @cached_property
    def _groups(self) -> dict[str, int]:
        """Which file has the graphs of an item's references."""
        return {item: place // GRAPHS_TOGETHER for place, item in enumerate(self.references)}

    def _read_graphs(self, group: int, wanted: set[str]) -> None:
        """Get the scene graphs of captions of one group's references from its file, or parse them."""
        start = group * GRAPHS_TOGETHER
        members = sorted(islice(self.references.items(), start, start + GRAPHS_TOGETHER))
        key = content_hash(FORMAT, spice_spacy.fingerprint(), members)
        path = self.cache / f"graphs-{key}.json.gz"
        cached = read_cache(path) or {}
        self.graphs.update((text, spice_spacy.from_json(g)) for text, g in cached.items())
        if not wanted <= self.graphs.keys():
            self.parse(wanted)
            cached.update((text, spice_spacy.to_json(self.graphs[text])) for text in wanted)
            write_cache(path, cached)

    def forget(self) -> None:
        """Drop what is remembered of candidates, and all scene graphs (the references' are on disk).

        Whoever scores a long table part by part calls it after each part: memory stays flat.
        Not for a corpus that another one has borrowed from: they share their tokens.
        """
        for caption in list(islice(self.tokens, self._n_own, None)):
            del self.tokens[caption]
        self.meteor_statistics.clear()
        self.graphs.clear()
        self._scenes.clear()

    def parse(self, tokens: Iterable[str]) -> dict[str, Graph]:
        """Scene graphs of captions of PTB tokens; each distinct one is parsed once."""
        new = sorted({caption for caption in tokens if caption not in self.graphs})
        self.graphs.update(zip(new, spice_spacy.parse(new), strict=True))
        return self.graphs

    def meteor(self) -> Meteor:
        """The running METEOR, which takes seconds to start."""
        return shared(self.java)


def content_hash(*parts: object) -> str:
    """16 hexadecimal digits of the SHA-256 of the parts as JSON."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def read_cache(path: Path) -> dict | None:
    """A cached JSON object; ``None`` where there is none or it is damaged (it is then remade)."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        log.warning("%s is damaged and is made anew (%s)", path, error)
        return None
    return content if isinstance(content, dict) else None


def write_cache(path: Path, content: dict) -> None:
    """Write a JSON object under a temporary name, then move it; a full disk is told, and no harm."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            file.write(json.dumps(content, sort_keys=True).encode("ascii"))
        os.replace(temporary, path)
    except OSError as error:
        log.warning("%s could not be kept, the next run computes it again (%s)", path, error)
        with contextlib.suppress(OSError):  # often it was never made
            temporary.unlink()


def _checked(references: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The references with text ids and tuples of text."""
    if not references:
        raise UserError("references: there is no image at all; give {id: [captions]}")
    checked: dict[str, tuple[str, ...]] = {}
    for item, captions in references.items():
        if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
            raise UserError(f"references of {item!r}: expected a list of texts, [caption, ...]")
        checked[str(item)] = tuple(captions)
    return checked


def _tokenized(captions: Sequence[str], java: Java) -> dict[str, str]:
    """Caption -> tokens, with a failing process told in one line."""
    try:
        return dict(zip(captions, tokenize(captions, java), strict=True))
    except JavaFailed as failure:
        raise UserError(f"captions cannot be tokenised: {failure}; run it again") from failure
