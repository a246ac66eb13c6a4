"""From a preset's model id to a folder of safetensors: local, in the hub's cache, or fetched."""

import contextlib
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.base import ROOT, UserError
from lib.presets import ModelSettings, Preset

log = logging.getLogger(__name__)

BLIP_FOLDER = "data/models/hub/blip-large-coco"  # converted from the checkpoint of BLIP's authors
HINT = "--preset mini needs no download"
# Download sizes where the hub cannot be asked: published parameter counts times bytes a weight.
GB = {"stable-diffusion-v1-5/stable-diffusion-v1-5": 5.5, "stabilityai/sdxl-turbo": 6.9, BLIP_FOLDER: 1.9,
      "openai/clip-vit-large-patch14": 1.7, "openai/clip-vit-base-patch32": 0.6,
      "Salesforce/blip-image-captioning-large": 1.9}
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_SHARD = "-?????-of-?????"
_SAMPLED_BEYOND = 64 << 20  # bytes: of larger files the fingerprint reads samples


@dataclass(frozen=True)
class Wanted:
    """A model that a preset needs: which files of which commit."""

    id: str
    revision: str | None
    patterns: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def place(self) -> Path | None:
        """The folder that the id means; None where it means ``owner/name`` on the hub."""
        folder = ROOT / Path(self.id).expanduser()
        local = self.id.startswith(("/", ".", "~")) or self.id.count("/") != 1 or folder.is_dir()
        return folder if local else None

    def snapshot(self, **options: Any) -> Any:
        """Return what ``snapshot_download`` gives for these files."""
        from huggingface_hub import snapshot_download

        return snapshot_download(self.id, revision=self.revision, allow_patterns=list(self.patterns),
                                 ignore_patterns=list(self.skipped) or None, **options)


def wanted(settings: ModelSettings) -> list[Wanted]:
    """Return what one part of a preset needs: its model and, for a generator, its LoRA.

    Weights in the layouts of the two libraries and everything small: no pickles, no half-precision doubles,
    no single-file originals beside a pipeline's folders.
    """
    if not hasattr(settings, "lora"):
        patterns = (*SMALL_FILES, "model.safetensors", f"model{_SHARD}.safetensors")
        return [Wanted(settings.id, settings.revision, patterns)]
    ending = f".{settings.variant}" if settings.variant else ""
    weights = [f"*/{stem}{part}{ending}{rest}.safetensors" for stem in ("model", "diffusion_pytorch_model")
               for part, rest in (("", ""), ("", _SHARD), (_SHARD, ""))]
    patterns = ("model_index.json", *(f"*/{pattern}" for pattern in SMALL_FILES), *weights)
    pipeline = Wanted(settings.id, settings.revision, patterns, () if settings.safety_checker else ("safety_checker/*",))
    lora = Wanted(settings.lora or "", settings.lora_revision, ("*.safetensors", "*.json"))
    return [pipeline, lora] if settings.lora else [pipeline]


def folder_of(model: Wanted) -> Path:
    """Return the folder that holds a model, fetched if need be; UserError, with its size, if it cannot be had."""
    folder = _present(model)
    if model.place is None:
        return folder or _fetch(model)
    if folder is None:
        remedy = "restore it with git checkout, or check the id in the preset (a folder, or owner/name on the hub)"
        if model.id == BLIP_FOLDER:
            remedy = f"make it (about {GB[model.id]} GB) with ./run_all.sh --fetch --preset PRESET"
        raise UserError(f"model folder {model.place} is missing: {remedy}; {HINT}")
    for index in folder.rglob("*.safetensors.index.json"):
        if (whole := index.with_name(index.name.removesuffix(".index.json"))).is_file():
            raise UserError(f"model folder {index.parent} holds both {whole.name} and the shards that {index.name} "
                            "lists: remove one of them")
    return folder


