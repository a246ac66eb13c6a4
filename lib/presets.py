"""Presets: which models play the game, how they decode, on what data. Frozen data, no behaviour.

A preset is all that changes between the embedded picture book (``mini``) and the paper's set-up
(``paper``). Own presets are TOML files that name a ``base`` and override single fields::

    base = "mini"
    n_sources = 40
    [captioner.sender]
    p = 0.8

Tokens are *new* tokens, counted after the prompt and without the end token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lib.errors import UserError

REPO_ROOT = Path(__file__).resolve().parent.parent
_SECRET_NAME = re.compile(r"(^|[_-]|api)(key|token|secret|password|authorization)$", re.IGNORECASE)
# A password within an address, or a key behind it.
_SECRET_ADDRESS = re.compile(r"://[^/@\s\"]*:[^/@\s\"]+@|[?&]([^=&\"]*[_-]|api)?(key|token|secret|password)=",
                             re.IGNORECASE)
_NO_OPTIONS: Mapping[str, Any] = types.MappingProxyType({})


def _require(condition: bool, name: str, value: object, demand: str) -> None:
    """Raise one clear line if a field has a value out of range."""
    if not condition:
        raise UserError(f"preset field {name} = {value!r}: {demand}")


def _check_model(spec: CaptionerSpec | GeneratorSpec | EncoderSpec) -> None:
    """Checks shared by the three kinds of model."""
    _require(bool(spec.id), "id", spec.id, "must name a hub id or a folder")
    _require(spec.batch_size >= 1, "batch_size", spec.batch_size, "must be at least 1")
    _require(spec.dtype in ("auto", "float32", "float16", "bfloat16"), "dtype", spec.dtype,
             "must be auto, float32, float16 or bfloat16")


@dataclass(frozen=True)
class Decoding:
    """How a captioner turns next-token distributions into a caption (paper 3.2)."""

    strategy: Literal["nucleus", "greedy", "beam", "top_k"] = "nucleus"
    p: float = 0.9
    k: int = 50
    beams: int = 5
    temperature: float = 1.0
    min_tokens: int = 0
    max_tokens: int = 30
    repetition_penalty: float = 1.0
    prompt: str = ""

    def __post_init__(self) -> None:
        _require(0.0 < self.p <= 1.0, "p", self.p, "must lie in (0, 1]")
        for name in ("k", "beams", "max_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens,
                 f"must lie between 0 and max_tokens ({self.max_tokens})")
        for name in ("temperature", "repetition_penalty"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")

    @property
    def deterministic(self) -> bool:
        """Whether every seed gives the same caption."""
        return self.strategy in ("greedy", "beam")


GREEDY = Decoding(strategy="greedy")


@dataclass(frozen=True)
class CaptionerSpec:
    """An image-to-text model. ``id`` is a hub id or a folder (relative to the repository root)."""

    id: str
    adapter: str = "blip"
    revision: str | None = None
    dtype: str = "auto"
    attention: str = "auto"
    sender: Decoding = Decoding()
    receiver: Decoding = GREEDY
    batch_size: int = 16
    options: Mapping[str, Any] = field(default_factory=lambda: _NO_OPTIONS, hash=False)

    def __post_init__(self) -> None:
        _check_model(self)


@dataclass(frozen=True)
class GeneratorSpec:
    """A text-to-image model. Sizes in pixels (square); ``scheduler`` None keeps the pipeline's own.

    lora: a hub id or folder whose low-rank weights are folded in (needs the package peft).
    variant: the suffix of the weight files, such as "fp16", where a repository has several.
    options: further arguments of the pipeline's call, such as max_sequence_length = 256 (all that
    FLUX.1 schnell reads); of an adapter of your own, whatever it takes.
    """

    id: str
    adapter: str = "diffusers"
    revision: str | None = None
    dtype: str = "auto"
    steps: int = 50
    guidance: float = 7.5
    size: int = 512
    output_size: int = 256
    scheduler: str | None = None
    noise: Literal["source", "candidate"] = "candidate"
    safety_checker: bool = False
    lora: str | None = None
    variant: str | None = None
    compile: bool = False
    batch_size: int = 8
    options: Mapping[str, Any] = field(default_factory=lambda: _NO_OPTIONS, hash=False)

    def __post_init__(self) -> None:
        _check_model(self)
        for name in ("steps", "size", "output_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(self.guidance >= 0, "guidance", self.guidance, "must not be negative")


@dataclass(frozen=True)
class EncoderSpec:
    """An embedding model; ``projected`` chooses the shared space over the tower's own features."""

    id: str
    adapter: str = "clip"
    revision: str | None = None
    dtype: str = "auto"
    attention: str = "auto"
    projected: bool = True
    batch_size: int = 64
    options: Mapping[str, Any] = field(default_factory=lambda: _NO_OPTIONS, hash=False)

    def __post_init__(self) -> None:
        _check_model(self)


