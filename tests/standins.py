"""Small deterministic models for tests of the round trip: real work on real pixels and words, no weights.

The captioner names an image's main colour, the generator paints the first colour word of a text, the encoder embeds
images and texts in one space of colours.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lib.models import Caption, Images, Models
from lib.presets import Decoding, Preset, load_preset

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220),
           "yellow": (230, 210, 40), "white": (245, 245, 245), "black": (15, 15, 15)}
NAMES = list(COLOURS)
PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)


def mean_colour(image: Image.Image | np.ndarray) -> np.ndarray:
    """Mean RGB (3,) of an image."""
    return np.asarray(image).reshape(-1, 3).mean(axis=0, dtype=np.float64)


def affinity(colour: np.ndarray) -> np.ndarray:
    """Probabilities (6,) of the colour words for a mean colour."""
    logits = -np.linalg.norm(PALETTE - colour, axis=1) / 40
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class ColourCaptioner:
    """Says which colour it sees; sampling follows the affinities, greedy takes the best. pause: seconds a call."""

    def __init__(self, pause: float = 0.0) -> None:
        self.seen, self.pause = 0, pause

    def caption(self, images: Sequence[Image.Image | np.ndarray], seeds: Sequence[Sequence[int]],
                decoding: Decoding) -> list[list[Caption]]:
        time.sleep(self.pause)
        self.seen += len(images)
        looks = [affinity(mean_colour(image)) for image in images]
        return [[self._one(look, seed, decoding) for seed in row] for look, row in zip(looks, seeds, strict=True)]

    def _one(self, weights: np.ndarray, seed: int, decoding: Decoding) -> Caption:
        choice, article = int(weights.argmax()), "a"
        if not decoding.deterministic:
            rng = np.random.default_rng(seed)
            choice, article = int(rng.choice(len(weights), p=weights)), rng.choice(["a", "one"])
        text = f"{article} {NAMES[choice]} thing on a page"
        return Caption(text, float(np.log(weights[choice])), len(text.split()))


class ColourGenerator:
    """Paints the first colour word of a text, with a little noise from the seed; flag: a word that is blacked out."""

    def __init__(self, flag: str | None = None) -> None:
        self.flag, self.asked = flag, 0

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> Images:
        self.asked += len(texts)
        pixels = np.stack([self._one(text, seed) for text, seed in zip(texts, seeds, strict=True)])
        flagged = np.array([self.flag is not None and self.flag in text for text in texts])
        pixels[flagged] = 0
        return Images(pixels, flagged, np.array([len(text.split()) > 60 for text in texts]))

    def _one(self, text: str, seed: int) -> np.ndarray:
        word = next((word for word in text.lower().split() if word in COLOURS), None)
        rng = np.random.default_rng(seed)
        tint, noise = rng.normal(0, 15, 3), rng.normal(0, 12, (16, 16, 3))
        return np.clip(np.array(COLOURS.get(word, (128, 128, 128))) + tint + noise, 0, 255).astype(np.uint8)


class ColourEncoder:
    """Embeds images by mean colour and texts by their words, in (9,) dimensions."""

    def __init__(self, bias: float = 0.3, spoilt: float | None = None) -> None:
        self.bias, self.spoilt, self.images, self.texts = bias, spoilt, 0, []

    def embed_images(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        self.images += len(images)
        vectors = np.array([np.r_[affinity(colour), colour / 255 * self.bias] for colour in map(mean_colour, images)])
        if self.spoilt is not None:  # images of 9 pixels a side
            vectors[[np.asarray(image).shape[0] == 9 for image in images]] = self.spoilt
        return vectors.astype(np.float32)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        return np.array([self._text(text) for text in texts], dtype=np.float32)

    def _text(self, text: str) -> np.ndarray:
        words, digest = text.lower().split(), hashlib.sha256(text.encode()).digest()
        counts = np.array([words.count(name) for name in NAMES], dtype=np.float64)
        return np.r_[counts + 0.01, np.frombuffer(digest[:3], np.uint8) / 255 * self.bias]


def stand_ins(flag: str | None = None, pause: float = 0.0, spoilt: float | None = None) -> Models:
    """A full set of models; images of texts with ``flag`` in them come back flagged."""
    return Models(ColourCaptioner(pause), ColourGenerator(flag), ColourEncoder(spoilt=spoilt), ColourEncoder(bias=0.8))


def preset(**changes) -> Preset:
    """The mini preset with models that mean no folder: stand-ins are handed over, not loaded."""
    mini = load_preset("mini")
    parts = {part: getattr(mini, part).model_copy(update={"id": f"standin/{part}", "revision": "1"})
             for part in ("captioner", "generator", "encoder", "second_encoder")}
    return mini.model_copy(update={**parts, **changes})


def paint(folder: Path, n: int, captions: bool = False, odd: int | None = None) -> str:
    """Write n small noisy images of the six colours in turn; the dataset's name.

    captions: with a captions.json beside them; odd: the place of an image that is 9 pixels wide, not 8.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        base = np.array(COLOURS[NAMES[i % 6]]) * (1 - i % 29 / 30)
        noise = np.random.default_rng(i).normal(0, 30, (9, 9, 3) if i == odd else (8, 8, 3))
        Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    if captions:
        texts = (f'"{i:02d}.png": ["a {NAMES[i % 6]} thing", "one {NAMES[i % 6]} page"]' for i in range(n))
        (folder / "captions.json").write_text("{" + ", ".join(texts) + "}")
    return f"folder:{folder}"


def contents(run) -> dict[str, bytes]:
    """The bytes of everything in a run that must repeat, by name."""
    kept = [path for path in run.folder.rglob("*.p*") if path.is_file()]
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in kept}
