"""The three kinds of models behind three functions: ``load_captioner``, ``load_generator``,
``load_encoder``. Each takes its part of a preset and gives a bundle with one verb.

An adapter is a name below, or ``"module:Class"`` of your own, so that a preset alone can plug in
a model that this project has never heard of.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from lib.captioners import Caption, Captioner
from lib.encoders import Encoder
from lib.errors import UserError
from lib.generators import GeneratedImages, Generator
from lib.presets import CaptionerSpec, EncoderSpec, GeneratorSpec
from lib.weights import used_revision

__all__ = ["Caption", "Captioner", "Encoder", "GeneratedImages", "Generator", "describe",
           "load_captioner", "load_encoder", "load_generator"]

CAPTIONERS = {
    "blip": "lib.captioners:Blip",
    "blip2": "lib.captioner_families:Blip2",
    "chat": "lib.captioner_families:Chat",
    "florence2": "lib.captioner_families:Florence2",
    "git": "lib.captioner_families:Git",
}
GENERATORS = {"diffusers": "lib.generators:Generator"}
ENCODERS = {
    "clip": "lib.encoders:Clip",
    "siglip": "lib.encoders:Siglip",
    "dino": "lib.encoders:Dino",
    "sentence": "lib.encoders:Sentence",
}


def load_captioner(spec: CaptionerSpec, device: str | torch.device | None = None) -> Captioner:
    """Load a captioner. Raises UserError in one line if it cannot be had."""
    return _adapter(CAPTIONERS, spec.adapter, "captioner")(spec, device)


def load_generator(spec: GeneratorSpec, device: str | torch.device | None = None) -> Generator:
    """Load a generator. Raises UserError in one line if it cannot be had."""
    return _adapter(GENERATORS, spec.adapter, "generator")(spec, device)


def load_encoder(spec: EncoderSpec, device: str | torch.device | None = None) -> Encoder:
    """Load an encoder. Raises UserError in one line if it cannot be had."""
    return _adapter(ENCODERS, spec.adapter, "encoder")(spec, device)


def describe(bundle: Captioner | Generator | Encoder) -> dict[str, Any]:
    """What ``run.json`` records of a loaded model: id, revision used, device, number type."""
    return {"id": bundle.spec.id, "adapter": bundle.spec.adapter,
            "revision": used_revision(bundle.folder) or bundle.spec.revision,
            "device": str(bundle.device), "dtype": str(bundle.dtype).removeprefix("torch.")}


def _adapter(known: dict[str, str], name: str, kind: str) -> Any:
    """Import an adapter class by its short name or by ``module:Class``."""
    place = known.get(name, name)
    if ":" not in place:
        raise UserError(f"unknown {kind} adapter {name!r}: choose one of {', '.join(known)} "
                        "or give module:Class")
    module_name, class_name = place.split(":", 1)
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{kind} adapter {name!r} cannot be imported: {error}") from error