@dataclass(frozen=True)
class Preset:
    """One way to play the game. ``assumed`` lists what the paper does not state."""

    name: str
    captioner: CaptionerSpec
    generator: GeneratorSpec
    encoder: EncoderSpec
    judge: EncoderSpec | None = None
    similarity: Literal["cosine", "euclidean"] = "cosine"
    datasets: tuple[str, ...] = ("coco", "nocaps")
    n_sources: int = 2000
    n_candidates: int = 10
    seed: int = 0
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # It names folders: of figures, for one.
        _require(re.fullmatch(r"[^\s./\\][^/\\\x00-\x1f]{0,79}", self.name) is not None, "name", self.name,
                 "must be 1 to 80 characters without slashes, not beginning with a dot or a blank")
        _require(self.n_sources >= 1, "n_sources", self.n_sources, "must be at least 1")
        _require(self.n_candidates >= 1, "n_candidates", self.n_candidates, "must be at least 1")
        _require(len(self.datasets) >= 1, "datasets", self.datasets, "must name a dataset")


# --- the presets -------------------------------------------------------------------------------

_MINI = "data/models/mini"

MINI = Preset(
    name="mini",
    captioner=CaptionerSpec(
        id=f"{_MINI}/captioner", dtype="float32", batch_size=256,
        sender=Decoding(strategy="nucleus", p=0.9, min_tokens=6, max_tokens=18),
        receiver=Decoding(strategy="greedy", min_tokens=6, max_tokens=18),
    ),
    generator=GeneratorSpec(
        id=f"{_MINI}/generator", dtype="float32", steps=8, guidance=3.0, size=64, output_size=64,
        scheduler="DPMSolverMultistepScheduler", noise="source", batch_size=64,
    ),
    encoder=EncoderSpec(id=f"{_MINI}/encoder", dtype="float32", batch_size=128),
    judge=EncoderSpec(id=f"{_MINI}/judge", dtype="float32", batch_size=128),
    datasets=("picturebook-coco", "picturebook-nocaps"),
    n_sources=120,
)

PAPER = Preset(
    name="paper",
    # ViT-L, tuned on COCO (paper 4.1). The hub's Salesforce/blip-image-captioning-large holds the
    # base weights ("arafed"), so the original caption checkpoint is converted once into this folder.
    captioner=CaptionerSpec(
        id="data/models/hub/blip-large-coco", batch_size=16,
        sender=Decoding(strategy="nucleus", p=0.9, min_tokens=10, max_tokens=30,
                        prompt="a picture of"),
        receiver=Decoding(strategy="greedy", min_tokens=10, max_tokens=30, prompt="a picture of"),
    ),
    generator=GeneratorSpec(
        id="stable-diffusion-v1-5/stable-diffusion-v1-5", steps=50, guidance=7.5, size=512,
        output_size=256, noise="candidate", safety_checker=True, batch_size=8,
    ),
    encoder=EncoderSpec(id="openai/clip-vit-large-patch14"),
    judge=EncoderSpec(id="openai/clip-vit-base-patch32"),
    datasets=("coco", "nocaps"),
    n_sources=2000,
    assumed=(
        "generator: 50 steps, guidance 7.5, the pipeline's own scheduler",
        "generator: drawn at 512 px and resized to the paper's 256 px",
        "generator: Stable Diffusion v1-5 (the paper says v1); safety checker on",
        "captioner: '10 to 30 words' (5.4.2) taken as 10 to 30 new wordpieces after the prompt; "
        "most caption words are one piece of BERT's vocabulary",
        "captioner: prompt 'a picture of', which is then removed, as in BLIP's public code",
        "receiver in text reconstruction: greedy",
        "judge: CLIP ViT-B/32 beside the paper's ViT-L/14",
    ),
)

