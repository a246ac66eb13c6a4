"""A preset's models: which are missing, how large they are, how each is fetched and locked.

``lib.fetch`` puts them together with the datasets for ``./run_all.sh --fetch``.

The lock file ``data/models/hub.lock.json`` maps a hub id to the commit, and the address of a
single file to its SHA-256, as they were when first fetched: later fetches give the same weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib.convert import BLIP_CAPTION_URL, BLIP_TOKENIZER, SMALL_FILES, convert_blip, write_source
from lib.download import Part, Say, download, file_hash
from lib.errors import UserError
from lib.presets import REPO_ROOT, Preset
from lib.weights import (
    APPROXIMATE_GB,
    INDEX,
    LOCK_FILE,
    TRANSFORMERS_FILES,
    demand_safety_checker,
    is_local,
    locked_revision,
    model_folder,
    pipeline_files,
    repository_size,
    top_up,
    used_revision,
)

BLIP_FOLDER = "data/models/hub/blip-large-coco"


@dataclass(frozen=True)
class Wanted:
    """A model that a preset needs: which files of which commit."""

    id: str
    revision: str | None
    patterns: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def wanted_models(preset: Preset) -> list[Wanted]:
    """The preset's models, each once: those to fetch and those that are there.

    An adapter class of your own (``module:Class``) is left out: it may be a service that needs no
    files, and where it loads a hub model, ``model_folder`` fetches that then.
    """
    generator = preset.generator
    parts: list[Wanted] = []
    encoders = [spec for spec in (preset.encoder, preset.judge) if spec is not None]
    for spec in (preset.captioner, *encoders):
        if ":" not in spec.adapter:
            parts.append(Wanted(spec.id, spec.revision, TRANSFORMERS_FILES))
    if ":" not in generator.adapter:
        skipped = () if generator.safety_checker else ("safety_checker/*",)
        parts.append(Wanted(generator.id, generator.revision, pipeline_files(generator.variant),
                            skipped))
    if generator.lora is not None:
        parts.append(Wanted(generator.lora, None, ("*.safetensors", "*.json")))
    return list({part.id: part for part in parts}.values())


def missing_models(preset: Preset) -> list[Part]:
    """The preset's models that are not on this machine, with their sizes.

    Raises UserError for a local folder that is absent: no fetch can bring it.
    """
    parts, ask = [], True
    for wanted in wanted_models(preset):
        if _is_there(wanted):
            continue
        local = is_local(wanted.id)
        if local and wanted.id != BLIP_FOLDER:
            model_folder(wanted.id)
        told = None
        if ask and not local:
            told = repository_size(wanted.id, wanted.revision, wanted.patterns, wanted.skipped)
            ask = told is not None  # without a network each further question would wait in vain
        parts.append(Part(f"model {wanted.id}", told or _published_size(wanted.id),
                          partial(_fetch, wanted), about=told is None))
    return parts


def lock_models(preset: Preset, again: bool = False) -> None:
    """Lock the commits of the preset's models that are on this machine already, and bring their small
    files, which the cache may lack where another program has filled it.

    again: look for small files of locked models too; they may have been locked without a network.
    """
    for wanted in wanted_models(preset):
        new = again or locked_revision(wanted.id) is None
        if not is_local(wanted.id) and new and _is_there(wanted):
            folder = model_folder(wanted.id, wanted.revision, wanted.patterns, wanted.skipped, fetch=False)
            top_up(wanted.id, folder, wanted.patterns, wanted.skipped)
            _lock_revision(wanted, folder)


def _is_there(wanted: Wanted) -> bool:
    """Whether a model needs no fetching."""
    try:
        model_folder(wanted.id, wanted.revision, wanted.patterns, wanted.skipped, fetch=False)
    except UserError:
        return False
    return True


def _published_size(model_id: str) -> int | None:
    """Bytes from published parameter counts, None where nothing is known."""
    known = APPROXIMATE_GB.get(model_id)
    return None if known is None else int(known * 1e9)


def _fetch(wanted: Wanted, say: Say) -> Path:
    """Fetch one model and lock it."""
    if wanted.id == BLIP_FOLDER and not _is_there(wanted):
        return fetch_blip(REPO_ROOT / wanted.id, say)
    if INDEX in wanted.patterns and not wanted.skipped:  # gigabytes would come before a preset's mistake shows
        small = model_folder(wanted.id, wanted.revision, (INDEX,), weights=False)
        if (small / INDEX).is_file():  # a cache may hold other parts only
            demand_safety_checker(small, wanted.id)
    folder = model_folder(wanted.id, wanted.revision, wanted.patterns, wanted.skipped)
    _lock_revision(wanted, folder)
    return folder


def _lock_revision(wanted: Wanted, folder: Path) -> None:
    """Remember the commit of a hub model, unless the preset names one itself."""
    revision = used_revision(folder)
    if not is_local(wanted.id) and wanted.revision is None and revision is not None:
        lock(wanted.id, revision)


def fetch_blip(target: Path, say: Say = print, url: str = BLIP_CAPTION_URL,
               tokenizer: str = BLIP_TOKENIZER, head_width: int = 64) -> Path:
    """Fetch the original COCO-tuned BLIP checkpoint, convert it, and drop the pickle.

    The server states an MD5; the SHA-256 of the first fetch is locked and asked for later.
    """
    file = target.parent / Path(url).name
    download(url, file, sha256=locked_revision(url), say=say)
    digest = file_hash(file)
    small = model_folder(tokenizer, None, SMALL_FILES, weights=False)
    say(f"converting {file.name}")
    convert_blip(file, small, target, head_width)
    lock(url, digest)
    write_source(target, url, digest)
    file.unlink()
    return target


def lock(name: str, value: str) -> None:
    """Remember which commit or hash was fetched."""
    known = json.loads(LOCK_FILE.read_text(encoding="utf-8")) if LOCK_FILE.is_file() else {}
    if known.get(name) != value:
        _write_json(LOCK_FILE, known | {name: value})


def _write_json(file: Path, data: dict[str, str]) -> None:
    """Write to a temporary name, then replace."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, file)

