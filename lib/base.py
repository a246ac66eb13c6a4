"""What every room uses: the repository's root, errors meant for users, stable seeds, atomic writes."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help answers before anything is installed
    from upath import UPath

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A mistake in what a user gave: one line that names the file or parameter and the remedy."""

    def _render_traceback_(self) -> list[str]:
        """The one line that a notebook shows instead of a traceback (an IPython hook)."""
        return [f"error: {self}"]


def stable_seed(*parts: str | int) -> int:
    """Return a seed that depends on the parts only, on every machine: 63 bits, as a signed Parquet column takes."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") & ((1 << 63) - 1)


def user_path(text: str | os.PathLike[str]) -> Path | UPath:
    """Return a user's path or URL: ``~`` expanded, relative to COMPENDIUM_CALLER, where ``run_all.sh`` was started."""
    if "://" in str(text):
        from upath import UPath

        return UPath(str(text))
    return Path(os.environ.get("COMPENDIUM_CALLER") or Path.cwd()) / Path(text).expanduser()


def folder_setting(variable: str, default: Path) -> Path | UPath:
    """Return the folder that an environment variable names, or the default where it is unset or empty."""
    value = os.environ.get(variable, "").strip()
    return user_path(value) if value else default


def write_atomic(path: Path | UPath, data: bytes | str) -> None:
    """Write a file so that readers see the old content, the new one or none, never a part of it."""
    data = data.encode("utf-8") if isinstance(data, str) else data
    if not isinstance(path, Path) and path.protocol not in ("", "file"):
        try:
            path.write_bytes(data)  # an object appears in a store when its upload is complete
        except FileNotFoundError:  # a store that has folders
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
