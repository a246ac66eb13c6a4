"""Scene graphs as SPICE compares them: tuples, synonyms, the merging of references, and the F-score.

Section 3 of Anderson et al., 2016: a caption is a set of tuples (object), (object, attribute) and (object, relation,
object), equal where each part is the same word, by lemma or by a WordNet synset. Details follow the official scorer's
published tuples: the candidate's own graph is merged too, and WordNet's suffix rules do not check parts of speech
("biker" also stands for "bike"). Given the official tuples, these functions give the official F-score.
"""

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from lib.metrics.java import JARS

Name = tuple[str, ...]  # the words of one object, attribute or relation; several if synonymous
Fact = tuple[Name, ...]  # 1, 2 or 3 names
#: WordNet's suffix rules. Nouns and adjectives: the base form's synsets are the word's own.
_NOUN_AND_ADJECTIVE = (("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
                       ("men", "man"), ("ies", "y"), ("s", ""), ("er", ""), ("er", "e"), ("est", ""), ("est", "e"))
#: Verbs: only the base form itself is the same word, not its synonyms.
_VERB = (("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""))


@dataclass(frozen=True)
class Graph:
    """The scene graph of one caption, objects told apart by their words."""

    objects: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()  # (object, attribute)
    relations: tuple[tuple[str, str, str], ...] = ()  # (subject, relation, object)


def merge(graphs: Iterable[Graph]) -> list[Fact]:
    """Return the facts of several captions of one image, equal ones once. Nodes that hold an equal word become one."""
    graphs = list(graphs)
    words: dict[str, None] = {}  # an ordered set
    for graph in graphs:
        ends = [word for first, _, last in graph.relations for word in (first, last)]
        words.update(dict.fromkeys([*graph.objects, *(word for word, _ in graph.attributes), *ends]))
    nodes: list[list[str]] = []
    for word in words:
        near = [node for node in nodes if any(same(word, other) for other in node)]
        nodes = [node for node in nodes if node not in near] + [[other for node in near for other in node] + [word]]
    name = {word: tuple(node) for node in nodes for word in node}
    facts: list[Fact] = [(tuple(node),) for node in nodes]
    for graph in graphs:
        facts.extend((name[word], (attribute,)) for word, attribute in graph.attributes)
        facts.extend((name[a], (relation,), name[b]) for a, relation, b in graph.relations)
    kept: dict[tuple, list[Fact]] = {}
    for fact in dict.fromkeys(facts):  # only facts of the same nodes can be equal
        group = kept.setdefault((len(fact), fact[0], fact[-1] if len(fact) == 3 else None), [])
        if len(fact) == 1 or not any(_same_name(fact[1], other[1]) for other in group):
            group.append(fact)
    return [fact for group in kept.values() for fact in group]


def f_score(candidate: Sequence[Fact], reference: Sequence[Fact]) -> float:
    """Return F1 of the candidate's facts in [0, 1] (equations 4 to 6), 0 without facts on either side."""
    right = sum(any(len(fact) == len(other) and all(map(_same_name, fact, other)) for other in reference)
                for fact in candidate)
    return 2 * right / ((len(candidate) + len(reference)) or 1)


def _same_name(first: Name, second: Name) -> bool:
    return first == second or any(same(a, b) for a in first for b in second)


@cache
def same(first: str, second: str) -> bool:
    """Return whether two words or phrases are equal by lemma or share a synset."""
    first, second = first.replace(" ", "_"), second.replace(" ", "_")
    return (first == second or not _senses(first).isdisjoint(_senses(second))
            or second in _bases(first, _VERB) or first in _bases(second, _VERB))


def known(word: str) -> bool:
    """Return whether WordNet has a word."""
    return word in _wordnet()[0]


@cache
def _wordnet() -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    """Return {word with "_" for a space: synset ids} and {irregular form: base form}, from the METEOR jar."""
    with zipfile.ZipFile(JARS / "meteor" / "meteor-1.5.jar") as jar:  # lines two by two
        synsets, exceptions = (jar.read(f"synonym/english.{name}").decode().splitlines()
                               for name in ("synsets", "exceptions"))
    return ({word: frozenset(ids.split()) for word, ids in zip(synsets[::2], synsets[1::2], strict=True)},
            {f: base for base, forms in zip(exceptions[::2], exceptions[1::2], strict=True) for f in forms.split()})


@cache
def _senses(word: str) -> frozenset[str]:
    """Return the synsets of the word and of its base forms as noun or adjective."""
    return frozenset().union(*(_wordnet()[0].get(form, ()) for form in _bases(word, _NOUN_AND_ADJECTIVE)))


@cache
def _bases(word: str, rules: tuple[tuple[str, str], ...]) -> frozenset[str]:
    synsets, exceptions = _wordnet()
    stems = {word[: -len(end)] + new for end, new in rules if len(word) > len(end) and word.endswith(end)}
    return frozenset({word, exceptions.get(word, word)} | (stems & synsets.keys()))
