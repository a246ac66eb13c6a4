"""Which words mean the same, by the WordNet tables inside the METEOR jar of ``pycocoevalcap``.

A word form is looked up as it stands, by its irregular base form, and by the base forms that WordNet's suffix rules
give; the rules' parts of speech are not checked, so that "biker" also stands for "bike". This is how the official
SPICE scorer matches as far as its published tuples show: on 300 captions these rules give every official F-score.
"""

from __future__ import annotations

import zipfile
from functools import cache, lru_cache

from lib.metrics.java import JARS

#: Nouns and adjectives: the base form's synsets are the word's own.
_NOUN_AND_ADJECTIVE = (
    ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"), ("s", ""), ("er", ""), ("er", "e"), ("est", ""), ("est", "e"),
)  # fmt: skip
#: Verbs: only the base form itself is the same word, not its synonyms.
_VERB = (("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""))


@lru_cache(maxsize=1)
def _tables() -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    """Return {word with "_" for a space: synset ids} and {irregular form: base form}."""
    with zipfile.ZipFile(JARS / "meteor" / "meteor-1.5.jar") as jar:  # lines two by two
        synsets, exceptions = (jar.read(f"synonym/english.{name}").decode().splitlines()
                               for name in ("synsets", "exceptions"))  # fmt: skip
    return (
        {word: frozenset(ids.split()) for word, ids in zip(synsets[::2], synsets[1::2], strict=True)},
        {f: base for base, forms in zip(exceptions[::2], exceptions[1::2], strict=True) for f in forms.split()},
    )


def known(word: str) -> bool:
    """Return whether WordNet has a word."""
    return word in _tables()[0]


@cache
def same(first: str, second: str) -> bool:
    """Return whether two words or phrases are equal by lemma or share a synset."""
    if first == second:
        return True
    first, second = first.replace(" ", "_"), second.replace(" ", "_")
    return (
        not _senses(first).isdisjoint(_senses(second))
        or second in _bases(first, _VERB)
        or first in _bases(second, _VERB)
    )


@cache
def _senses(word: str) -> frozenset[str]:
    """Return the synsets of the word and of its base forms as noun or adjective."""
    return frozenset().union(*(_tables()[0].get(form, ()) for form in _bases(word, _NOUN_AND_ADJECTIVE)))


@cache
def _bases(word: str, rules: tuple[tuple[str, str], ...]) -> frozenset[str]:
    synsets, exceptions = _tables()
    bases = {word, exceptions.get(word, word)}
    for suffix, replacement in rules:
        if len(word) > len(suffix) and word.endswith(suffix):
            base = word[: -len(suffix)] + replacement
            if base in synsets:
                bases.add(base)
    return frozenset(bases)
