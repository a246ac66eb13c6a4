"""From a preset's model id to a folder of safetensors, and from there to a model.

Weights come from a local folder or from the hub's cache; what is not cached is fetched unless
``HF_HUB_OFFLINE`` is set. Only safetensors are read and no code of a checkpoint is ever run.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from lib.download import offline
from lib.errors import UserError
from lib.hardware import first_line, is_out_of_memory
from lib.presets import REPO_ROOT

log = logging.getLogger(__name__)

LOCK_FILE = REPO_ROOT / "data" / "models" / "hub.lock.json"
CONVERTED = REPO_ROOT / "data" / "models" / "hub"
INDEX = "model_index.json"  # of a pipeline: its parts and their classes
HINT = "--preset mini needs no download"

# Download sizes in GB: published parameter counts times four bytes, or two for the half-precision
# files that the preset `fast` names (a fetch tells the true size).
APPROXIMATE_GB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 5.5,
    "CompVis/stable-diffusion-v1-4": 5.5,
    "stabilityai/sdxl-turbo": 6.9,
    "openai/clip-vit-large-patch14": 1.7,
    "openai/clip-vit-base-patch32": 0.6,
    "Salesforce/blip-image-captioning-large": 1.9,
    "Salesforce/blip-image-captioning-base": 1.0,
    "data/models/hub/blip-large-coco": 1.9,
}

# Weights in the layouts of the two libraries, and everything small; no pickles, no half-precision
# doubles, no single-file originals beside a pipeline's folders.
_SHARD = "-?????-of-?????"
TRANSFORMERS_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "model.safetensors",
                      f"model{_SHARD}.safetensors")


def pipeline_files(variant: str | None = None) -> tuple[str, ...]:
    """The files of a diffusers repository that its pipeline needs, in one variant of weights."""
    ending = "" if variant is None else f".{variant}"
    return (INDEX, "*/*.json", "*/*.txt", "*/*.model",
            *(f"*/{stem}{part}{ending}{rest}.safetensors"
              for stem in ("model", "diffusion_pytorch_model")
              for part, rest in (("", ""), ("", _SHARD), (_SHARD, ""))))


def is_local(model_id: str) -> bool:
    """Whether an id means a folder (rather than ``owner/name`` on the hub)."""
    if Path(model_id).is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") != 1:
        return True
    return (REPO_ROOT / model_id).is_dir() or Path(model_id).is_dir()


def model_folder(model_id: str, revision: str | None = None,
                 patterns: Sequence[str] = TRANSFORMERS_FILES, skipped: Sequence[str] = (),
                 weights: bool = True, fetch: bool = True) -> Path:
    """Return the folder that holds a model, fetching it from the hub if that is allowed.

    A relative folder is looked up from the repository's root, then from the working directory.
    patterns, skipped: files of a hub repository. weights: whether safetensors must be there.
    Raises UserError in one line if the model is missing or has no safetensors.
    """
    if is_local(model_id):
        folder = _local_folder(model_id)
    else:
        request = {"repo_id": model_id, "revision": revision or locked_revision(model_id),
                   "allow_patterns": list(patterns), "ignore_patterns": list(skipped) or None}
        folder = _hub_folder(request, weights, fetch and not _offline())
    if weights and not any(folder.rglob("*.safetensors")):
        if any(folder.rglob("*.bin")) or any(folder.rglob("*.pth")):
            raise UserError(f"model {model_id} has only pickled weights in {folder}: convert them "
                            f"with lib.convert.convert_pickle, or choose another model ({HINT})")
        raise UserError(f"model {model_id} has no *.safetensors in {folder}: fetch it again with "
                        f"./run_all.sh --fetch --preset PRESET ({HINT})")
    return folder


def _local_folder(model_id: str) -> Path:
    """Find a local model folder."""
    path = Path(model_id).expanduser()
    for folder in (REPO_ROOT / path, Path.cwd() / path):
        if folder.is_dir():
            return folder
    if model_id.startswith("data/models/mini"):
        remedy = (f"it belongs to the repository: restore it with git checkout -- {model_id}, "
                  "or train it with python -m lib.picturebook.train")
    elif model_id.startswith("data/models/hub"):
        remedy = f"make it with ./run_all.sh --fetch --preset PRESET{_size(model_id)}; {HINT}"
    else:
        remedy = f"check the id in the preset; {HINT}"
    raise UserError(f"model folder {model_id} is missing: {remedy}")


def _hub_folder(request: dict[str, Any], weights: bool, fetch: bool) -> Path:
    """Return the cached snapshot of a hub model, or its converted copy; fetch what is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    model_id = request["repo_id"]
    chosen = tuple(request["allow_patterns"]), tuple(request["ignore_patterns"] or ())
    converted = CONVERTED / model_id.replace("/", "--")
    if weights and is_complete(converted):
        return converted
    cached = None
    try:
        cached = Path(snapshot_download(**request, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        log.debug("%s is not cached", model_id)
    if cached is not None and (is_complete(cached, *chosen) or not weights):
        return cached
    if not fetch:
        state = "it is cached in part only" if cached is not None else "it is not cached"
        raise UserError(_missing(model_id, f"{state} and HF_HUB_OFFLINE is set"
                                 if _offline() else state))
    log.warning("fetching %s from the hub%s", model_id, _size(model_id))
    try:
        folder = Path(snapshot_download(**request))
        if weights and not is_complete(folder, *chosen):
            return _convert(request, converted)
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"model {model_id} is given to logged-in users only: accept its terms on the "
                        f"hub and set HF_TOKEN, or choose another model; {HINT}") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"model {model_id} does not exist: neither on the hub (unless it is private) nor "
                        f"as a folder; check the id in the preset; {HINT}") from error
    except RevisionNotFoundError as error:
        raise UserError(f"model {model_id} has no revision {request['revision']}: check revision in the "
                        f"preset; {HINT}") from error
    except Exception as error:  # the hub client raises many kinds; all mean: not fetched
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left for model {model_id}{_size(model_id)} in the hub's cache: make "
                            "room or set HF_HOME to a folder on a larger disk; what has come stays") from error
        raise UserError(_missing(model_id, first_line(error))) from error
    return folder


