"""Who plays the game and what passes between them: models, texts, pictures.

Axes: N texts or pictures of a batch, U distinct pictures among them, d embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lib.cost import Cost
from lib.errors import UserError
from lib.presets import Decoding, Preset

# --- who plays ---------------------------------------------------------------------------------


class Captioner(Protocol):
    """Writes captions: result[i] has one caption for each of seeds[i]."""

    def caption(self, images: Sequence[Any], seeds: Sequence[Sequence[int]],
                decoding: Decoding) -> list[list[Any]]: ...


class Generator(Protocol):
    """Draws texts: ``pixels`` uint8 (B, H, W, 3), ``flagged`` and ``truncated`` bool (B,)."""

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> Any: ...


class Encoder(Protocol):
    """Embeds pictures and texts, raw float32 (B, d)."""

    def embed_images(self, images: Sequence[Any]) -> np.ndarray: ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Models:
    """The frozen models of one game; ``judge`` is a second, independent encoder."""

    captioner: Captioner
    generator: Generator
    encoder: Encoder
    judge: Encoder | None = None


def load_models(preset: Preset) -> Models:
    """Load a preset's models on the device that the hardware suggests."""
    from lib import models  # torch is slow to import, and reading rows needs none of it

    return Models(
        models.load_captioner(preset.captioner),
        models.load_generator(preset.generator),
        models.load_encoder(preset.encoder),
        None if preset.judge is None else models.load_encoder(preset.judge),
    )


def describe_models(models: Models) -> dict[str, Any]:
    """What was loaded, by part; nothing for players that carry no preset entry (stand-ins)."""
    bundles = {"captioner": models.captioner, "generator": models.generator,
               "encoder": models.encoder, "judge": models.judge}
    known = {name: bundle for name, bundle in bundles.items() if hasattr(bundle, "spec")}
    if not known:
        return {}
    from lib.models import describe as describe_bundle  # torch is loaded by now

    return {name: describe_bundle(bundle) for name, bundle in known.items()}


# --- what is said: texts and pictures ----------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """N texts; ``logprobs`` None where nobody generated them."""

    texts: tuple[str, ...]
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False)
class Pictures:
    """N pictures, of which U are distinct: picture n is ``pixels[index[n]]``."""

    pixels: Sequence[Image.Image | np.ndarray]
    index: np.ndarray
    flagged: np.ndarray
    truncated: np.ndarray

    @classmethod
    def given(cls, pictures: Sequence[Image.Image]) -> Pictures:
        """Pictures that no generator drew."""
        nothing = np.zeros(len(pictures), dtype=bool)
        return cls(pictures, np.arange(len(pictures)), nothing, nothing)


Content = Texts | Pictures


def describe(
    captioner: Captioner, pictures: Pictures, seeds: Sequence[Sequence[int]], decoding: Decoding,
    cost: Cost, stage: str = "caption",
) -> Texts:
    """Caption picture n once for each of seeds[n]; the captions come flat, in that order.

    stage: under which the cost is booked.
    """
    images = [pictures.pixels[u] for u in pictures.index]
    asked = sum(len(row) for row in seeds)
    with cost.stage(stage, captioner, "captioner", images_captioned=len(images), captions=asked):
        answers = captioner.caption(images, seeds, decoding)
    flat = [caption for row in answers for caption in row]
    return Texts(tuple(c.text for c in flat), tuple(float(c.logprob) for c in flat))


def depict(generator: Generator, texts: Texts, seeds: Sequence[int], cost: Cost) -> Pictures:
    """Draw text n from the noise of seeds[n].

    Equal texts with equal noise give equal pictures, so each distinct pair is drawn once: where
    the noise is the source's (see the design), that is once for each distinct caption.
    """
    pairs = list(zip(texts.texts, seeds, strict=True))
    distinct = {pair: u for u, pair in enumerate(dict.fromkeys(pairs))}
    with cost.stage("generate", generator, "generator", images_asked=len(pairs),
                    images_generated=len(distinct)):
        drawn = generator.generate([text for text, _ in distinct], [seed for _, seed in distinct])
    index = np.array([distinct[pair] for pair in pairs])
    return Pictures(drawn.pixels, index, np.asarray(drawn.flagged, dtype=bool)[index],
                    np.asarray(drawn.truncated, dtype=bool)[index])


def reads(encoder: Encoder, kind: str) -> bool:
    """Whether an encoder embeds "texts" or "images": some read pictures only, some texts only.

    It says so by ``reads_texts`` or ``reads_images``; one of our own adapters may also just leave
    the base class's method for that kind, which refuses, as it is.
    """
    stated = getattr(encoder, f"reads_{kind}", None)
    if stated is not None:
        return bool(stated)
    method = f"_{kind}"
    makers = [base for base in type(encoder).__mro__ if method in vars(base)]
    return not makers or (makers[0].__module__, makers[0].__name__) != ("lib.encoders", "Encoder")


class Reader:
    """An encoder during one shard: it embeds every distinct text and picture once."""

    def __init__(self, encoder: Encoder, name: str, cost: Cost) -> None:
        self.encoder, self.name, self.cost = encoder, name, cost
        self._texts: dict[str, np.ndarray] = {}
        self._pictures: dict[int, tuple[Pictures, np.ndarray]] = {}

    def embed(self, content: Content, labels: Sequence[str]) -> np.ndarray | None:
        """(N, d) raw embeddings; None if the encoder does not read this kind of content.

        Raises UserError with the label of the first that is zero or not finite. A flagged picture
        is not checked: nothing is computed from it.
        """
        if isinstance(content, Texts):
            vectors = self._embed_texts(content)
            used = np.ones(len(content.texts), dtype=bool)
        else:
            vectors, used = self._embed_pictures(content), ~content.flagged
        if vectors is not None:
            self._check(vectors, used, labels)
        return vectors

    def _embed_texts(self, content: Texts) -> np.ndarray | None:
        if not reads(self.encoder, "texts"):
            return None
        new = [text for text in dict.fromkeys(content.texts) if text not in self._texts]
        if new:
            with self.cost.stage("embed", self.encoder, self.name, texts_embedded=len(new)):
                self._texts.update(zip(new, self.encoder.embed_texts(new), strict=True))
        return np.stack([self._texts[text] for text in content.texts])

    def _embed_pictures(self, content: Pictures) -> np.ndarray | None:
        if not reads(self.encoder, "images"):
            return None
        if id(content) not in self._pictures:  # the content is kept, so that its id stays its own
            with self.cost.stage("embed", self.encoder, self.name,
                                 images_embedded=len(content.pixels)):
                self._pictures[id(content)] = content, self.encoder.embed_images(content.pixels)
        return self._pictures[id(content)][1][content.index]

    def _check(self, vectors: np.ndarray, used: np.ndarray, labels: Sequence[str]) -> None:
        norms = np.linalg.norm(np.asarray(vectors, dtype=np.float64), axis=-1)
        bad = np.flatnonzero(used & ~(np.isfinite(norms) & (norms > 0)))
        if bad.size:
            problem = "zero" if norms[bad[0]] == 0 else "not finite"
            raise UserError(f"the {self.name}'s embedding of {labels[bad[0]]} is {problem}: check "
                            "that item and the model's weights, or use dtype float32")
