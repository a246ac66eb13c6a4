"""Where a result comes from: commit, library versions, device, models. Never keys or secrets.

Nothing here reads the environment's variables or writes a path of this machine, so that a record
can be published as it stands.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.presets import REPO_ROOT, CaptionerSpec, EncoderSpec, GeneratorSpec, Preset
from lib.scoring.java import find_java

PACKAGES = ("torch", "transformers", "diffusers", "numpy", "scipy", "pillow", "pyarrow", "pandas",
            "pycocoevalcap", "matplotlib", "papermill")
# Paths whose uncommitted changes make a result one of a changed program; figures and runs do not.
CODE = ("lib", "notebooks", "data/models", "data/picturebook", "requirements.lock", "run_all.sh")
_CHUNK = 1 << 16
# Files above this are hashed by evenly spaced samples: reading gigabytes at the start of every
# notebook would cost more than the notebook.
_WHOLE = 256 << 20
_SAMPLES = 256


def _output_of(*command: str) -> str | None:
    """Standard output (or, failing that, error) of a short command; None if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout or done.stderr).strip() if done.returncode == 0 else None


def _git(*arguments: str) -> str | None:
    return _output_of("git", "-C", str(REPO_ROOT), *arguments)


def commit() -> dict[str, Any]:
    """The commit of the program: ``{"commit": hex or None, "dirty": bool or None}``.

    None where the project is not a git checkout (a downloaded archive, say).
    """
    revision = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", *CODE) if revision else None
    return {"commit": revision, "dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str | None]:
    """Installed versions of the libraries that can change a number; None where one is absent."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@lru_cache(maxsize=1)
def java_version() -> str | None:
    """The Java that METEOR, SPICE and the tokenizer would run on; None without one."""
    try:
        return str(find_java())
    except UserError:
        return None


def device_name() -> str:
    """The accelerator that torch would choose, by name, or ``cpu``."""
    import torch  # slow to import, and figures need provenance without it

    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name(0)})"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def collect(device: str | None = None, **extra: Any) -> dict[str, Any]:
    """Everything about the program and the machine that may change a number.

    ``device`` names the device in use (asked from torch where torch is loaded, if None);
    ``extra`` is added as it is (preset name, seed, input rows ...).
    """
    if device is None and "torch" in sys.modules:
        device = device_name()
    return {
        **commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "java": java_version(),
        "device": device,
        "versions": versions(),
        **extra,
    }


# --- models ------------------------------------------------------------------------------------


def model_fingerprints(preset: Preset) -> dict[str, str | None]:
    """What identifies the weights of each model of a preset.

    A local folder is known by the hash of its content, a hub model by ``id@revision``.
    A part is None where the preset has none (no judge).
    """
    parts = {"captioner": preset.captioner, "generator": preset.generator,
             "encoder": preset.encoder, "judge": preset.judge}
    return {name: None if spec is None else _fingerprint(spec) for name, spec in parts.items()}


def _local_folder(model_id: str) -> Path:
    """The folder that an id would mean; relative ones start at the repository's root."""
    return REPO_ROOT / Path(model_id).expanduser()


def _fingerprint(spec: CaptionerSpec | GeneratorSpec | EncoderSpec) -> str:
    folder = _local_folder(spec.id)
    if folder.is_dir():
        return f"sha256:{folder_hash(folder)}"
    if spec.revision is None:
        from lib.weights import is_local, locked_revision  # imports torch: only where needed

        revision = None if is_local(spec.id) else locked_revision(spec.id)
        return f"{spec.id}@{revision or 'unlocked'}"
    return f"{spec.id}@{spec.revision}"


def weights_present(preset: Preset) -> bool:
    """Whether every model folder of the repository that a preset names is there, so that
    fingerprints are those of the weights."""
    specs = (preset.captioner, preset.generator, preset.encoder, preset.judge)
    folders = [s.id for s in specs if s is not None and s.id.startswith("data/")]
    return all(_local_folder(folder).is_dir() for folder in folders)


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's files (README files left out)."""
    digest = hashlib.sha256()
    try:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            relative = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if hidden or path.suffix.lower() in (".md", ".png", ".log"):
                continue
            status = path.stat()
            digest.update(f"{relative.as_posix()}\x1f".encode())
            digest.update(_file_hash(str(path), status.st_size, status.st_mtime_ns).encode())
    except OSError as error:
        raise UserError(f"model folder {folder} cannot be read: {error}") from error
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _file_hash(path: str, size: int, modified_ns: int) -> str:
    """SHA-256 of a file, remembered within the process for as long as it is not touched.

    Beyond 256 MB it is the hash of the size and of 256 evenly spaced blocks of 64 KiB.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        if size <= _WHOLE:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
            return digest.hexdigest()
        digest.update(f"sampled {size}".encode())
        for index in range(_SAMPLES):
            stream.seek(index * (size - _CHUNK) // (_SAMPLES - 1))
            digest.update(stream.read(_CHUNK))
    return digest.hexdigest()


def process_name() -> str:
    """Who holds a lock, for messages: host and process number."""
    return f"process {os.getpid()} on {platform.node()}"
