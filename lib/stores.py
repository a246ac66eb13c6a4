"""Runs that lie in a store: an object store, another machine's disk, whatever fsspec reaches by URL.

A local folder (also as ``file://``) stays a :class:`pathlib.Path` and never comes through here.
Any other address becomes a :class:`StorePath`, which has the few methods of a path that runs need.
It differs from fsspec's own calls, and from path classes built on them, in what a run depends on:

- ``is_file`` is false only where the store says so; fsspec's ``isfile`` takes a lost connection for
  a missing file, and a shard would be played again for nothing;
- listings are not remembered, since other machines write too;
- what a driver raises becomes one clear line (UserError); only "not there" stays an OSError;
- a file appears under its name when it is whole: object stores work so, elsewhere it is renamed;
- no key is kept: drivers read theirs from the environment, on each machine for itself.

The lock of a run in a store: ``lib/leases.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lib.errors import UserError

# Where a put shows whole or not at all. Elsewhere we write beside and rename.
_S3 = frozenset({"s3", "s3a"})
_ATOMIC = _S3 | {"gs", "gcs", "az", "abfs", "abfss", "memory"}
_LANES = 16  # requests to them at a time
_Answer = TypeVar("_Answer")
closed: dict[StorePath, str] = {}  # folders to which this process must write nothing more, and why


# --- addresses ---------------------------------------------------------------------------------


def at(place: str | Place) -> Place:
    """The folder that a path or a URL means.

    Raises UserError for a URL that cannot be used: unknown protocol, missing driver, a password in
    it, a bucket that does not exist, no answer.
    """
    if not isinstance(place, str):
        return place
    protocol, mark, rest = place.partition("://")
    if not mark:
        return Path(place)
    if "::" in protocol:
        raise UserError(f"{protocol}://...: chained addresses are not supported: give the plain one")
    if protocol in ("file", "local"):
        if not rest.startswith("/"):
            raise UserError(f"{place}: a file:// address needs a path from the root, "
                            "such as file:///shared/runs")
        return Path(rest)
    if urlsplit(place).password or "?" in place:
        variable = "AWS_SECRET_ACCESS_KEY" if protocol in _S3 else f"FSSPEC_{protocol.upper()}_PASSWORD"
        raise UserError(f"the {protocol}:// address of the runs has a password or settings in it: take "
                        "them out (addresses appear in messages) and set the driver's variables, such as "
                        f"{variable}")
    return _checked(protocol, rest.rstrip("/"))


@lru_cache(maxsize=8)
def _checked(protocol: str, rest: str) -> StorePath:
    """A store's address, once it has answered; UserError if it does not."""
    import fsspec  # slow to import, and only needed here

    url = f"{protocol}://{rest}"
    try:
        if protocol not in _S3:
            fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise UserError(f"{url}: no driver knows {protocol}://: use s3, gs, abfs, sftp or another "
                        "protocol of fsspec") from error
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or protocol
        raise UserError(f"{url} needs the package {package}, which is not installed: "
                        f"pip install -c requirements.lock {package}") from error
    root = StorePath(url)
    with contextlib.suppress(FileNotFoundError):  # the folder is made with the first file
        root._ask(lambda files, path: files.info(path))
        return root
    # Not the driver's business to make one: a typing error would cost a bucket.
    bucket = _connect(url, os.getpid())[1].split("/")[0]
    try:
        if bucket:
            root._ask(lambda files, _: files.info(bucket))
    except FileNotFoundError as error:
        raise UserError(f"{url}: {bucket!r} does not exist there: check the name, or make it") from error
    return root


@lru_cache(maxsize=8)
def _connect(url: str, process: int) -> tuple[Any, str]:
    """The fsspec file system of a store and the path of its root in it.

    process: whose; a connection does not outlive a fork.
    """
    import fsspec

    protocol, _, rest = url.partition("://")
    files, base = (_s3(rest), rest) if protocol in _S3 else fsspec.url_to_fs(url)
    files.dircache.use_listings_cache = False
    return files, base.rstrip("/")


