"""Read a picture-book caption back into claims, and judge the claims against the true scene.

The parser is a longest-match reader over the closed vocabulary of `lexicon`; it knows nothing of the
writers' sentence patterns, so that it reads model captions and human ones alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from lib.picturebook import lexicon
from lib.picturebook.scenes import FAMILY_OF, Entity, Scene


@dataclass
class Mention:
    """One thing that a caption names: a category or only a family, and what is said about it."""

    category: str | None = None
    family: str | None = None
    colour: str | None = None
    size: str | None = None
    count: int = 1
    accessory: str | None = None


@dataclass
class Claims:
    """What a caption says: things, the relation of the first to the second, the setting."""

    mentions: list[Mention] = field(default_factory=list)
    relation: str | None = None  # left, right, above, below or next
    setting: str | None = None


@lru_cache(maxsize=1)
def _phrases() -> tuple[dict[tuple[str, ...], tuple[str, object]], int]:
    """Every known phrase as a tuple of words, with its kind and value; and the longest phrase's length."""
    table: dict[tuple[str, ...], tuple[str, object]] = {}

    def add(kind: str, value: object, *texts: str) -> None:
        table.update({tuple(text.split()): (kind, value) for text in texts})

    for category, nouns in lexicon.NOUNS.items():
        for forms in nouns:
            add("category", category, *forms)
    for family, nouns in lexicon.FAMILY_NOUNS.items():
        for forms in nouns:
            add("family", family, *forms)
    for kind, words in (
        ("colour", lexicon.COLOUR_WORDS), ("size", lexicon.SIZE_WORDS), ("count", lexicon.COUNT_WORDS),
        ("setting", lexicon.SETTING_PHRASES), ("relation", lexicon.RELATION_PHRASES),
    ):  # fmt: skip
        for value, texts in words.items():
            add(kind, value, *texts)
    add("accessory", "scarf", "scarf", "scarves")
    add("accessory", "flag", "flag", "flags")
    return table, max(map(len, table))


@lru_cache(maxsize=1)
def _noun_words() -> dict[str, set[str]]:
    """The words that a category or its family is called by."""
    nouns = {name: (*lexicon.NOUNS[name], *lexicon.FAMILY_NOUNS[family]) for name, family in FAMILY_OF.items()}
    return {name: {word for form in forms for text in form for word in text.split()} for name, forms in nouns.items()}


def named_last(scene: Scene, words: list[str]) -> list[str | None]:
    """For each word of a caption the category of `scene` that was named last, None before the first noun.

    A word that fits both things ("tree" for a pine and a palm) tells nothing and is passed over.
    """
    present, current, named = {entity.category for entity in scene.entities}, None, []
    for word in words:
        called = [name for name in present if word in _noun_words()[name]]
        current = called[0] if len(called) == 1 else current
        named.append(current)
    return named


def parse(caption: str) -> Claims:
    """Read `caption`; words outside the lexicon are passed over."""
    table, longest = _phrases()
    words = "".join(c if c.isalpha() else " " for c in caption.lower()).split()
    claims, pending, position = Claims(), Mention(), 0
    while position < len(words):
        for length in range(min(longest, len(words) - position), 0, -1):
            found = table.get(tuple(words[position : position + length]))
            if found is not None:
                pending = _take(claims, pending, *found)
                position += length
                break
        else:
            position += 1
    return claims


def _take(claims: Claims, pending: Mention, kind: str, value: object) -> Mention:
    """Add one phrase to the claims; returns the description collected for the next noun."""
    if kind in ("category", "family"):
        setattr(pending, kind, value)
        pending.family = FAMILY_OF.get(pending.category, pending.family)
        claims.mentions.append(pending)
        return Mention()
    if kind in ("colour", "size", "count"):
        setattr(pending, kind, value)
        return pending
    if kind == "accessory":
        if claims.mentions:
            claims.mentions[-1].accessory = value
        return Mention()
    if kind == "relation" and claims.mentions and claims.relation is None:
        claims.relation = value
    if kind == "setting" and claims.setting is None:
        claims.setting = value
    return pending


