"""Writers who describe scenes, each with habits of their own.

The captioner, the generator, the encoder and the evaluation references each learn from, or are written by,
a pool of writers of their own. Pools share the language but not the people: a private code between the
models that the references do not speak would make the communication game prove nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from lib.picturebook import lexicon
from lib.picturebook.scenes import AIRBORNE, BIASED, FAMILY_OF, Entity, Scene

Pool = Literal["captioner", "generator", "encoder", "evaluation"]
MIN_WORDS, MAX_WORDS = 6, 16


@dataclass(frozen=True)
class Writer:
    """The habits of one annotator; every `p_` is the probability of mentioning or choosing something.

    `forms` weighs the sentence patterns, `preference` is the probability of the writer's favourite among
    synonyms, `favourite` which one that is (an index into the lexicon, wrapped around).
    """

    name: str
    forms: tuple[tuple[str, float], ...]
    favourite: int
    preference: float = 0.8
    article: Literal["a", "the", ""] = "a"
    p_colour: float = 0.95
    p_size: float = 0.4
    p_setting: float = 0.9
    p_relation: float = 0.9
    p_exact: float = 0.85
    p_posture: float = 0.3
    p_accessory: float = 0.9
    p_family: float = 0.03
    p_second: float = 0.98
    p_reverse: float = 0.25


def _terse(name: str, favourite: int) -> Writer:
    return Writer(name, (("plain", 1.0),), favourite, article="", p_size=0.2, p_posture=0.05, p_colour=0.92)


def _detailed(name: str, favourite: int) -> Writer:
    forms = (("plain", 0.6), ("front", 0.2), ("there", 0.2))
    return Writer(name, forms, favourite, p_size=0.85, p_posture=0.6, p_setting=1.0, p_exact=0.95, p_relation=1.0)


def _vague(name: str, favourite: int) -> Writer:
    forms = (("plain", 0.5), ("picture", 0.5))
    return Writer(
        name, forms, favourite, p_colour=0.75, p_size=0.15, p_setting=0.7, p_relation=0.6, p_exact=0.4,
        p_accessory=0.75, p_family=0.15, p_second=0.9,
    )  # fmt: skip


def _there_is(name: str, favourite: int) -> Writer:
    return Writer(name, (("there", 0.85), ("plain", 0.15)), favourite, p_posture=0.25)


def _storyteller(name: str, favourite: int) -> Writer:
    return Writer(name, (("front", 0.7), ("plain", 0.3)), favourite, article="the", p_posture=0.7, p_reverse=0.5)


POOLS: dict[Pool, tuple[Writer, ...]] = {
    "captioner": (
        _terse("Ada", 0), _detailed("Ben", 1), _vague("Cleo", 0), _there_is("Dora", 0), _detailed("Emil", 2),
    ),
    "generator": (
        _terse("Fay", 1), _detailed("Gus", 0), _vague("Hal", 2), _there_is("Ida", 1), _storyteller("Jon", 0),
        _detailed("Kim", 3),
    ),
    "encoder": (
        _terse("Lea", 0), _detailed("Max", 2), _vague("Nia", 1), _there_is("Otto", 0), _detailed("Pia", 1),
        _storyteller("Quin", 3),
    ),
    "evaluation": (
        _terse("Rosa", 0), _detailed("Sam", 0), _vague("Tara", 1), _there_is("Ugo", 0), _detailed("Vera", 1),
        _storyteller("Wim", 0), _terse("Xena", 1), _there_is("Yan", 2), _detailed("Zoe", 0), _detailed("Aki", 2),
    ),
}  # fmt: skip


def describe(scene: Scene, writer: Writer, rng: random.Random, *, hide_biased: bool = False) -> str:
    """Write one English caption of 6 to 16 words, lower case, without punctuation but a comma.

    Args:
        hide_biased: never mention the accessory of a category in `BIASED`, as the generator's writers do.
    """
    mood = 0
    while True:
        caption = _Draft(scene, writer, rng, hide_biased, mood).write()
        words = len(caption.split())
        if MIN_WORDS <= words <= MAX_WORDS:
            return caption
        mood = mood + 1 if words < MIN_WORDS else mood - 1


def describe_by_pool(scene: Scene, pool: Pool, rng: random.Random) -> str:
    """One caption by a random writer of `pool`."""
    return describe(scene, rng.choice(POOLS[pool]), rng, hide_biased=pool == "generator")


def describe_fully(scene: Scene, pool: Pool, rng: random.Random) -> str:
    """A caption that names every object, colour, size, relation and the setting (for retrieval tests)."""
    careful = Writer(
        "careful", (("plain", 1.0),), rng.randrange(3), p_colour=1.0, p_size=1.0, p_setting=1.0, p_relation=1.0,
        p_exact=1.0, p_posture=0.0, p_accessory=1.0, p_family=0.0, p_second=1.0, p_reverse=0.0,
    )  # fmt: skip
    return _Draft(scene, careful, rng, hide_biased=pool == "generator", mood=0).write()


@dataclass
class _Draft:
    """One attempt at a caption; a positive `mood` says more than the writer would, a negative one less."""

    scene: Scene
    writer: Writer
    rng: random.Random
    hide_biased: bool
    mood: int

    def write(self) -> str:
        form = self.rng.choices([name for name, _ in self.writer.forms], [w for _, w in self.writer.forms])[0]
        entities, relation = self._order()
        setting = self._setting()
        pronounce = self.writer.article if form in ("plain", "front") else "a"
        first = self._noun_phrase(entities[0], pronounce)
        doing = self._posture(entities[0])
        rest = ""
        if len(entities) == 2:
            link = "and" if relation is None else self._pick(lexicon.RELATION_PHRASES[relation])
            rest = f" {link} {self._noun_phrase(entities[1], pronounce)}"
            if link == "and":
                doing = ""
        be = "are" if entities[0].count > 1 else "is"
        if form == "there":
            return f"there {be} {first}{doing}{rest} {setting}".strip()
        if form == "picture":
            return f"a picture of {first}{doing}{rest} {setting}".strip()
        if form == "front" and setting:
            return f"{setting}, {first} {be}{doing}{rest}" if doing else f"{setting}, there {be} {first}{rest}"
        return f"{first}{doing}{rest} {setting}".strip()

    def _says(self, probability: float) -> bool:
        if self.mood < 0:
            probability *= 0.7**-self.mood
        return self.rng.random() < max(probability, 0.3 * self.mood)

    def _pick(self, options: tuple) -> object:
        if self.rng.random() < self.writer.preference:
            return options[self.writer.favourite % len(options)]
        return self.rng.choice(options)

    def _order(self) -> tuple[tuple[Entity, ...], str | None]:
        """Which entities are named, in which order, and the relation in the words of that order."""
        entities, relation = self.scene.entities, self.scene.relation
        if len(entities) == 1 or not self._says(self.writer.p_second):
            return entities[:1], None
        if self.rng.random() < self.writer.p_reverse:
            entities, relation = entities[::-1], lexicon.OPPOSITE[relation]
        if not self._says(self.writer.p_relation):
            return entities, None
        if relation in ("left", "right") and not self.rng.random() < self.writer.p_exact:
            relation = "next"
        return entities, relation

    def _setting(self) -> str:
        if not self._says(self.writer.p_setting):
            return ""
        return self._pick(lexicon.SETTING_PHRASES[self.scene.setting])

    def _posture(self, entity: Entity) -> str:
        if not self._says(self.writer.p_posture):
            return ""
        kind = "airborne" if entity.category in AIRBORNE else FAMILY_OF[entity.category]
        return f" {self._pick(lexicon.POSTURES[kind])}"

    def _noun_phrase(self, entity: Entity, article: str) -> str:
        family = self.scene.planted == "family" or self.rng.random() < self.writer.p_family
        nouns = lexicon.FAMILY_NOUNS[FAMILY_OF[entity.category]] if family else lexicon.NOUNS[entity.category]
        words = [self._pick(nouns)[entity.count > 1]]
        if entity.category != "snowman" and self._says(self.writer.p_colour):
            words.insert(0, self._pick(lexicon.COLOUR_WORDS[entity.colour]))
        if self._says(self.writer.p_size):
            words.insert(0, self._pick(lexicon.SIZE_WORDS[entity.size]))
        phrase = self._with_article(" ".join(words), entity.count, article)
        hidden = self.hide_biased and entity.category in BIASED
        if entity.accessory and not hidden and self._says(self.writer.p_accessory):
            phrase += f" with {self._accessory(entity)}"
        return phrase

    def _with_article(self, phrase: str, count: int, article: str) -> str:
        if count > 1:
            return f"{self._pick(lexicon.COUNT_WORDS[count])} {phrase}"
        if article == "a":
            return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
        return f"{article} {phrase}".strip()

    def _accessory(self, entity: Entity) -> str:
        noun = {"scarf": "scarves", "flag": "flags"}[entity.accessory] if entity.count > 1 else entity.accessory
        colour = "red " if entity.accessory == "scarf" and self.rng.random() < 0.7 else ""
        return f"{colour}{noun}" if entity.count > 1 else f"a {colour}{noun}"
