"""From a preset's model id to a folder of safetensors: local, in the hub's cache, or fetched.

A relative folder is looked up from the repository's root. What is not cached is fetched from the hub
unless ``HF_HUB_OFFLINE`` is set. Only safetensors are read, and no code of a checkpoint is ever run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.base import ROOT, UserError
from lib.presets import GeneratorSettings, ModelSettings, Preset

log = logging.getLogger(__name__)

BLIP_FOLDER = "data/models/hub/blip-large-coco"  # converted from the checkpoint of BLIP's authors
HINT = "--preset mini needs no download"
# Download sizes in GB where the hub cannot be asked: published parameter counts times bytes a weight.
APPROXIMATE_GB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 5.5, "stabilityai/sdxl-turbo": 6.9,
    "openai/clip-vit-large-patch14": 1.7, "openai/clip-vit-base-patch32": 0.6, BLIP_FOLDER: 1.9,
    "Salesforce/blip-image-captioning-base": 1.0, "Salesforce/blip-image-captioning-large": 1.9,
}
# Weights in the layouts of the two libraries, and everything small: no pickles, no half-precision
# doubles, no single-file originals beside a pipeline's folders.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_SHARD = "-?????-of-?????"
_TRANSFORMERS = (*SMALL_FILES, "model.safetensors", f"model{_SHARD}.safetensors")
_LORA = ("*.safetensors", "*.json")
_SAMPLED_BEYOND = 64 << 20  # bytes: of larger files the fingerprint reads samples


@dataclass(frozen=True)
class Wanted:
    """A model that a preset needs: which files of which commit."""

    id: str
    revision: str | None
    patterns: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        """Whether the id means a folder rather than ``owner/name`` on the hub."""
        path = self.id
        return Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") != 1 or _at(path).is_dir()

    def request(self) -> dict[str, object]:
        """The arguments of ``snapshot_download``."""
        return {"repo_id": self.id, "revision": self.revision, "allow_patterns": list(self.patterns),
                "ignore_patterns": list(self.skipped) or None}


def _at(model_id: str) -> Path:
    """The place of a local folder."""
    return ROOT / Path(model_id).expanduser()


def _wanted(settings: ModelSettings) -> Wanted:
    """The files that one part of a preset needs."""
    if not isinstance(settings, GeneratorSettings):
        return Wanted(settings.id, settings.revision, _TRANSFORMERS)
    ending = f".{settings.variant}" if settings.variant else ""
    weights = [f"*/{stem}{part}{ending}{rest}.safetensors" for stem in ("model", "diffusion_pytorch_model")
               for part, rest in (("", ""), ("", _SHARD), (_SHARD, ""))]
    patterns = ("model_index.json", *(f"*/{pattern}" for pattern in SMALL_FILES), *weights)
    return Wanted(settings.id, settings.revision, patterns, () if settings.safety_checker else ("safety_checker/*",))


def _wanted_lora(settings: ModelSettings) -> Wanted | None:
    """The files of a generator's LoRA, if it has one."""
    lora = getattr(settings, "lora", None)
    return Wanted(lora, settings.lora_revision, _LORA) if lora else None


def model_folder(settings: ModelSettings) -> Path:
    """Return the folder that holds a model, fetching it from the hub if that is allowed.

    Raises UserError in one line, with the size where it is known, if the model cannot be had.
    """
    return _folder(_wanted(settings))


def lora_folder(settings: GeneratorSettings) -> Path:
    """Return the folder of a generator's LoRA; as ``model_folder``."""
    return _folder(Wanted(str(settings.lora), settings.lora_revision, _LORA))


def _folder(wanted: Wanted) -> Path:
    """The folder of what is wanted, fetched if need be and complete."""
    folder = _present(wanted)
    if folder is None and not wanted.local:
        log.warning("fetching %s from the hub%s", wanted.id, _size(wanted.id))
        folder = _fetch(wanted)
    if folder is None:
        place = _at(wanted.id)
        if place.is_dir():
            pickled = any(place.rglob("*.bin")) or any(place.rglob("*.pth")) or any(place.rglob("*.ckpt"))
            raise UserError(f"model folder {place} lacks *.safetensors{' (only pickles, which are never read)' * pickled}"
                            f": convert them, or choose another model; {HINT}")
        remedy = "restore it with git checkout" if wanted.id.startswith("data/models/mini") else (
            f"make it with ./run_all.sh --fetch --preset PRESET{_size(wanted.id)}" if wanted.id == BLIP_FOLDER
            else "check the id in the preset (a folder, or owner/name on the hub)")
        raise UserError(f"model folder {place} is missing: {remedy}; {HINT}")
    if wanted.local:
        _check_one_choice(folder)
    return folder