def match(claims: Claims, scene: Scene) -> list[Entity | None]:
    """The true entity that each mention speaks of (None for a thing that is not there); each used once.

    Exact names go before family words, and equal colours before other ones.
    """
    free, found = list(scene.entities), [None] * len(claims.mentions)
    order = sorted(range(len(claims.mentions)), key=lambda i: claims.mentions[i].category is None)
    for index in order:
        mention = claims.mentions[index]
        fitting = [
            entity
            for entity in free
            if (mention.category == entity.category)
            or (mention.category is None and mention.family == FAMILY_OF[entity.category])
        ]
        if fitting:
            best = max(fitting, key=lambda entity: entity.colour == mention.colour)
            free.remove(best)
            found[index] = best
    return found


@dataclass(frozen=True)
class Counts:
    """Right claims, claims made, and true facts that could have been claimed, for one kind of fact."""

    right: int
    claimed: int
    true: int

    def scores(self) -> tuple[float | None, float | None, float | None]:
        """Precision, recall and F1; None where nothing was claimed or nothing is true."""
        precision = self.right / self.claimed if self.claimed else None
        recall = self.right / self.true if self.true else None
        total = self.claimed + self.true
        return precision, recall, 2 * self.right / total if total else None


def count_facts(caption: str, scene: Scene) -> dict[str, Counts]:
    """Right, claimed and true facts of kind object, family, colour, relation and setting.

    A family word that fits ("bird" for a penguin) is counted under `family` and is neither a right nor a
    wrong object; one that fits nothing is a wrong object. A colour is right only on the thing that has it.
    "Next to" is right for left and right. The snowman's white is nobody's to mention.
    """
    claims = parse(caption)
    matched = match(claims, scene)
    pairs = list(zip(claims.mentions, matched, strict=True))
    exact = sum(mention.category is not None and entity is not None for mention, entity in pairs)
    family = sum(mention.category is None and entity is not None for mention, entity in pairs)
    coloured = [(m, e) for m, e in pairs if m.colour is not None and m.category != "snowman"]
    relation_right = 0
    if claims.relation is not None and scene.relation is not None and len(matched) >= 2 and all(matched[:2]):
        truth = scene.relation if matched[0] is scene.entities[0] else lexicon.OPPOSITE[scene.relation]
        relation_right = int(claims.relation == truth or (claims.relation == "next" and truth in ("left", "right")))
    return {
        "object": Counts(exact, len(pairs) - family, len(scene.entities)),
        "family": Counts(family, len(pairs), len(scene.entities)),
        "colour": Counts(
            sum(entity is not None and entity.colour == mention.colour for mention, entity in coloured),
            len(coloured),
            sum(entity.category != "snowman" for entity in scene.entities),
        ),
        "relation": Counts(relation_right, int(claims.relation is not None), int(scene.relation is not None)),
        "setting": Counts(int(claims.setting == scene.setting), int(claims.setting is not None), 1),
    }


def judge(caption: str, scene: Scene) -> dict[str, float | None]:
    """Semantic accuracy of one caption against the true scene.

    Returns `{object,colour,relation,setting}_{p,r,f}` in [0, 1] or None, and `f`, the F1 over all these facts
    together (family words left out of the claims).
    """
    counts = count_facts(caption, scene)
    kinds = ("object", "colour", "relation", "setting")
    result: dict[str, float | None] = {}
    for kind in kinds:
        for suffix, value in zip("prf", counts[kind].scores(), strict=True):
            result[f"{kind}_{suffix}"] = value
    total = Counts(*(sum(getattr(counts[kind], part) for kind in kinds) for part in ("right", "claimed", "true")))
    result["f"] = total.scores()[2]
    return result
