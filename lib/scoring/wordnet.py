"""Which words mean the same, by the WordNet tables inside the METEOR jar of ``pycocoevalcap``.

WordNet 3 lists words with the ids of their synsets. A word form is looked up as it stands, by
its irregular base form, and by the base forms that WordNet's suffix rules give; the rules'
parts of speech are not checked, so that "biker" also stands for "bike". This is how the official
SPICE scorer matches, as far as its published tuples show: on the 300 captions with official
tuples these rules give every official F-score (``tests/test_spice_graph.py``).
"""

from __future__ import annotations

import zipfile
from functools import lru_cache

from lib.scoring.tokens import library_folder

JAR = "meteor-1.5.jar"

#: Nouns and adjectives: the base form's synsets are the word's own.
_NOUN_AND_ADJECTIVE = (
    ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"), ("s", ""), ("er", ""), ("er", "e"), ("est", ""), ("est", "e"),
)
#: Verbs: only the base form itself is the same word, not its synonyms.
_VERB = (("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""))


class WordNet:
    """Synsets and irregular forms of English."""

    def __init__(self, synsets: dict[str, frozenset[str]], exceptions: dict[str, str]) -> None:
        self.synsets = synsets  # word, with "_" for a space -> ids
        self.exceptions = exceptions  # irregular form -> base form
        self._senses: dict[str, frozenset[str]] = {}
        self._stems: dict[str, frozenset[str]] = {}
        self._same: dict[tuple[str, str], bool] = {}

    def same(self, first: str, second: str) -> bool:
        """Whether two words (or phrases) are equal by lemma or share a synset."""
        if first == second:
            return True
        pair = (first, second) if first < second else (second, first)
        known = self._same.get(pair)
        if known is None:
            known = self._same[pair] = self._compare(*(word.replace(" ", "_") for word in pair))
        return known

    def _compare(self, first: str, second: str) -> bool:
        return (
            not self.senses(first).isdisjoint(self.senses(second))
            or second in self.stems(first)
            or first in self.stems(second)
        )

    def senses(self, word: str) -> frozenset[str]:
        """The synsets of the word and of its base forms as noun or adjective."""
        if word not in self._senses:
            forms = self._bases(word, _NOUN_AND_ADJECTIVE)
            self._senses[word] = frozenset().union(*(self.synsets.get(f, ()) for f in forms))
        return self._senses[word]

    def stems(self, word: str) -> frozenset[str]:
        """The word's base forms as a verb."""
        if word not in self._stems:
            self._stems[word] = frozenset(self._bases(word, _VERB))
        return self._stems[word]

    def _bases(self, word: str, rules: tuple[tuple[str, str], ...]) -> set[str]:
        bases = {word}
        if word in self.exceptions:
            bases.add(self.exceptions[word])
        for suffix, replacement in rules:
            if len(word) > len(suffix) and word.endswith(suffix):
                base = word[: -len(suffix)] + replacement
                if base in self.synsets:
                    bases.add(base)
        return bases


@lru_cache(maxsize=1)
def load_wordnet() -> WordNet:
    """WordNet from the jar; read once a process, it never changes."""
    with zipfile.ZipFile(library_folder("meteor") / JAR) as jar:
        synsets = _pairs(jar.read("synonym/english.synsets").decode("utf-8"))
        exceptions = _pairs(jar.read("synonym/english.exceptions").decode("utf-8"))
    return WordNet(
        {word: frozenset(ids.split()) for word, ids in synsets},
        {form: base for base, forms in exceptions for form in forms.split()},
    )


def _pairs(text: str) -> list[tuple[str, str]]:
    """Lines two by two, as METEOR keeps its tables."""
    lines = text.splitlines()
    return list(zip(lines[::2], lines[1::2], strict=False))