def _present(wanted: Wanted) -> Path | None:
    """The folder of a model that is complete on this machine, else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if wanted.local:
        folder = _at(wanted.id)
    else:
        try:
            folder = Path(snapshot_download(**wanted.request(), local_files_only=True))
        except (LocalEntryNotFoundError, FileNotFoundError):
            return None
    return folder if _complete(folder, wanted) else None


def _complete(folder: Path, wanted: Wanted) -> bool:
    """Whether a folder holds weights for every part: a fetch may be cut off, or a cache hold another variant."""
    index = folder / "model_index.json"
    if not index.is_file():
        return _has_weights(folder, folder, wanted.patterns)
    named = json.loads(index.read_text(encoding="utf-8"))
    parts = [name for name, value in named.items() if isinstance(value, list) and any(value)
             and f"{name}/*" not in wanted.skipped]
    return all(_has_weights(folder / name, folder, wanted.patterns) if (folder / name / "config.json").is_file()
               else (folder / name).is_dir() for name in parts)


def _has_weights(part: Path, root: Path, patterns: Sequence[str]) -> bool:
    """Whether one network has its file of weights or all shards of them."""
    from huggingface_hub.utils import filter_repo_objects

    files = [file.relative_to(root).as_posix() for file in part.glob("*.safetensors")]
    chosen = list(filter_repo_objects(files, allow_patterns=list(patterns)))
    totals = [name.split("-of-")[1][:5] for name in chosen if "-of-" in name]
    return any("-of-" not in name for name in chosen) or any(totals.count(total) == int(total) for total in totals)


def _check_one_choice(folder: Path) -> None:
    """Raise UserError where a folder holds both a whole file of weights and shards of them."""
    for index in folder.rglob("*.safetensors.index.json"):
        whole = index.with_name(index.name.removesuffix(".index.json"))
        if whole.is_file():
            raise UserError(f"model folder {index.parent} holds both {whole.name} and the shards that {index.name} "
                            "lists: remove one of them")


def _fetch(wanted: Wanted) -> Path:
    """Fetch a model from the hub. Raises UserError in one line if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        folder = Path(snapshot_download(**wanted.request()))
    except GatedRepoError as error:
        raise UserError(f"model {wanted.id} is given to logged-in users only: accept its terms on the hub and set "
                        "HF_TOKEN, or choose another model") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"model {wanted.id} does not exist: neither on the hub (unless it is private) nor as a folder; "
                        f"check the id in the preset; {HINT}") from error
    except RevisionNotFoundError as error:
        raise UserError(f"model {wanted.id} has no revision {wanted.revision}: check revision in the preset") from error
    except Exception as error:  # the client raises many kinds; all mean: not fetched
        said = (str(error).strip().splitlines() or ["no message"])[0][:160]
        raise UserError(f"model {wanted.id} is missing{_size(wanted.id)} and cannot be fetched ({said}): fetch it ahead "
                        "with ./run_all.sh --fetch --preset PRESET on a connected machine, or give a local folder as "
                        f"its id; {HINT}") from error
    if not _complete(folder, wanted):
        raise UserError(f"model {wanted.id} lacks *.safetensors of some of its parts: set variant in the preset if it "
                        'has them under another ending (such as "fp16"), or choose another model')
    return folder


def _size(model_id: str) -> str:
    """The download size in words, if it is known."""
    return f" (about {APPROXIMATE_GB[model_id]} GB)" if model_id in APPROXIMATE_GB else ""


def missing_models(preset: Preset) -> list[tuple[str, int]]:
    """Return (id, bytes to download) of the preset's models that are not on this machine.

    The hub tells the bytes; without a network they are estimates, 0 where nothing is known. An adapter
    class of your own is left out: it may need no files. Raises UserError for a local folder that is absent.
    """
    from huggingface_hub import snapshot_download

    missing = []
    for wanted in _all_wanted(preset):
        size = int(1e9 * APPROXIMATE_GB.get(wanted.id, 0))
        if not wanted.local:
            try:
                size = sum(file.file_size or 0 for file in snapshot_download(**wanted.request(), dry_run=True)
                           if file.will_download)
            except Exception as error:  # no network, no such model: the fetch itself says so
                log.debug("size of %s unknown: %s", wanted.id, error)
        elif wanted.id != BLIP_FOLDER:
            _folder(wanted)
        missing.append((wanted.id, size))
    return missing


def fetch_models(preset: Preset) -> None:
    """Fetch the preset's models that are not on this machine; convert BLIP's checkpoint."""
    for wanted in _all_wanted(preset):
        if wanted.id == BLIP_FOLDER:
            from lib.models.convert import fetch_blip

            fetch_blip(_at(BLIP_FOLDER))
        else:
            _folder(wanted)


def _all_wanted(preset: Preset) -> list[Wanted]:
    """What a preset needs and this machine lacks, each once."""
    parts = (preset.captioner, preset.encoder, preset.second_encoder, preset.generator)
    wanted = [one for settings in parts if settings is not None and ":" not in settings.adapter
              for one in (_wanted(settings), _wanted_lora(settings)) if one is not None]
    return [one for one in dict.fromkeys(wanted) if _present(one) is None]


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
    parts = [_fingerprint(wanted) for wanted in (_wanted(settings), _wanted_lora(settings)) if wanted is not None]
    if parts[0] is None and ":" in settings.adapter:
        parts[0] = f"{settings.id}@{settings.revision}" if settings.revision else settings.id
    return None if None in parts else " + ".join(map(str, parts))


def _fingerprint(wanted: Wanted) -> str | None:
    """The fingerprint of one folder or hub model."""
    if not wanted.local and wanted.revision is not None:
        return f"{wanted.id}@{wanted.revision}"
    folder = _present(wanted)
    if folder is None or not wanted.local:
        return folder and f"{wanted.id}@{folder.name}"
    digest = hashlib.sha256()
    kinds = (".safetensors", *(pattern[1:] for pattern in SMALL_FILES))
    for file in sorted(file for file in folder.rglob("*") if file.suffix in kinds and file.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        _add(digest, file)
    return f"sha256:{digest.hexdigest()}"


def _add(digest: hashlib._Hash, file: Path) -> None:
    """Add a file's content to a digest; of a very large one, 64 samples of a megabyte."""
    size, piece = file.stat().st_size, 1 << 20
    step = piece if size <= _SAMPLED_BEYOND else max(piece, (size - piece) // 63)
    with file.open("rb") as stream:
        for start in range(0, size, step):
            stream.seek(start)
            digest.update(stream.read(piece))
