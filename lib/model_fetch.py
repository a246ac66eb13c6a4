"""Fetch a preset's models ahead of a run, tell their size first, and lock what was fetched.

The lock file ``data/models/hub.lock.json`` maps a hub id to the commit, and the address of a
single file to its SHA-256, as they were when first fetched: later fetches give the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib.convert import BLIP_CAPTION_URL, BLIP_TOKENIZER, SMALL_FILES, convert_blip, write_source
from lib.download import download, file_hash
from lib.errors import UserError
from lib.presets import REPO_ROOT, Preset, get_preset
from lib.weights import (
    APPROXIMATE_GB,
    LOCK_FILE,
    TRANSFORMERS_FILES,
    is_local,
    locked_revision,
    model_folder,
    pipeline_files,
    repository_size,
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
    """The preset's models, each once: those to fetch and those that are there."""
    generator = preset.generator
    parts: list[Wanted] = []
    encoders = [spec for spec in (preset.encoder, preset.judge) if spec is not None]
    for spec in (preset.captioner, *encoders):
        if "api_models" not in spec.adapter:
            parts.append(Wanted(spec.id, spec.revision, TRANSFORMERS_FILES))
    if "api_models" not in generator.adapter:
        skipped = () if generator.safety_checker else ("safety_checker/*",)
        parts.append(Wanted(generator.id, generator.revision, pipeline_files(generator.variant),
                            skipped))
    if generator.lora is not None:
        parts.append(Wanted(generator.lora, None, ("*.safetensors", "*.json")))
    return list({part.id: part for part in parts}.values())


def fetch_models(preset: Preset, say: Callable[[str], None] = print) -> list[Path]:
    """Fetch what a preset needs; say the sizes before. Returns the models' folders."""
    wanted = wanted_models(preset)
    missing = [part for part in wanted if not _is_there(part)]
    sizes = [(part, _size(part)) for part in missing]
    for part, size in sizes:
        say(f"{part.id}: " + ("size unknown" if size is None else f"{size / 1e9:.1f} GB"))
    total = sum(size or 0 for _, size in sizes)
    say(f"models to fetch: {len(missing)} of {len(wanted)}, {total / 1e9:.1f} GB in all")
    return [_fetch(part, say) for part in wanted]


def _is_there(part: Wanted) -> bool:
    """Whether a model needs no fetching."""
    if is_local(part.id):
        return any((REPO_ROOT / part.id).rglob("*.safetensors"))
    try:
        model_folder(part.id, part.revision, part.patterns, part.skipped, fetch=False)
    except UserError:
        return False
    return True


def _size(part: Wanted) -> int | None:
    """Bytes to fetch: from the hub, else from published parameter counts, else unknown."""
    if not is_local(part.id):
        size = repository_size(part.id, part.revision, part.patterns, part.skipped)
        if size is not None:
            return size
    known = APPROXIMATE_GB.get(part.id)
    return None if known is None else int(known * 1e9)


def _fetch(part: Wanted, say: Callable[[str], None]) -> Path:
    """Fetch one model and lock it."""
    if part.id == BLIP_FOLDER and not _is_there(part):
        return fetch_blip(REPO_ROOT / part.id, say)
    folder = model_folder(part.id, part.revision, part.patterns, part.skipped)
    revision = used_revision(folder)
    if not is_local(part.id) and part.revision is None and revision is not None:
        lock(part.id, revision)
    say(f"{part.id}: ready")
    return folder


def fetch_blip(target: Path, say: Callable[[str], None] = print, url: str = BLIP_CAPTION_URL,
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


def main() -> None:
    """`python -m lib.model_fetch PRESET`: fetch ahead what a preset needs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("preset", help="a name such as paper, or a .toml file")
    try:
        fetch_models(get_preset(parser.parse_args().preset))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
