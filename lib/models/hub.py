"""From a preset's model id to a folder of safetensors: local, in the hub's cache, or fetched.

A relative folder is looked up from the repository's root. What is not cached is fetched from the hub
unless ``HF_HUB_OFFLINE`` is set. Only safetensors are read, and no code of a checkpoint is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Sequence
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
    def place(self) -> Path:
        """The folder that the id would mean."""
        return ROOT / Path(self.id).expanduser()

    @property
    def local(self) -> bool:
        """Whether the id means a folder rather than ``owner/name`` on the hub."""
        return self.id.startswith(("/", ".", "~")) or self.id.count("/") != 1 or self.place.is_dir()

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
    pipeline = Wanted(settings.id, settings.revision, patterns,
                      () if settings.safety_checker else ("safety_checker/*",))
    lora = Wanted(settings.lora or "", settings.lora_revision, ("*.safetensors", "*.json"))
    return [pipeline, lora] if settings.lora else [pipeline]


def folder_of(model: Wanted) -> Path:
    """Return the folder that holds a model, fetching it from the hub if that is allowed.

    Raises UserError in one line, with the size where it is known, if the model cannot be had.
    """
    folder = _present(model)
    if not model.local:
        return folder or _fetch(model)
    if folder is None and model.place.is_dir():
        raise UserError(f"model folder {model.place} lacks *.safetensors or folders of its parts (pickles are never "
                        f"read: convert them); {HINT}")
    if folder is None:
        remedy = (f"make it{_size(model)} with ./run_all.sh --fetch --preset PRESET" if model.id == BLIP_FOLDER else
                  "restore it with git checkout, or check the id in the preset (a folder, or owner/name on the hub)")
        raise UserError(f"model folder {model.place} is missing: {remedy}; {HINT}")
    for index in folder.rglob("*.safetensors.index.json"):
        if (whole := index.with_name(index.name.removesuffix(".index.json"))).is_file():
            raise UserError(f"model folder {index.parent} holds both {whole.name} and the shards that {index.name} "
                            "lists: remove one of them")
    return folder


def _present(model: Wanted) -> Path | None:
    """The folder of a model that is complete on this machine, else None."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = model.place if model.local else Path(model.snapshot(local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    return folder if _complete(folder, model) else None


def _complete(folder: Path, model: Wanted) -> bool:
    """Whether a folder holds weights for every part: a fetch may be cut off, or a cache hold another variant."""
    index = folder / "model_index.json"
    if not index.is_file():
        return _has_weights(folder, folder, model.patterns)
    parts = [name for name, value in json.loads(index.read_text(encoding="utf-8")).items()
             if isinstance(value, list) and any(value) and f"{name}/*" not in model.skipped]
    return all(_has_weights(folder / name, folder, model.patterns) if (folder / name / "config.json").is_file()
               else (folder / name).is_dir() for name in parts)


def _has_weights(part: Path, root: Path, patterns: Sequence[str]) -> bool:
    """Whether one network has its file of weights or all shards of them."""
    from huggingface_hub.utils import filter_repo_objects

    files = [file.relative_to(root).as_posix() for file in part.glob("*.safetensors")]
    chosen = list(filter_repo_objects(files, allow_patterns=list(patterns)))
    totals = [name.split("-of-")[1][:5] for name in chosen if "-of-" in name]
    return len(chosen) > len(totals) or any(totals.count(total) == int(total) for total in totals)


def _fetch(model: Wanted) -> Path:
    """Fetch a model from the hub. Raises UserError in one line if it cannot be had."""
    try:
        if not _connected():
            raise ConnectionError("the hub cannot be reached, or HF_HUB_OFFLINE is set")
        log.warning("fetching %s from the hub%s", model.id, _size(model))
        folder = Path(model.snapshot())
    except Exception as error:  # the client raises many kinds, with long explanations; all mean: not fetched
        raise UserError(f"model {model.id} is missing{_size(model)}: {' '.join(str(error).split())[:400]}; check the id "
                        "and revision in the preset, fetch it ahead with ./run_all.sh --fetch --preset PRESET on a "
                        f"connected machine, or give a local folder as its id; {HINT}") from error
    if not _complete(folder, model):
        raise UserError(f"model {model.id} lacks *.safetensors of some of its parts: set variant in the preset if it "
                        'has them under another ending (such as "fp16"), or choose another model')
    return folder


def _connected() -> bool:
    """Whether the hub answers at all: its client would try six times before it says so."""
    from huggingface_hub import constants, get_session

    try:
        return not constants.HF_HUB_OFFLINE and get_session().head(constants.ENDPOINT, timeout=10) is not None
    except Exception:  # its HTTP library has many kinds; all mean: no answer
        return False


def _size(model: Wanted) -> str:
    """The download size in words, if it is known."""
    return f" (about {GB[model.id]} GB)" if model.id in GB else ""


def missing_models(preset: Preset) -> list[tuple[str, int]]:
    """Return (id, bytes to download) of the preset's models that are not on this machine.

    The hub tells the bytes; without a network they are estimates, 0 where nothing is known. An adapter
    class of your own is left out: it may need no files. Raises UserError for a local folder that is absent.
    """
    sizes, connected = [], _connected()
    for model in _absent(preset):
        size = int(1e9 * GB.get(model.id, 0))
        if model.local and model.id != BLIP_FOLDER:
            folder_of(model)
        elif connected and not model.local:
            with contextlib.suppress(Exception):  # no such model: the fetch itself says so
                size = sum(file.file_size or 0 for file in model.snapshot(dry_run=True) if file.will_download)
        sizes.append((model.id, size))
    return sizes


def fetch_models(preset: Preset) -> None:
    """Fetch the preset's models that are not on this machine; convert BLIP's checkpoint."""
    for model in _absent(preset):
        if model.id == BLIP_FOLDER:
            from lib.models.convert import fetch_blip

            fetch_blip(model.place)
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
    if not model.local and model.revision is not None:
        return f"{model.id}@{model.revision}"
    folder = _present(model)
    if folder is None or not model.local:
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
