"""Presets: which models take part, how they decode, and on which data. Validated data, no behaviour.

Every preset is a TOML file in ``data/presets``; your own names a ``base`` and overrides single fields (README.md).
Token counts are new tokens: after the prompt, without the end token. Sizes are in pixels (square).
"""

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lib.base import ROOT, UserError, user_path

PRESETS = ROOT / "data" / "presets"
# In JSON: a text under a name such as api_key (eos_token and sort_key are none), or inside a URL.
SECRET = re.compile(
    r'"(?!(?:eos|bos|pad|sep|cls|mask|unk|sort|start|end|stop)_)(?:[^"]*(?:[_-]|api))?'
    r'(?:key|token|secret|password|authorization)": \[*"[^"]'
    r'|://[^/@\s"]*:[^/@\s"]+@|[?&](?:[^=&"]*[_-]|api)?(?:key|token|secret|password)=', re.IGNORECASE)


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys and values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Decoding(Settings):
    """How a captioner turns next-token distributions into a caption (paper 3.2)."""

    strategy: Literal["nucleus", "greedy", "beam", "top_k"] = "nucleus"
    p: float = Field(0.9, gt=0, le=1)
    k: int = Field(50, ge=1)
    beams: int = Field(5, ge=1)
    temperature: float = Field(1.0, gt=0)
    min_tokens: int = Field(0, ge=0)
    max_tokens: int = Field(30, ge=1)
    repetition_penalty: float = Field(1.0, gt=0)
    prompt: str = ""

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} exceeds max_tokens = {self.max_tokens}")
        return self

    @property
    def deterministic(self) -> bool:
        """Whether every seed gives the same caption."""
        return self.strategy in ("greedy", "beam")


class ModelSettings(Settings):
    """What every model has. id: a hub name, or a folder relative to the repository's root.

    adapter: a name that ``lib.models`` knows, or ``module:Class`` of your own; options: what that
    adapter takes besides. attention: a transformers implementation such as "sdpa"; "auto" leaves it.
    """

    id: str = Field(min_length=1)
    adapter: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    attention: str = "auto"
    batch_size: int = Field(16, ge=1)
    options: dict[str, Any] = {}


class CaptionerSettings(ModelSettings):
    """An image-to-text model. sender: samples candidate captions (3.5); receiver: captions generated images (3.6)."""

    adapter: str = "blip"
    sender: Decoding = Decoding()
    receiver: Decoding = Decoding(strategy="greedy")

    @model_validator(mode="after")
    def _prompts(self) -> Self:
        config = ROOT / Path(self.id).expanduser() / "config.json"  # others are checked when they are loaded
        text = json.loads(config.read_text(encoding="utf-8")).get("text_config", {}) if config.is_file() else {}
        longest = text.get("max_position_embeddings", math.inf)
        for decoding in (self.sender, self.receiver):
            least = 1 + len(decoding.prompt.split()) + decoding.max_tokens  # a word is a token or more
            if least > longest:
                raise ValueError(f"prompt and max_tokens need {least} tokens, {self.id} reads {longest}: shorten them")
        return self


class GeneratorSettings(ModelSettings):
    """A text-to-image model. Images are drawn at ``size`` and resized to ``output_size`` (pixels).

    scheduler: a diffusers class, None for the pipeline's own; lora: a hub name or folder whose weights are fused;
    variant: suffix of the weight files, such as "fp16"; noise: what an image's noise is drawn for, the source (all
    its candidates share it) or each candidate.
    """

    adapter: str = "diffusers"
    batch_size: int = Field(8, ge=1)
    steps: int = Field(50, ge=1, le=1000)
    guidance: float = Field(7.5, ge=0)
    size: int = Field(512, ge=8, multiple_of=8)
    output_size: int = Field(256, ge=1)
    scheduler: str | None = Field(None, pattern=r"^\w+Scheduler$")
    noise: Literal["source", "candidate"] = "candidate"
    safety_checker: bool = False
    lora: str | None = None
    lora_revision: str | None = None
    variant: str | None = None
    compile: bool = False


