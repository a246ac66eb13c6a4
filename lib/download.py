"""Fetch one file over HTTPS: resumed where it stopped, checked by hash, complete or absent."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.errors import UserError

CHUNK = 1 << 20
TIMEOUT_SECONDS = 60


def download(url: str, target: Path, md5: str | None = None, sha256: str | None = None,
             say: Callable[[str], None] = print) -> Path:
    """Fetch ``url`` to ``target`` unless it is there; return ``target``.

    An interrupted fetch leaves ``<target>.part`` and goes on from there. Where no MD5 is given,
    the one that the server states is used, if it does. Raises UserError in one line.
    """
    if target.is_file():
        check_hash(target, md5, sha256)
        return target
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        stated = _fetch(url, part, say)
    except (urllib.error.URLError, TimeoutError, ConnectionError, OSError) as error:
        raise UserError(f"{url} cannot be fetched ({error}): check the connection and run again, "
                        f"{_megabytes(part)} are kept") from error
    check_hash(part, md5 or stated, sha256)
    os.replace(part, target)
    return target


def _fetch(url: str, part: Path, say: Callable[[str], None]) -> str | None:
    """Append what is missing to ``part``; return the MD5 that the server states, if any."""
    done = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing is left to send: the part is complete
            return _stated_md5(error.headers)
        raise
    with response:
        resumed = response.status == 206
        total = int(response.headers.get("Content-Length", 0)) + (done if resumed else 0)
        done = done if resumed else 0
        told = -1
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                if total and done * 10 // total > told:
                    told = done * 10 // total
                    say(f"{part.stem}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
        if total and done != total:
            raise ConnectionError(f"cut off after {done} of {total} bytes")
        return _stated_md5(response.headers)


def _stated_md5(headers: Any) -> str | None:
    """The MD5 (hex) of a whole object as Google Cloud Storage states it."""
    for value in headers.get_all("x-goog-hash") or []:
        for item in value.split(","):
            name, _, code = item.strip().partition("=")
            if name == "md5":
                try:
                    return base64.b64decode(code, validate=True).hex()
                except binascii.Error:
                    return None
    return None


def file_hash(file: Path, name: str = "sha256") -> str:
    """A file's hash in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, name).hexdigest()


def check_hash(file: Path, md5: str | None, sha256: str | None) -> None:
    """Compare a file with the hashes that are known; delete it if it differs."""
    for name, expected in (("md5", md5), ("sha256", sha256)):
        if expected is not None and (found := file_hash(file, name)) != expected:
            file.unlink()
            raise UserError(f"{file.name} has {name} {found}, expected {expected}: it was damaged on "
                            "the way and is deleted; run again")


def _megabytes(part: Path) -> str:
    """How much of a file is there, in words."""
    return f"{part.stat().st_size / 1e6:.0f} MB" if part.is_file() else "0 MB"
