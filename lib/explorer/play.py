"""One source at a time: the game as plain functions that yield what is made as it is made.

::

    game = new_game(pick_item("picturebook-coco", 0), "image", get_preset("mini"))
    for candidate in play_one(game):       # first the messages, then each reconstruction
        print(candidate.index, candidate.text, candidate.similarity)

A candidate comes several times, each time more complete. Seeds, comparison and selection are those
of ``lib.game``, so a source of a dataset gives here exactly the rows that a run gives.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from lib import ranking
from lib.datasets import Dataset, Item, load_dataset
from lib.errors import UserError
from lib.explorer.models import Stop, models_for, never, stopping
from lib.game import TASKS, Shard
from lib.images import decode_image
from lib.metrics import score_semantics
from lib.players import Content, Cost, Models, Pictures, Reader, Texts, depict, describe
from lib.presets import Preset

OWN = "own"  # the dataset that uploads and typed texts belong to, in seeds
NAN = math.nan


# --- sources -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(Item):
    """A source that lies in no dataset: an uploaded picture or a typed text."""

    picture: Image.Image | None = field(default=None, compare=False)

    def image(self) -> Image.Image:
        """The picture; UserError for a text."""
        if self.picture is None:
            raise UserError("this source is a text and has no picture: play text reconstruction")
        return self.picture


def uploaded(content: bytes, name: str, references: Sequence[str] = ()) -> Given:
    """An uploaded picture file as a source; UserError if it is not a picture that can be read.

    Its id is a hash of the bytes, so the same file gives the same captions every time.
    """
    picture = decode_image(io.BytesIO(content), name)
    key = hashlib.sha256(content).hexdigest()[:12]
    return Given(key, None, tuple(references), picture=picture)


def typed(text: str) -> Given:
    """A typed text as a source; UserError if it is blank."""
    words = " ".join(text.split())
    if not words:
        raise UserError("the text is empty: type what the generator shall draw")
    return Given(hashlib.sha256(words.encode()).hexdigest()[:12], None, (words,))


@lru_cache(maxsize=4)
def dataset(name: str) -> Dataset:
    """A dataset by name, read once."""
    return load_dataset(name)


def pick_item(name: str, key: str | int) -> Item:
    """An item of a dataset by its id (text) or its place (number)."""
    whole = dataset(name)
    if isinstance(key, int):
        if not 0 <= key < len(whole):
            raise UserError(f"dataset {name} has items 0 to {len(whole) - 1}, not {key}")
        return whole.items[key]
    found = whole.by_id().get(key)
    if found is None:
        raise UserError(f"dataset {name} has no item {key!r}: choose another one")
    return found


# --- a game and its candidates -----------------------------------------------------------------


@dataclass(frozen=True)
class Game:
    """One source, one direction, and everything else that decides what comes out."""

    source: Item
    direction: str
    preset: Preset
    n_candidates: int
    seed: int
    dataset: str

    @property
    def shard(self) -> Shard:
        """The game as a batch of one source, which is what ``lib.game`` plays."""
        return Shard("", self.dataset, self.preset, (self.source,), self.n_candidates, self.seed)

    @property
    def source_text(self) -> str | None:
        """The text that text reconstruction starts from; None for image reconstruction."""
        return TASKS["text"].sources(self.shard).texts[0] if self.direction == "text" else None

    def source_picture(self) -> Image.Image | None:
        """The source's picture, also where the game starts from its text; None if it has none."""
        known = self.source.path is not None or getattr(self.source, "picture", None) is not None
        return self.source.image() if known else None


def new_game(
    source: Item, direction: str, preset: Preset, n_candidates: int | None = None, seed: int = 0,
    dataset: str | None = None,
) -> Game:
    """Check the parts of a game and put them together.

    dataset: where the source comes from; uploads and typed texts belong to none.
    Raises UserError for an unknown direction, a bad count, or a source that cannot start it.
    """
    if direction not in TASKS:
        raise UserError(f"direction {direction!r}: choose one of {', '.join(TASKS)}")
    count = preset.n_candidates if n_candidates is None else n_candidates
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"number of candidates = {count!r}: must be a whole number of at least 1")
    if direction == "image" and preset.captioner.sender.deterministic:
        count = 1  # greedy and beam search give one caption, whatever the seed
    game = Game(source, direction, preset, count, seed, dataset or OWN)
    if direction == "image" and game.source_picture() is None:
        raise UserError("this source is a text: choose the direction that starts from a text")
    if direction == "text" and not source.references:
        raise UserError("this picture comes without a caption: choose the direction that starts "
                        "from a picture, or type a text")
    return game


