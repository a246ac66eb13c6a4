"""Scene graphs as SPICE compares them: tuples, the merging of references, and the F-score.

Section 3 of Anderson et al., 2016: a caption is a set of tuples (object), (object, attribute) and (object, relation,
object). The graphs of all references are merged by their objects; a candidate's score is the F1 of its tuples, where
two tuples are equal if each of their parts is the same word, by lemma or by a WordNet synset. Two details follow the
official scorer's published tuples: an object with several synonymous names is one node, written "bike/bicycle", and
the candidate's own graph is merged in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lib.metrics.wordnet import same

Name = tuple[str, ...]  # the words of one object, attribute or relation; several if synonymous
Fact = tuple[Name, ...]  # 1, 2 or 3 names


@dataclass(frozen=True)
class Graph:
    """The scene graph of one caption, objects told apart by their words."""

    objects: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()  # (object, attribute)
    relations: tuple[tuple[str, str, str], ...] = ()  # (subject, relation, object)

    def words(self) -> list[str]:
        """Return every object that the graph mentions, in order of appearance and once each."""
        ends = [word for first, _, last in self.relations for word in (first, last)]
        return list(dict.fromkeys([*self.objects, *(word for word, _ in self.attributes), *ends]))


def merge(graphs: Iterable[Graph]) -> list[Fact]:
    """Return the facts of several captions of one image as one graph, equal ones once.

    A word joins the first node that holds an equal word, and nodes that it connects become one.
    """
    graphs = list(graphs)
    nodes: list[list[str]] = []
    for word in dict.fromkeys(word for graph in graphs for word in graph.words()):
        near = [node for node in nodes if any(same(word, other) for other in node)]
        joined = [other for node in near for other in node] + [word]
        nodes = [node for node in nodes if node not in near] + [joined]
    name = {word: tuple(node) for node in nodes for word in node}
    facts: list[Fact] = [(tuple(node),) for node in nodes]
    for graph in graphs:
        facts.extend((name[word], (attribute,)) for word, attribute in graph.attributes)
        facts.extend((name[a], (relation,), name[b]) for a, relation, b in graph.relations)
    return _distinct(facts)


def _distinct(facts: Sequence[Fact]) -> list[Fact]:
    """Return the facts without those that equal an earlier one; only facts of the same nodes can be equal."""
    kept: dict[tuple, list[Fact]] = {}
    for fact in dict.fromkeys(facts):
        group = kept.setdefault((len(fact), fact[0], fact[-1] if len(fact) == 3 else None), [])
        if len(fact) == 1 or not any(_same(fact[1], other[1]) for other in group):
            group.append(fact)
    return [fact for group in kept.values() for fact in group]


def f_score(candidate: Sequence[Fact], reference: Sequence[Fact]) -> float:
    """Return F1 of the candidate's facts in [0, 1] (equations 4 to 6), 0 without facts on either side.

    A candidate's fact counts once if it equals any of the reference's.
    """
    if not candidate or not reference:
        return 0.0
    right = sum(any(_equal(fact, other) for other in reference) for fact in candidate)
    return 2 * right / (len(candidate) + len(reference))


def _equal(first: Fact, second: Fact) -> bool:
    return len(first) == len(second) and all(map(_same, first, second))


def _same(first: Name, second: Name) -> bool:
    return first == second or any(same(a, b) for a in first for b in second)