def _s3(rest: str) -> Any:
    """S3 by the driver inside pyarrow. It needs no package; s3fs forbids versions that we pin."""
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    # The variables that other programs know; keys the driver finds by itself.
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint.netloc:
        region = resolve_s3_region(rest.split("/")[0])
    # Delayed: a small file is one request, not three.
    return ArrowFSWrapper(S3FileSystem(region=region, endpoint_override=endpoint.netloc or None,
                                       scheme=endpoint.scheme or None, allow_delayed_open=True))


def _told(path: StorePath, error: Exception) -> str:
    """What a driver's error means for the user, in one line."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left in {path.root}: make room and run again, finished rows are kept"
    reason = re.sub(r"\?\S+", "?...", " ".join(str(error).split()))  # a signed address holds a key
    return (f"{path} cannot be reached, or refuses ({type(error).__name__}: {reason[:200]}): check the "
            "address, your credentials and the network, then run again; finished rows are kept")


# --- paths -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """Size in bytes and time of change (seconds and nanoseconds since 1970; 0 where unknown)."""

    st_size: int
    st_mtime: float

    @property
    def st_mtime_ns(self) -> int:
        """The time of change in nanoseconds."""
        return int(self.st_mtime * 1e9)


@dataclass(frozen=True, order=True)
class StorePath:
    """A file or folder of a store. Works as the same methods of :class:`pathlib.Path` do, but that
    every method raises UserError where the store does not answer.

    root: the URL of the runs; inner: the path below it, "" for the root itself.
    """

    root: str
    inner: str = ""

    def __truediv__(self, name: str | PurePosixPath) -> StorePath:
        return self._below_root(PurePosixPath(self.inner) / name)

    def __str__(self) -> str:
        return f"{self.root}/{self.inner}" if self.inner else self.root

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.inner or self.root).name

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the whole address."""
        return PurePosixPath(str(self)).parts

    @property
    def parent(self) -> StorePath:
        """The folder that this lies in; the root's is the root."""
        return self._below_root(PurePosixPath(self.inner).parent)

    def relative_to(self, other: StorePath) -> PurePosixPath:
        """The way from another path of the same store."""
        return PurePosixPath(self.inner).relative_to(other.inner)

    def is_relative_to(self, other: StorePath | Path) -> bool:
        """Whether this lies inside another path; nothing in a store lies inside a local folder."""
        return (isinstance(other, StorePath) and other.root == self.root
                and PurePosixPath(self.inner).is_relative_to(other.inner))

    def _below_root(self, inner: PurePosixPath) -> StorePath:
        return StorePath(self.root, "" if inner == PurePosixPath() else str(inner))

    # reading

    def is_file(self) -> bool:
        """Whether a file is there."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether a folder is there: in an object store, whether names begin with this one."""
        return self._kind() == "directory"

    def stat(self) -> Status:
        """Size and time of change; FileNotFoundError if nothing is there."""

        def ask(files: Any, path: str) -> Status:
            try:
                changed = files.modified(path).timestamp()
            except NotImplementedError:  # not every store tells
                changed = 0.0
            return Status(int(files.info(path).get("size") or 0), changed)

        return self._ask(ask)

    def read_bytes(self) -> bytes:
        """The whole file, in one request; FileNotFoundError if it is absent."""
        return self._ask(lambda files, path: files.cat_file(path))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> Any:
        """The file opened for reading in pieces."""
        if mode != "rb":
            raise ValueError(f"mode {mode!r}: files of a store are opened for reading only")
        return self._ask(lambda files, path: files.open(path, mode))

    def iterdir(self) -> Iterator[StorePath]:
        """What lies in this folder; nothing if it is absent."""
        return (self / name for name, _ in self._list())

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """The paths below this one that fit a pattern such as ``*/rows.parquet``."""
        first, _, rest = pattern.partition("/")
        for name, folder in self._list():
            if fnmatchcase(name, first) and (folder or not rest):
                if rest:
                    yield from (self / name).glob(rest)
                else:
                    yield self / name

    # writing

    def write_bytes(self, data: bytes) -> None:
        """Write a file; it appears whole or not at all."""
        self._place(lambda files, path: files.pipe_file(path, data))

    def upload(self, local: Path) -> None:
        """Copy a local file here; it appears whole or not at all."""
        self._place(lambda files, path: files.put_file(str(local), path))

    def create(self, data: bytes) -> None:
        """Write a file that must not be there yet, as far as the store can tell; FileExistsError."""

        def put(files: Any, path: str) -> None:
            try:
                files.pipe_file(path, data, mode="create")
            except (NotImplementedError, TypeError):  # the driver does not know the mode
                files.pipe_file(path, data)

        self._ask(lambda files, path: _with_folder(files, path, put))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        with contextlib.suppress(*([FileNotFoundError] if missing_ok else [])):
            self._ask(lambda files, path: files.rm_file(path))

    # asking the driver

    def _ask(self, question: Callable[[Any, str], _Answer]) -> _Answer:
        """Ask the store something; whatever its driver raises becomes a UserError in one line."""
        try:
            files, base = _connect(self.root, os.getpid())
            return question(files, f"{base}/{self.inner}" if self.inner else base or "/")
        except (FileNotFoundError, FileExistsError, UserError):
            raise
        except Exception as error:  # every driver has errors of its own, many are no OSError
            raise UserError(_told(self, error)) from error

    def _kind(self) -> str:
        """What is there: "file", "directory" or "" for nothing."""
        try:
            return self._ask(lambda files, path: files.info(path)["type"])
        except FileNotFoundError:
            return ""

    def _list(self) -> list[tuple[str, bool]]:
        """The names in this folder, sorted, and whether they are folders; none if it is absent."""

        def ask(files: Any, path: str) -> list[tuple[str, bool]]:
            own = path.strip("/")  # some stores list an empty object for the folder itself
            found = [(entry["name"].strip("/"), entry["type"]) for entry in files.ls(path, detail=True)]
            return sorted((name.rpartition("/")[2], kind == "directory")
                          for name, kind in found if name != own)

        try:
            return self._ask(ask)
        except FileNotFoundError:
            return []

    def _place(self, write: Callable[[Any, str], None]) -> None:
        """Let ``write`` make the file, by way of another name where the store needs that."""
        for folder, reason in closed.items():
            if self.is_relative_to(folder):
                raise UserError(reason)

        def place(files: Any, path: str) -> None:
            if _is_atomic(files):
                _with_folder(files, path, write)
                return
            run = "".join(f"{part}/" for part in PurePosixPath(self.inner).parts[:-1][:1])
            temporary = f"{path.removesuffix(self.inner)}{run}.scratch/{secrets.token_hex(8)}.tmp"
            try:
                _with_folder(files, temporary, write)
                _with_folder(files, path, lambda files, path: files.mv(temporary, path))
            except BaseException:
                with contextlib.suppress(Exception):  # it may not have come to be
                    files.rm_file(temporary)
                raise

        if threading.current_thread() is not threading.main_thread():
            self._ask(place)
            return
        # Ctrl-C reaches the main thread only. A driver that is interrupted closes the object, and
        # what was written so far would count as all of it.
        with ThreadPoolExecutor(max_workers=1) as hand:
            hand.submit(self._ask, place).result()


def _is_atomic(files: Any) -> bool:
    """Whether a file of this store appears when it is whole."""
    return bool(_ATOMIC & ({files.protocol} if isinstance(files.protocol, str) else {*files.protocol}))


def _with_folder(files: Any, path: str, write: Callable[[Any, str], None]) -> None:
    """Write; where the folder turns out to be missing make it and write again."""
    try:
        write(files, path)
    except FileNotFoundError:
        files.makedirs(path.rpartition("/")[0], exist_ok=True)
        write(files, path)


def lanes(place: Place) -> int:
    """How many files at a time to ask for: a disk has them at once, an object store answers late."""
    if isinstance(place, Path):
        return 1
    return place._ask(lambda files, _: _LANES if _is_atomic(files) else 1)


def write_many(contents: Mapping[StorePath, bytes]) -> None:
    """Write several files, side by side where that pays off."""
    if contents:
        with ThreadPoolExecutor(max_workers=lanes(next(iter(contents)))) as pool:
            list(pool.map(StorePath.write_bytes, contents.keys(), contents.values()))


Place = Path | StorePath  # a file or folder of a run: local, or in a store