def _present(model: Wanted) -> Path | None:
    """The folder of a model on this machine; None where it is absent, or its download was cut off."""
    if model.place is not None:
        return model.place if model.place.is_dir() else None
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(model.snapshot(local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _fetch(model: Wanted) -> Path:
    """Fetch a model from the hub. Raises UserError in one line if it cannot be had."""
    size = f" (about {GB[model.id]} GB)" if model.id in GB else ""
    try:
        if not _connected():
            raise ConnectionError("the hub cannot be reached, or HF_HUB_OFFLINE is set")
        log.warning("fetching %s from the hub%s", model.id, size)
        return Path(model.snapshot())
    except Exception as error:  # the client raises many kinds, with long explanations; all mean: not fetched
        raise UserError(f"model {model.id} is missing{size}: {' '.join(str(error).split())[:400]}; check the id "
                        "and revision in the preset, fetch it ahead with ./run_all.sh --fetch --preset PRESET on a "
                        f"connected machine, or give a local folder as its id; {HINT}") from error


def _connected() -> bool:
    """Whether the hub answers at all: its client would try six times before it says so."""
    from huggingface_hub import constants, get_session

    try:
        return not constants.HF_HUB_OFFLINE and get_session().head(constants.ENDPOINT, timeout=10) is not None
    except Exception:  # its HTTP library has many kinds; all mean: no answer
        return False


def missing_models(preset: Preset) -> list[tuple[str, int]]:
    """Return (id, bytes to download) of the preset's models that are not on this machine.

    The hub tells the bytes; without a network they are estimates, 0 where nothing is known. An adapter
    class of your own is left out: it may need no files. Raises UserError for a local folder that is absent.
    """
    sizes, connected = [], _connected()
    for model in _absent(preset):
        size = int(1e9 * GB.get(model.id, 0))
        if model.place is None and connected:
            with contextlib.suppress(Exception):  # no such model: the fetch itself says so
                size = sum(file.file_size or 0 for file in model.snapshot(dry_run=True) if file.will_download)
        elif model.place is not None and model.id != BLIP_FOLDER:
            folder_of(model)
        sizes.append((model.id, size))
    return sizes


def fetch_models(preset: Preset) -> None:
    """Fetch the preset's models that are not on this machine; convert BLIP's checkpoint."""
    for model in _absent(preset):
        if model.id == BLIP_FOLDER:
            from lib.models.convert import fetch_blip

            fetch_blip(ROOT / BLIP_FOLDER)
        else:
            folder_of(model)


def _absent(preset: Preset) -> list[Wanted]:
    """What a preset needs and this machine lacks, each once."""
    parts = (preset.captioner, preset.encoder, preset.second_encoder, preset.generator)
    needed = [model for settings in parts if settings is not None and ":" not in settings.adapter
              for model in wanted(settings)]
    return [model for model in dict.fromkeys(needed) if _present(model) is None]


def used_revision(folder: Path) -> str | None:
    """Return the commit of a hub snapshot, or what a converted folder was made from; None for others."""
    source = folder / "source.json"
    if source.is_file():
        return str(json.loads(source.read_text(encoding="utf-8"))["revision"])
    return folder.name if folder.parent.name == "snapshots" else None


def is_here(settings: ModelSettings) -> bool:
    """Return whether a model's files are on this machine, its LoRA included."""
    return all(_present(model) for model in wanted(settings))


def weights_fingerprint(settings: ModelSettings) -> str | None:
    """Return what identifies a model's weights, its LoRA included; None where they are not on this machine.

    "sha256:..." of a local folder's content, "id@commit" of a hub model, the id of an own adapter without files.
    """
    parts = [_fingerprint(model) for model in wanted(settings)]
    if parts[0] is None and ":" in settings.adapter:
        parts[0] = f"{settings.id}@{settings.revision}" if settings.revision else settings.id
    return None if None in parts else " + ".join(map(str, parts))


def _fingerprint(model: Wanted) -> str | None:
    """The fingerprint of one folder or hub model."""
    if model.place is None and model.revision is not None:
        return f"{model.id}@{model.revision}"
    folder = _present(model)
    if folder is None or model.place is None:
        return folder and f"{model.id}@{folder.name}"
    digest, kinds = hashlib.sha256(), (".safetensors", *(pattern[1:] for pattern in SMALL_FILES))
    for file in sorted(file for file in folder.rglob("*") if file.suffix in kinds and file.is_file()):
        size, piece = file.stat().st_size, 1 << 20
        digest.update(f"{file.relative_to(folder).as_posix()}\0{size}\0".encode())
        with file.open("rb") as stream:  # the whole file; of a very large one, 64 samples of a megabyte
            step = piece if size <= _SAMPLED_BEYOND else (size - piece) // 62
            for start in (*range(0, size, step), max(0, size - piece)):
                stream.seek(start)
                digest.update(stream.read(piece))
    return f"sha256:{digest.hexdigest()}"