@dataclass(frozen=True, eq=False)
class Candidate:
    """One candidate, as far as it is made. NaN or None: not yet, or not to be had.

    text: the caption, message of one direction and reconstruction of the other; picture: uint8
    (H, W, 3), the other way round; similarity: by the preset's choice; judged: by the second
    encoder; cut: the generator could read only the beginning of its text; scores: by name, see
    ``lib.labels``.
    """

    index: int
    seed: int
    text: str | None = None
    picture: np.ndarray | None = None
    logprob: float = NAN
    flagged: bool = False
    cut: bool = False
    similarity: float = NAN
    judged: float = NAN
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether message and reconstruction are both there."""
        return self.text is not None and self.picture is not None


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Most similar first, as the game ranks them; what is not compared yet comes last."""
    ordered = sorted(candidates, key=lambda candidate: candidate.index)
    ranks = ranking.ordinal_ranks(np.array([c.similarity for c in ordered], dtype=np.float64))
    return [candidate for _, candidate in sorted(zip(ranks, ordered, strict=True), key=lambda p: p[0])]


def selected(candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate that the game selects; None while nothing is compared."""
    known = [candidate for candidate in candidates if not math.isnan(candidate.similarity)]
    return ranked(known)[0] if known else None


# --- playing -----------------------------------------------------------------------------------


class Comparison:
    """How close reconstructions come to one source; the source is embedded once."""

    def __init__(self, game: Game, models: Models) -> None:
        self.game, self.sources = game, TASKS[game.direction].sources(game.shard)
        readers = {"encoder": models.encoder, "judge": models.judge}
        self.readers = {name: Reader(model, name, Cost())
                        for name, model in readers.items() if model is not None}

    def embeddings(self, name: str, answer: Content) -> tuple[np.ndarray, np.ndarray] | None:
        """Embeddings (d,) of the source and of one reconstruction; None where not readable."""
        reader = self.readers[name]
        source = reader.embed(self.sources, ["the source"])
        other = reader.embed(answer, ["a reconstruction"])
        return None if source is None or other is None else (source[0], other[0])

    def similarity(self, answer: Content) -> tuple[float, float]:
        """(by the preset's similarity, cosine by the judge); NaN where there is none."""
        pair = self.embeddings("encoder", answer)
        if pair is None:
            raise UserError(f"preset {self.game.preset.name}: its encoder cannot read what this "
                            "direction reconstructs: choose one that reads pictures and texts")
        second = self.embeddings("judge", answer) if "judge" in self.readers else None
        euclidean = self.game.preset.similarity == "euclidean"
        chosen = -ranking.euclidean_distance(*pair) if euclidean else ranking.cosine_similarity(*pair)
        judged = NAN if second is None else float(ranking.cosine_similarity(*second))
        return float(chosen), judged

    def complete(self, candidate: Candidate, answer: Content) -> Candidate:
        """Add the similarity; nothing is measured on a flagged (blackened) picture."""
        if candidate.flagged:
            return candidate
        similarity, judged = self.similarity(answer)
        return replace(candidate, similarity=similarity, judged=judged)


def play_one(
    game: Game, models: Models | None = None, stop: Stop = never
) -> Iterator[Candidate]:
    """Play one source: first every message, then each candidate again with its reconstruction.

    models: loaded ones; the preset's when None (kept for the next call). stop: asked before each
    step of the models; True ends the game by :class:`lib.explorer.models.Stopped`.
    """
    models = models or models_for(game.preset)
    with stopping(models, stop):
        steps = _from_image if game.direction == "image" else _from_text
        yield from steps(game, models)


def noise_seeds(game: Game) -> list[int]:
    """(K,) the generator's seeds: see the design on who shares noise with whom."""
    shared = game.direction == "image" and game.preset.generator.noise == "source"
    return game.shard.source_seeds("noise") if shared else game.shard.seeds("noise")


def _from_image(game: Game, models: Models) -> Iterator[Candidate]:
    """Image reconstruction (3.5): captions, then what is drawn from each of them."""
    comparison, cost = Comparison(game, models), Cost()
    messages, seeds = TASKS["image"].send(game.shard, models, comparison.sources, cost)
    candidates = [Candidate(k, seed, text, None, logprob) for k, (seed, text, logprob)
                  in enumerate(zip(seeds, messages.texts, messages.logprobs, strict=True))]
    yield from candidates
    drawn: dict[tuple[str, int], Pictures] = {}  # equal captions with equal noise: one picture
    for candidate, noise in zip(candidates, noise_seeds(game), strict=True):
        key = (candidate.text, noise)
        if key not in drawn:
            drawn[key] = depict(models.generator, Texts((candidate.text,)), [noise], cost)
        yield comparison.complete(_with_picture(candidate, drawn[key]), drawn[key])


def _from_text(game: Game, models: Models) -> Iterator[Candidate]:
    """Text reconstruction (3.6): pictures, then what the receiver reads in each of them."""
    comparison, cost = Comparison(game, models), Cost()
    text, receiver = comparison.sources, game.preset.captioner.receiver
    places = zip(noise_seeds(game), game.shard.seeds("receiver"), strict=True)
    for k, (noise, reading) in enumerate(places):
        picture = depict(models.generator, text, [noise], cost)
        candidate = _with_picture(Candidate(k, noise), picture)
        yield candidate
        caption = describe(models.captioner, picture, [[reading]], receiver, cost)
        candidate = replace(candidate, text=caption.texts[0], logprob=caption.logprobs[0])
        yield comparison.complete(candidate, caption)


def _with_picture(candidate: Candidate, drawn: Pictures) -> Candidate:
    return replace(candidate, picture=np.asarray(drawn.pixels[0]), flagged=bool(drawn.flagged[0]),
                   cut=bool(drawn.truncated[0]))


def embeddings(
    game: Game, candidates: Sequence[Candidate], models: Models | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Raw embeddings of the source (d,) and of K complete candidates' reconstructions (K, d)."""
    if not candidates:
        raise UserError("there is no candidate to embed: play the game first")
    comparison = Comparison(game, models or models_for(game.preset))
    pairs = [comparison.embeddings("encoder", _answer(game, candidate)) for candidate in candidates]
    return pairs[0][0], np.stack([answer for _, answer in pairs])


def _answer(game: Game, candidate: Candidate) -> Content:
    """What a complete candidate gives back: the text or the picture."""
    if game.direction == "text":
        return Texts((candidate.text,))
    return Pictures.given([Image.fromarray(candidate.picture)])


def try_caption(game: Game, text: str, models: Models | None = None) -> Candidate:
    """What the generator makes of a caption written by hand, from the first candidate's noise.

    Its index is -1: it competes with the captioner's candidates but is none of them.
    """
    check_contest(game)
    words, models = typed(text).references[0], models or models_for(game.preset)
    noise = noise_seeds(game)[0]
    drawn = depict(models.generator, Texts((words,)), [noise], Cost())
    return Comparison(game, models).complete(_with_picture(Candidate(-1, noise, words), drawn), drawn)


def check_contest(game: Game) -> None:
    """UserError where there is no picture to write a caption of."""
    if game.direction != "image":
        raise UserError("a caption by hand needs a picture to be compared with: choose the "
                        "direction that starts from a picture")


# --- going on from one game --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Leg:
    """One round of keeping on playing: who won it, and how far that is from the first source.

    to_last, to_first: similarity to this round's source and to the first one; sem_f: against the
    first source's true scene, NaN where none is known.
    """

    number: int
    winner: Candidate
    to_last: float
    to_first: float
    sem_f: float


def drift(
    game: Game, rounds: int, models: Models | None = None, stop: Stop = never
) -> Iterator[Leg]:
    """Feed the selected reconstruction back in as the next source, ``rounds`` times.

    Ends early where every candidate of a round is flagged. Raises UserError unless rounds >= 1.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise UserError(f"rounds = {rounds!r}: must be a whole number of at least 1")
    models = models or models_for(game.preset)
    first, current = Comparison(game, models), game
    for number in range(1, rounds + 1):
        complete = [c for c in play_one(current, models, stop) if c.complete]
        winner = selected(complete)
        if winner is None:
            return
        to_first, _ = first.similarity(_answer(game, winner))
        yield Leg(number, winner, winner.similarity, to_first, _meaning(game, winner.text))
        current = replace(current, source=_next_source(game, winner, number))


def _meaning(game: Game, text: str) -> float:
    """Semantic F1 of a caption against the first source's scene."""
    if game.source.scene is None:
        return NAN
    return float(score_semantics([text], [game.source.scene])["sem_f"].iloc[0])


def _next_source(game: Game, winner: Candidate, number: int) -> Given:
    """The winner's reconstruction as a source; its id says whose descendant it is."""
    key = f"{game.source.id}~{number}"
    if game.direction == "text":
        return Given(key, None, (winner.text,))
    return Given(key, None, (), picture=Image.fromarray(winner.picture))


def compare(
    games: Mapping[str, Game], stop: Stop = never,
    load: Callable[[Preset], Models] = models_for,
) -> Iterator[tuple[str, Candidate]]:
    """Play several games (the same source, other models or decoding) one after the other."""
    for name, game in games.items():
        for candidate in play_one(game, load(game.preset), stop):
            yield name, candidate


def table(game: Game, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Candidates as plain records, most similar first, for a DataFrame in a cell."""
    best = selected(candidates)
    return [{"rank": rank, "candidate": c.index, "text": c.text, "similarity": c.similarity,
             "judge": c.judged, "log p": c.logprob, **c.scores, "selected": c is best}
            for rank, c in enumerate(ranked(candidates), start=1)]
