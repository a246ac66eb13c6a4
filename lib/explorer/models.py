"""Models for looking around: loaded once, re-tuned without loading again, stoppable between steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from lib.errors import UserError
from lib.players import Models
from lib.presets import GREEDY, CaptionerSpec, Decoding, EncoderSpec, GeneratorSpec, Preset, get_preset

Stop = Callable[[], bool]
STRATEGIES = ("nucleus", "greedy", "beam", "top_k")
KEPT = 2  # bundles of each kind that stay in memory: enough for a comparison side by side


class Stopped(Exception):
    """The user has asked to stop; what was made before stays."""


def never() -> bool:
    """The answer of somebody who does not want to stop."""
    return False


# --- choosing ----------------------------------------------------------------------------------


def mix(captioner: str, generator: str, encoder: str, ranked_by: str = "encoder") -> Preset:
    """A preset from the parts of three presets (names or TOML files).

    ranked_by: "encoder" or "judge", the second of which swaps the two encoders of ``encoder``.
    """
    base, readers = get_preset(captioner), get_preset(encoder)
    mixed = replace(base, generator=get_preset(generator).generator, encoder=readers.encoder,
                    judge=readers.judge, similarity=readers.similarity)
    if ranked_by == "judge" and readers.judge is not None:
        mixed = replace(mixed, encoder=readers.judge, judge=readers.encoder)
    return mixed


def tune(
    preset: Preset, strategy: Literal["nucleus", "greedy", "beam", "top_k"] | None = None,
    p: float | None = None, beams: int | None = None, steps: int | None = None,
    guidance: float | None = None,
) -> Preset:
    """A preset with another way to sample captions or to draw; None keeps the preset's own.

    Raises UserError for a value out of range.
    """
    if strategy not in (None, *STRATEGIES):
        raise UserError(f"strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    words = {"strategy": strategy, "p": p, "beams": beams}
    drawing = {"steps": steps, "guidance": guidance}
    words, drawing = ({k: v for k, v in part.items() if v is not None} for part in (words, drawing))
    sender = replace(preset.captioner.sender, **words)
    return replace(preset, captioner=replace(preset.captioner, sender=sender),
                   generator=replace(preset.generator, **drawing))


# --- loading -----------------------------------------------------------------------------------


def models_for(preset: Preset) -> Models:
    """A preset's models, from memory where they are loaded. Raises UserError if one is missing."""
    # How to decode is told at each call, so it is no reason to load the weights again.
    captioner = replace(preset.captioner, sender=Decoding(), receiver=GREEDY)
    judge = None if preset.judge is None else _encoder(preset.judge)
    return Models(_captioner(captioner), _tuned(preset.generator), _encoder(preset.encoder), judge)


@lru_cache(maxsize=KEPT)
def _captioner(spec: CaptionerSpec) -> Any:
    from lib.models import load_captioner  # torch is slow to import, and the page need not wait

    return load_captioner(spec)


@lru_cache(maxsize=KEPT)
def _generator(spec: GeneratorSpec) -> Any:
    from lib.models import load_generator

    return load_generator(spec)


@lru_cache(maxsize=2 * KEPT)
def _encoder(spec: EncoderSpec) -> Any:
    from lib.models import load_encoder

    return load_encoder(spec)


def _tuned(spec: GeneratorSpec) -> Any:
    """A generator with these steps and this guidance, which are no part of its weights."""
    bundle = copy.copy(_generator(replace(spec, steps=1, guidance=0.0)))
    bundle.spec = spec
    return bundle


# --- stopping ----------------------------------------------------------------------------------


@contextmanager
def stopping(models: Models, stop: Stop) -> Iterator[None]:
    """Ask ``stop`` before each pass of the denoiser and of the captioner's decoder.

    One picture of a large model takes minutes on a processor; a user who has pressed stop should
    not wait for its end. Players without such parts (stand-ins, remote models) are not interrupted.
    """
    if stop is never:
        yield
        return

    def ask(*_: Any) -> None:
        if stop():
            raise Stopped

    ask()
    pipeline = getattr(models.generator, "pipeline", None)
    captioner = getattr(models.captioner, "model", None)
    parts = [getattr(pipeline, "unet", None), getattr(pipeline, "transformer", None),
             getattr(captioner, "text_decoder", captioner)]
    with ExitStack() as hooks:
        for part in parts:
            if hasattr(part, "register_forward_pre_hook"):
                hooks.callback(part.register_forward_pre_hook(ask).remove)
        yield
