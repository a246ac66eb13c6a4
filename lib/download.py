"""Fetch files over HTTPS: a large one resumed and checked by hash, small ones whole or not at all."""

from __future__ import annotations

import base64
import binascii
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lib.errors import UserError

CHUNK = 1 << 20
TIMEOUT_SECONDS = 60
PAUSES = (0.5, 3.0)  # seconds before a second and a third attempt at a small file
LARGEST_SMALL_FILE = 64 << 20
_AGENT = {"User-Agent": "captioner-generator-compendium"}  # some hosts refuse urllib's own name
_GONE = (403, 404, 410)  # a public bucket that may not be listed answers 403 for an absent file
_TROUBLE = (OSError, http.client.HTTPException)  # URLError, timeouts and resets are OSErrors
Say = Callable[[str], None]


class NotThere(UserError):
    """The server was reached and has no such file."""


@dataclass(frozen=True)
class Part:
    """One thing that is missing here and can be fetched.

    name: what messages call it; size: bytes, None if unknown; about: whether the size is an
    estimate; fetch: brings it, or raises UserError; needed: whether nothing works without it.
    """

    name: str
    size: int | None
    fetch: Callable[[Say], object]
    about: bool = False
    needed: bool = True

    @property
    def amount(self) -> str:
        """The size in words."""
        return f"{'about ' if self.about and self.size is not None else ''}{in_words(self.size)}"


def in_words(size: int | None) -> str:
    """Bytes as people say them: 8 MB, 5.5 GB."""
    if size is None:
        return "size unknown"
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 or not size else f"{max(size / 1e6, 0.1):.1f} MB"


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids every access to the network."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")


class _StaySafe(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from an encrypted address to one that is not."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError(f"redirects to {newurl}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
    """Open an encrypted address, or one of this machine (urllib would read local files too)."""
    parts = urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) != ("http", "127.0.0.1"):
        raise UserError(f"{url} is not an address in the network: only https is fetched")
    request = urllib.request.Request(url, headers=_AGENT | (headers or {}), method=method)
    return urllib.request.build_opener(_StaySafe).open(request, timeout=TIMEOUT_SECONDS)


# --- one large file -----------------------------------------------------------------------------


def download(url: str, target: Path, md5: str | None = None, sha256: str | None = None,
             say: Say = print) -> Path:
    """Fetch ``url`` to ``target`` unless it is there; return ``target``.

    An interrupted fetch leaves ``<target>.part`` and goes on from there. Where no MD5 is given,
    the one that the server states is used, if it does. Raises UserError in one line.
    """
    if target.is_file():
        check_hash(target, md5, sha256)
        return target
    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        stated = _fetch(url, part, say)
        check_hash(part, md5 or stated, sha256)
        os.replace(part, target)
    except _TROUBLE as error:
        raise UserError(f"{url} cannot be fetched ({error or type(error).__name__}): check the connection "
                        f"and the disk and run again, {in_words(_bytes(part))} are kept") from error
    return target


def _fetch(url: str, part: Path, say: Say) -> str | None:
    """Append what is missing to ``part``; return the MD5 that the server states, if any."""
    done = _bytes(part)
    try:
        response = _open(url, {"Range": f"bytes={done}-"} if done else None)
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
                            "the way, or is another file than the known one, and is deleted; run again")


def _bytes(part: Path) -> int:
    """How much of a file is there."""
    return part.stat().st_size if part.is_file() else 0


# --- small files --------------------------------------------------------------------------------


def read(url: str) -> bytes:
    """The content of a small file, whole; a server in trouble is asked again.

    Raises NotThere if the server does not have it, UserError if it is larger than
    LARGEST_SMALL_FILE, OSError if the server cannot be reached.
    """
    for pause in (*PAUSES, None):
        try:
            return _read_once(url)
        except urllib.error.HTTPError as error:
            if error.code in _GONE:
                raise NotThere(f"{url}: {error}") from error
            trouble: Exception = error
        except _TROUBLE as error:
            trouble = error
        if pause is not None:
            time.sleep(pause)
    raise ConnectionError(f"{url}: {trouble or type(trouble).__name__}") from trouble


def _read_once(url: str) -> bytes:
    """One attempt at a small file."""
    with _open(url) as response:
        content = response.read(LARGEST_SMALL_FILE + 1)
        stated = response.headers.get("Content-Length")
    if len(content) > LARGEST_SMALL_FILE:
        raise UserError(f"{url} has more than {LARGEST_SMALL_FILE >> 20} MiB: not fetched")
    if stated is not None and len(content) != int(stated):
        raise ConnectionError(f"cut off after {len(content)} of {stated} bytes")
    return content


def stated_size(url: str) -> int | None:
    """The bytes that a server states for a file; None if it does not or cannot be asked."""
    if offline():
        return None
    try:
        with _open(url, method="HEAD") as response:
            stated = response.headers.get("Content-Length")
    except _TROUBLE:
        return None
    return int(stated) if stated is not None and stated.isdecimal() else None


def write_whole(target: Path, content: bytes) -> None:
    """Write a file so that it appears only when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