def top_up(model_id: str, folder: Path, patterns: Sequence[str], skipped: Sequence[str]) -> None:
    """Fetch the small files that a snapshot lacks, where another program has put it into the cache.

    Of the same commit, so no weights come again. Without a network the snapshot stays as it is.
    """
    from huggingface_hub import snapshot_download

    if _offline() or folder.parent.name != "snapshots":
        return
    try:
        snapshot_download(model_id, revision=folder.name, allow_patterns=list(patterns),
                          ignore_patterns=list(skipped) or None)
    except Exception as error:  # the hub client raises many kinds; what is missing shows when it loads
        log.debug("%s is used as it is cached: %s", model_id, error)


def _convert(request: dict[str, Any], target: Path) -> Path:
    """Fetch the pickled weights of an old repository and convert them once."""
    from huggingface_hub import snapshot_download

    from lib.convert import SMALL_FILES, convert_pickle, write_source

    model_id, pickled = request["repo_id"], "pytorch_model.bin"
    folder = Path(snapshot_download(**(request | {"allow_patterns": [*SMALL_FILES, pickled]})))
    if (folder / INDEX).is_file():
        raise UserError(f"model {model_id} lacks *.safetensors of some of its parts: set variant in the "
                        'preset if it has them under another ending (such as variant = "fp16"), or '
                        "choose another model")
    if not (folder / pickled).is_file():
        raise UserError(f"model {model_id} has neither model.safetensors nor {pickled}: choose another "
                        "model, or a revision of it that has")
    log.warning("%s has pickled weights only: converting them to safetensors", model_id)
    convert_pickle(folder, target)
    write_source(target, model_id, folder.name)
    return target


def is_complete(folder: Path, patterns: Sequence[str] = ("*.safetensors",),
                skipped: Sequence[str] = ()) -> bool:
    """Whether a folder holds all weights that a model needs (a fetch may be cut off, and another
    program may have cached another variant, or parts only).

    patterns, skipped: which files count, as for a fetch. A pipeline needs every part that its index
    names; a part with a configuration of a model needs weights: one file, or all shards.
    """
    def asked(part: str) -> bool:
        return not any(fnmatch.fnmatch(f"{part}/x", pattern) for pattern in skipped)

    weights: dict[Path, set[str]] = {}
    for file in folder.rglob("*.safetensors"):
        name = file.relative_to(folder).as_posix()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            weights.setdefault(file.parent, set()).add(file.name)
    whole = {part for part, names in weights.items() if _all_shards(names)}
    if not (folder / INDEX).is_file():
        return bool(weights) and whole == set(weights)
    parts = [folder / name for name in _parts(folder) if asked(name)]
    return bool(whole) and all(part in whole if (part / "config.json").is_file() else part.is_dir()
                               for part in parts)


def demand_safety_checker(folder: Path, model_id: str) -> None:
    """UserError unless a pipeline's index names a safety checker."""
    if "safety_checker" not in _parts(folder):
        raise UserError(f"generator {model_id} has no safety checker: set safety_checker = false in the preset")


def _parts(folder: Path) -> list[str]:
    """The parts that a pipeline's index names; UserError if it is damaged."""
    index = folder / INDEX
    try:
        named = json.loads(index.read_text(encoding="utf-8")).items()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({first_line(error)}): delete its folder and fetch again") from error
    return [name for name, value in named if isinstance(value, list) and any(value)]


