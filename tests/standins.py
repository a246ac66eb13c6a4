"""Small deterministic players for tests of the game: real work on real pixels and words, no weights.

The captioner names the picture's main colour and its brightness, the generator paints the first
colour word it finds, the encoder embeds pictures and texts in one space of colours.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from lib.players import Models
from lib.presets import Decoding, Preset

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220),
           "yellow": (230, 210, 40), "white": (245, 245, 245), "black": (15, 15, 15)}
NAMES = list(COLOURS)
PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)


@dataclass(frozen=True)
class Caption:
    text: str
    logprob: float
    n_tokens: int


@dataclass(frozen=True)
class Drawn:
    pixels: np.ndarray
    flagged: np.ndarray
    truncated: np.ndarray


def mean_colour(picture: Image.Image | np.ndarray) -> np.ndarray:
    """Mean RGB (3,) of a picture."""
    return np.asarray(picture).reshape(-1, 3).mean(axis=0, dtype=np.float64)


def affinity(colour: np.ndarray) -> np.ndarray:
    """Probabilities (6,) of the colour words for a mean colour."""
    logits = -np.linalg.norm(PALETTE - colour, axis=1) / 40
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class ColourCaptioner:
    """Says which colour it sees; sampling follows the affinities, greedy takes the best."""

    def __init__(self) -> None:
        self.seen = 0

    def caption(self, images: Sequence[Image.Image | np.ndarray],
                seeds: Sequence[Sequence[int]], decoding: Decoding) -> list[list[Caption]]:
        self.seen += len(images)
        looks = [affinity(mean_colour(image)) for image in images]
        return [[self._one(look, seed, decoding) for seed in row]
                for look, row in zip(looks, seeds, strict=True)]

    def _one(self, weights: np.ndarray, seed: int, decoding: Decoding) -> Caption:
        if decoding.deterministic:
            choice, article = int(weights.argmax()), "a"
        else:
            rng = np.random.default_rng(seed)
            choice, article = int(rng.choice(len(weights), p=weights)), rng.choice(["a", "one"])
        text = f"{article} {NAMES[choice]} thing on a page"
        return Caption(text, float(np.log(weights[choice])), len(text.split()))


class ColourGenerator:
    """Paints the first colour word of a text, with a little noise from the seed."""

    def __init__(self, size: int = 16, flag: str | None = None) -> None:
        self.size, self.flag, self.asked = size, flag, 0

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        self.asked += len(texts)
        pixels = np.stack([self._one(t, s) for t, s in zip(texts, seeds, strict=True)])
        flagged = np.array([self.flag is not None and self.flag in text for text in texts])
        pixels[flagged] = 0
        return Drawn(pixels, flagged, np.array([len(t.split()) > 60 for t in texts]))

    def _one(self, text: str, seed: int) -> np.ndarray:
        word = next((w for w in text.lower().split() if w in COLOURS), None)
        base = np.array(COLOURS.get(word, (128, 128, 128)))
        noise = np.random.default_rng(seed).normal(0, 12, (self.size, self.size, 3))
        tint = np.random.default_rng(seed).normal(0, 15, 3)
        return np.clip(base + tint + noise, 0, 255).astype(np.uint8)


class ColourEncoder:
    """Embeds pictures by mean colour and texts by their words, in (9,) dimensions."""

    def __init__(self, bias: float = 0.3) -> None:
        self.bias, self.images, self.texts = bias, 0, 0

    def embed_images(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        self.images += len(images)
        colours = [mean_colour(image) for image in images]
        vectors = [np.r_[affinity(colour), colour / 255 * self.bias] for colour in colours]
        return np.array(vectors, dtype=np.float32)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += len(texts)
        return np.array([self._text(text) for text in texts], dtype=np.float32)

    def _text(self, text: str) -> np.ndarray:
        words = text.lower().split()
        counts = np.array([words.count(name) for name in NAMES], dtype=np.float64)
        digest = hashlib.sha256(text.encode()).digest()
        return np.r_[counts + 0.01, np.frombuffer(digest[:3], np.uint8) / 255 * self.bias]


def stand_ins(flag: str | None = None) -> Models:
    """A full set of players; pictures of texts with ``flag`` in them come back flagged."""
    return Models(ColourCaptioner(), ColourGenerator(flag=flag), ColourEncoder(),
                  ColourEncoder(bias=0.8))


class Heard(io.StringIO):
    """A place for messages, such as stderr, that does something as soon as it hears the first one."""

    def __init__(self, then: Callable[[], object]) -> None:
        super().__init__()
        self.then = then

    def write(self, text: str) -> int:
        first = not self.getvalue()
        length = super().write(text)
        if first:
            self.then()
        return length


class Slow:
    """Players that take a moment, so that a kill finds them at work."""

    @staticmethod
    def all(models: Models) -> Models:
        return replace(models, generator=Slow(models.generator))

    def __init__(self, player) -> None:
        self.player = player

    def generate(self, *arguments):
        time.sleep(0.02)
        return self.player.generate(*arguments)


def without_weights(preset: Preset) -> Preset:
    """The preset with ids that mean no folder: the players are handed over, not loaded."""
    parts = {name: replace(getattr(preset, name), id=f"standin/{name}", revision="1")
             for name in ("captioner", "generator", "encoder", "judge")}
    return replace(preset, **parts)


class Spoilt:
    """An encoder with one value for every component of the embedding of pictures of one shape."""

    def __init__(self, encoder, value: float, shape: tuple[int, int, int]) -> None:
        self.encoder, self.value, self.shape = encoder, value, shape

    def embed_texts(self, texts):
        return self.encoder.embed_texts(texts)

    def embed_images(self, images):
        vectors = self.encoder.embed_images(images)
        vectors[[np.asarray(image).shape == self.shape for image in images]] = self.value
        return vectors


def write_pictures(folder: Path, n: int, seed: int) -> str:
    """Draw n small noisy pictures without captions, whose scores need no Java; the dataset's name."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = np.clip(rng.integers(20, 235, 3) + rng.normal(0, 30, (8, 8, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return f"folder:{folder}"