# What the authors' public code does where it differs from the paper.
OFFICIAL = dataclasses.replace(
    PAPER,
    name="official",
    captioner=dataclasses.replace(
        PAPER.captioner,
        sender=Decoding(strategy="nucleus", p=0.9, min_tokens=5, max_tokens=20,
                        repetition_penalty=1.1, prompt="a picture of"),
        receiver=Decoding(strategy="greedy", min_tokens=5, max_tokens=20,
                          repetition_penalty=1.1, prompt="a picture of"),
    ),
    encoder=EncoderSpec(id="openai/clip-vit-base-patch32", projected=False),
    judge=EncoderSpec(id="openai/clip-vit-large-patch14"),
    assumed=(
        *PAPER.assumed[:3],
        "captioner: 5 to 20 tokens counted after the prompt (BLIP's own lengths include it)",
        "receiver in text reconstruction: greedy",
        "judge: CLIP ViT-L/14",
    ),
)

# A first look in minutes: one distilled step, so guidance is off.
FAST = dataclasses.replace(
    PAPER,
    name="fast",
    captioner=dataclasses.replace(PAPER.captioner, id="Salesforce/blip-image-captioning-base"),
    generator=GeneratorSpec(id="stabilityai/sdxl-turbo", variant="fp16", steps=1, guidance=0.0,
                            size=512, output_size=256, noise="source", batch_size=8),
    n_sources=100,
    assumed=("everything: a first look with a distilled generator, not the paper's set-up",),
)

PRESETS: dict[str, Preset] = {p.name: p for p in (MINI, PAPER, OFFICIAL, FAST)}


# --- reading and writing -----------------------------------------------------------------------

def get_preset(name_or_path: str | Path) -> Preset:
    """Return a preset by name, or build one from a TOML file that names its ``base``.

    Raises UserError for an unknown name, a missing or malformed file, an unknown or ill-typed key.
    """
    name = str(name_or_path)
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".toml"):
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)} "
                        "or give the path of a .toml file")
    return _preset_from_toml(Path(name))


def _preset_from_toml(path: Path, above: tuple[Path, ...] = ()) -> Preset:
    """Read a TOML preset; its name is the file's stem unless it sets ``name``.

    above: the files that have led here, each by naming the next as its base.
    """
    if path.resolve() in above:
        raise UserError(f"preset file {path} is its own base: name another one")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"preset file {path} does not exist: check the path") from error
    except (OSError, ValueError, RecursionError) as error:  # of TOML, UTF-8, numbers of many digits
        raise UserError(f"preset file {path} cannot be read as TOML: {error}") from error
    base_name = data.pop("base", None)
    if not isinstance(base_name, str):
        raise UserError(f"preset file {path}: add a line such as base = \"mini\"")
    # A base given as a file is looked up beside the file that names it.
    if base_name.endswith(".toml"):
        base = _preset_from_toml(path.parent / base_name, (*above, path.resolve()))
    else:
        base = get_preset(base_name)
    data.setdefault("name", path.stem)
    preset = _override(base, data, str(path))
    return preset if "assumed" in data else dataclasses.replace(preset, assumed=_still_assumed(base, preset))