def _all_shards(names: Set[str]) -> bool:
    """Whether weight files in one folder hold a whole model: an unsharded file or every shard of one."""
    shards = Counter(re.sub(r"-\d{5}-of-", "-*-of-", name) for name in names)
    return any((count := re.search(r"-\*-of-(\d{5})", name)) is None or found == int(count[1])
               for name, found in shards.items())


def repository_size(model_id: str, revision: str | None, patterns: Sequence[str],
                    skipped: Sequence[str]) -> int | None:
    """Bytes of the files that would be fetched from the hub; None if it cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    if _offline():
        return None
    try:
        info = HfApi().model_info(model_id, revision=revision or locked_revision(model_id),
                                  files_metadata=True, timeout=20)
    except Exception as error:  # no network, no such model: the fetch itself will say so
        log.debug("size of %s unknown: %s", model_id, error)
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    chosen = list(filter_repo_objects(sizes, allow_patterns=list(patterns),
                                      ignore_patterns=list(skipped) or None))
    if not any(name.endswith(".safetensors") for name in chosen):
        chosen.append("pytorch_model.bin")
    return sum(sizes.get(name, 0) for name in chosen)


def _missing(model_id: str, reason: str) -> str:
    """The one line for a hub model that cannot be had."""
    return (f"model {model_id} is missing{_size(model_id)}: {reason}; fetch it ahead with "
            "./run_all.sh --fetch --preset PRESET on a connected machine, or give a local folder as "
            f"its id; {HINT}")


def _size(model_id: str) -> str:
    """The download size in words, if it is known."""
    size = APPROXIMATE_GB.get(model_id)
    return "" if size is None else f" (about {size} GB)"


def _offline() -> bool:
    """Whether the hub client was told to stay offline."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or offline()


def locked_revision(model_id: str) -> str | None:
    """The revision that ``lib.model_fetch`` resolved and locked for a hub id, or None."""
    if not LOCK_FILE.is_file():
        return None
    try:
        return json.loads(LOCK_FILE.read_text(encoding="utf-8")).get(model_id)
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"lock file {LOCK_FILE} is damaged: delete it and fetch again") from error


def used_revision(folder: Path) -> str | None:
    """The commit of a hub snapshot, or what a converted folder was made from; None for others."""
    source = folder / "source.json"
    if source.is_file():
        return str(json.loads(source.read_text(encoding="utf-8")).get("revision"))
    return folder.name if folder.parent.name == "snapshots" else None


# --- loading ------------------------------------------------------------------------------------

@contextlib.contextmanager
def loading(model_id: str) -> Iterator[None]:
    """Turn whatever goes wrong while weights load into one UserError.

    Hides progress bars, and warnings such as that torchvision is absent (it is, on purpose) or
    that a pipeline has a small autoencoder; what matters is checked by the loaders themselves.
    """
    import transformers.utils.logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    import diffusers.utils.logging as diffusers_logging

    diffusers_verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_bar = transformers_logging.is_progress_bar_enabled()
    diffusers_bar = diffusers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # loaders raise OSError, KeyError, RuntimeError, SafetensorError...
        if is_out_of_memory(error):
            raise UserError(f"model {model_id} does not fit into the device's memory beside what is there "
                            f"({first_line(error)}): end other programs on it, set a half-precision dtype "
                            "in the preset, or choose another device with COMPENDIUM_DEVICE") from error
        if "tiktoken" in str(error) or "sentencepiece" in str(error).lower():  # it tries one after the other
            raise UserError(f"model {model_id} has a tokenizer that only the package sentencepiece reads: "
                            "install it with .venv/bin/python -m pip install sentencepiece") from error
        raise UserError(f"model {model_id} cannot be loaded ({type(error).__name__}: "
                        f"{first_line(error)}): check its files and the preset's adapter") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        diffusers_logging.set_verbosity(diffusers_verbosity)
        if transformers_bar:
            transformers_logging.enable_progress_bar()
        if diffusers_bar:
            diffusers_logging.enable_progress_bar()


def load_transformer(model_class: Any, folder: Path, model_id: str, dtype: torch.dtype,
                     device: torch.device, attention: str = "auto",
                     model_types: Sequence[str] = ()) -> Any:
    """Load a transformers model for inference; refuse other architectures and missing weights.

    ``model_types``: accepted ``config.model_type`` values (empty: any).
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("model_type")
    if model_types and found not in model_types:
        raise UserError(f"model {model_id} is of type {found!r}, its adapter needs "
                        f"{' or '.join(model_types)}: change the adapter or the id in the preset")
    extra = {} if attention == "auto" else {"attn_implementation": attention}
    model, info = model_class.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True,
        trust_remote_code=False, output_loading_info=True, **extra)
    if info["missing_keys"]:
        example = sorted(info["missing_keys"])[0]
        raise UserError(f"model {model_id} lacks {len(info['missing_keys'])} weights of "
                        f"{model_class.__name__} (such as {example}): wrong or damaged checkpoint")
    return model.to(device).eval().requires_grad_(False)
