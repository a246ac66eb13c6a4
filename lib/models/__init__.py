"""Three kinds of models behind ``load_captioner``, ``load_generator``, ``load_encoder``: README.md has their contract."""

from __future__ import annotations

import pkgutil
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lib.base import UserError
from lib.models.hub import fetch_models, is_here, missing_models, used_revision, weights_fingerprint
from lib.presets import CaptionerSettings, EncoderSettings, GeneratorSettings, ModelSettings, Preset

if TYPE_CHECKING:  # torch and transformers are slow to import
    from lib.models.captioners import Captioner
    from lib.models.encoders import Encoder
    from lib.models.generators import Diffusers as Generator

__all__ = ["Caption", "Images", "Models", "describe", "fetch_models", "is_here", "load_captioner", "load_encoder",
           "load_generator", "load_models", "missing_models", "unknown_words", "weights_fingerprint"]

ADAPTERS = {kind: {name.lower(): f"lib.models.{kind}s:{name}" for name in names} for kind, names in {
    "captioner": ("Blip", "Blip2", "Chat", "Florence2", "Git"), "generator": ("Diffusers",),
    "encoder": ("Clip", "Siglip", "Dino", "Sentence")}.items()}


@dataclass(frozen=True)
class Caption:
    """A caption without its prompt.

    logprob: sum of the natural-log probabilities of its tokens, the end token included, under the
    model's full distribution (never of the filtered one). n_tokens: new tokens without the end.
    """

    text: str
    logprob: float
    n_tokens: int


@dataclass(frozen=True, eq=False)
class Images:
    """pixels uint8 (B, H, W, 3); flagged bool (B,): the safety checker blacked the image out;
    truncated bool (B,): the prompt was longer than the text encoder reads."""

    pixels: np.ndarray
    flagged: np.ndarray
    truncated: np.ndarray

    @classmethod
    def of(cls, output: Any) -> Images:
        """Return Images of what a generator gave: Images, or plain uint8 pixels (B, H, W, 3)."""
        if hasattr(output, "pixels"):
            return output
        pixels = np.asarray(output)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise TypeError(f"a generator gives uint8 (B, H, W, 3), not {pixels.dtype} {pixels.shape}")
        nothing = np.zeros(len(pixels), dtype=bool)
        return cls(pixels, nothing, nothing)


def as_pil(image: Image.Image | np.ndarray) -> Image.Image:
    """Return an RGB image from a PIL image or a uint8 array (H, W, 3)."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True)
class Models:
    """The frozen models of one round trip; the second encoder only measures, it never selects."""

    captioner: Captioner
    generator: Generator
    encoder: Encoder
    second_encoder: Encoder | None = None


def load_models(preset: Preset, device: str | None = None) -> Models:
    """Return a preset's models, loaded on the device that is given, set or found."""
    second = preset.second_encoder
    return Models(load_captioner(preset.captioner, device), load_generator(preset.generator, device),
                  load_encoder(preset.encoder, device), second and load_encoder(second, device))


def load_captioner(settings: CaptionerSettings, device: str | None = None) -> Captioner:
    """Return a captioner. Raises UserError in one line if it cannot be had or would give nonsense."""
    return _load("captioner", settings, device)


def load_generator(settings: GeneratorSettings, device: str | None = None) -> Generator:
    """Return a generator. Raises UserError in one line if it cannot be had or would give nonsense."""
    return _load("generator", settings, device)


def load_encoder(settings: EncoderSettings, device: str | None = None) -> Encoder:
    """Return an encoder. Raises UserError in one line if it cannot be had or would give nonsense."""
    return _load("encoder", settings, device)


def _load(kind: str, settings: ModelSettings, device: str | None) -> Any:
    """Import an adapter class by its short name or as module:Class, and load its model."""
    known = ADAPTERS[kind]
    place = known.get(settings.adapter, settings.adapter)
    if ":" not in place:
        raise UserError(f"unknown {kind} adapter {settings.adapter!r}: choose one of {', '.join(known)} "
                        "or give module:Class")
    try:
        adapter = pkgutil.resolve_name(place)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{kind} adapter {settings.adapter!r} cannot be imported: {error} (a module of yours is "
                        "found in the absolute folders that PYTHONPATH names)") from error
    return adapter(settings, device)


def describe(model: Any) -> dict[str, Any]:
    """Return what ``run.json`` records of a loaded model; nothing of one of your own that keeps no ``settings``."""
    settings, folder = (getattr(model, name, None) for name in ("settings", "folder"))
    if settings is None:
        return {}
    return {"id": settings.id, "adapter": settings.adapter,
            "revision": (folder and used_revision(folder)) or settings.revision,
            "device": str(getattr(model, "device", "unknown")),
            "dtype": str(getattr(model, "dtype", "unknown")).removeprefix("torch.")}


def unknown_words(model: Any, text: str) -> list[str]:
    """Return the words of a text that a model with a small vocabulary of whole words does not know.

    ``mini`` knows some 200 words. Published models spell unknown words in pieces: then the list is empty.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or len(tokenizer) > 5000:
        return []
    pieces = {word: tokenizer.tokenize(word) for word in re.findall(r"(?<!')\b\w+", text.lower())}
    return [word for word, found in pieces.items() if len(found) > 1 or found == [tokenizer.unk_token]]