def _still_assumed(base: Preset, preset: Preset) -> tuple[str, ...]:
    """What ``base`` assumes, less what it says of a model that ``preset`` plays in another way."""
    before, after = (json.loads(_rows_depend_on(one)) for one in (base, preset))
    parts = {"receiver in text reconstruction": "captioner"}
    subjects = [(line, line.partition(":")[0]) for line in base.assumed]
    return tuple(line for line, subject in subjects
                 if before.get(parts.get(subject, subject)) == after.get(parts.get(subject, subject)))


def _override(spec: Any, changes: Mapping[str, Any], where: str) -> Any:
    """Return ``spec`` with nested ``changes`` applied; ``where`` names the place for messages."""
    hints = typing.get_type_hints(type(spec))
    values: dict[str, Any] = {}
    for key, value in changes.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(hints)}")
        current = getattr(spec, key)
        place = f"{where}: {key}"
        if key == "judge" and value is False:  # TOML has no null: `judge = false` removes it
            values[key] = None
        elif isinstance(value, Mapping) and key == "judge" and current is None:
            values[key] = _override(EncoderSpec(id=value.get("id", "")), value, place)
        elif dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UserError(f"{place} must be a table, not {value!r}")
            values[key] = _override(current, value, place)
        else:
            values[key] = _coerce(value, hints[key], place)
    try:
        return dataclasses.replace(spec, **values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _coerce(value: Any, hint: Any, place: str) -> Any:
    """Check one TOML value against the field's type; ints pass as floats, arrays as tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        hint = next(argument for argument in arguments if argument is not type(None))
        return _coerce(value, hint, place)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{place} = {value!r}: choose one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{place} must be a list of strings, not {value!r}")
        return tuple(value)
    if hint is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    _check_plain(value, place)
    expected = Mapping if origin is not None else hint
    if not isinstance(value, expected) or (hint is int and isinstance(value, bool)):
        name = getattr(expected, "__name__", str(expected))
        raise UserError(f"{place} = {value!r}: expected {name}")
    return value


def _check_plain(value: Any, place: str) -> None:
    """Raise UserError for what ``run.json`` cannot hold, or must not: keys are published with it."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise UserError(f"{place}: {error}: values must be plain and finite, no date and no inf") from error
    if _names_secret(value) or _SECRET_ADDRESS.search(text):
        raise UserError(f"{place} holds a key or a password, and would be published with the run: take it "
                        "out, put it into an environment variable and name that in key_env")


def _names_secret(value: Any) -> bool:
    """Whether a table, or one within it, has a text under a name that keys and passwords have."""
    if not isinstance(value, Mapping):
        return isinstance(value, list) and any(map(_names_secret, value))
    return any((_SECRET_NAME.search(name) and isinstance(inner, str) and inner) or _names_secret(inner)
               for name, inner in value.items())


def preset_to_dict(preset: Any) -> dict[str, Any]:
    """Return a preset (or any part of one) as plain JSON types."""
    return {f.name: _plain(getattr(preset, f.name)) for f in dataclasses.fields(preset)}


def _plain(value: Any) -> Any:
    """One value as plain JSON types."""
    if dataclasses.is_dataclass(value):
        return preset_to_dict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in sorted(value.items())}
    return list(value) if isinstance(value, tuple) else value


def canonical_json(data: Any) -> str:
    """Serialise plain data in the one form that is hashed: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def preset_hash(preset: Preset) -> str:
    """SHA-256 (hex) of everything in a preset that can change a row."""
    return hashlib.sha256(_rows_depend_on(preset).encode("utf-8")).hexdigest()


def _rows_depend_on(preset: Preset) -> str:
    """Everything in a preset that can change a row, as canonical JSON.

    Left out: batch sizes and compilation (rows must not depend on them), what a remote model may
    cost, the dataset, counts and seed (a run names those itself), and words for humans.
    """
    data = preset_to_dict(preset)
    for key in ("name", "assumed", "datasets", "n_sources", "n_candidates", "seed"):
        del data[key]
    for part in ("captioner", "generator", "encoder", "judge"):
        if data[part] is not None:
            data[part].pop("batch_size")
            data[part].pop("compile", None)
            for money in ("price", "cap"):
                data[part]["options"].pop(money, None)
    return canonical_json(data)