class EncoderSettings(ModelSettings):
    """An embedding model. projected: use the shared space instead of a tower's own features;
    prompt: what stands before a caption in CLIPScore (Hessel et al. 2021)."""

    adapter: str = "clip"
    batch_size: int = Field(64, ge=1)
    projected: bool = True
    prompt: str = "A photo depicts"


class Preset(Settings):
    """One set-up of the round trips. assumed: by part, what the paper does not state.

    shards_at_once: batches of sources made side by side in one process, which pays for small models on a processor;
    above one, ./run_all.sh executes notebooks 01 and 02 side by side as well.
    """

    name: str = Field(pattern=r"^[^\s./\\][^/\\\x00-\x1f]{0,79}$")
    captioner: CaptionerSettings
    generator: GeneratorSettings
    encoder: EncoderSettings
    second_encoder: EncoderSettings | None = None
    similarity: Literal["cosine", "euclidean"] = "cosine"
    datasets: list[str] = Field(min_length=1)
    n_sources: int = Field(2000, ge=1)
    n_candidates: int = Field(10, ge=1)
    seed: int = 0
    shards_at_once: int = Field(1, ge=1)
    assumed: dict[str, list[str]] = {}


def load_preset(name_or_path: str | Path) -> Preset:
    """Return the preset of that name in ``data/presets``, or of that TOML file.

    Raises UserError in one line for an unknown name, a file that cannot be read, or a bad key or value.
    """
    path = _file_of(str(name_or_path))
    settings = _merged(path, ())
    if SECRET.search(json.dumps(settings, default=str)):  # settings are published with a run
        raise UserError(f"preset file {path} holds a key or password, which would be published with the run: put it "
                        "into an environment variable and name that in key_env")
    try:
        return Preset.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place, said = ".".join(map(str, first["loc"])) or "settings", first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] == "value_error" else f" (given: {first['input']!r:.80})"
        raise UserError(f"preset file {path}: {place}: {said}{given}") from error


def row_settings(preset: Preset) -> dict[str, Any]:
    """Return all of a preset that can change a row, as plain data; revisions are left to what identifies the weights."""
    idle = dict.fromkeys(("batch_size", "compile", "revision", "lora_revision"), True)
    idle |= {"options": {"price": True, "cap": True}}
    own = dict.fromkeys(("name", "assumed", "datasets", "n_sources", "n_candidates", "seed", "shards_at_once"), True)
    parts = dict.fromkeys(("captioner", "generator", "encoder", "second_encoder"), idle)
    return preset.model_dump(mode="json", exclude=own | parts)


def _file_of(name: str, beside: Path | None = None) -> Path:
    """The TOML file that a name or path means; a base is looked up beside the file that names it."""
    if name.endswith(".toml"):
        return beside / Path(name).expanduser() if beside else Path(user_path(name))
    known = sorted(path.stem for path in PRESETS.glob("*.toml"))
    if name not in known:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(known)} or give a .toml file")
    return PRESETS / f"{name}.toml"


def _merged(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file, merged over those of its base."""
    if path.resolve() in above:
        raise UserError(f"preset file {path} is its own base: name another one")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"preset file {path} cannot be read: {error}") from error
    base, data = data.pop("base", None), {"name": path.stem} | data
    if base is not None:
        return _override(_merged(_file_of(str(base), path.parent), (*above, path.resolve())), data)
    if path.parent != PRESETS:
        raise UserError(f'preset file {path}: add a line such as base = "mini"')
    return data


def _override(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes applied; another model has another revision, and its assumptions no longer hold."""
    merged = base | {key: _override(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict)
                     else value for key, value in changes.items()}
    for model, revision in (("id", "revision"), ("lora", "lora_revision")):
        if model in changes and revision in base and revision not in changes:
            merged[revision] = None
    if "assumed" in base and "assumed" not in changes:
        merged["assumed"] = {part: lines for part, lines in base["assumed"].items() if part not in changes}
    if merged.get("second_encoder") is False:  # TOML has no null
        merged["second_encoder"] = None
    return merged
