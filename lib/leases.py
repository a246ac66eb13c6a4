"""Locks of runs: the kernel's on a file, and in a store, where no kernel keeps one, an object that
is refreshed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from lib import stores
from lib.errors import UserError, writing_failed
from lib.provenance import process_name
from lib.stores import Place, StorePath

# What file systems answer that were mounted without locks (Lustre, NFS and some in user space do).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def run_lock(folder: Place, doing: str = "") -> Iterator[None]:
    """Hold a run's folder (or that of some other work); a second one on it says so and waits.

    The lock is the kernel's and goes with the process, so a killed run leaves none behind. In a
    store it is an object that has to be refreshed: see :class:`Lease`. Raises UserError if the
    folder cannot be written, or lies where there are no locks.
    """
    if isinstance(folder, StorePath):
        with Lease(folder):
            yield
        return
    try:
        stream = _locked(folder, doing or f"playing {folder.name}")
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise UserError(f"{folder} lies on a file system without locks ({error.strerror}): mount it "
                            "with them (Lustre: -o flock), or set COMPENDIUM_RUNS to another place") from error
        raise writing_failed(folder, error) from error
    with stream:
        yield


def _locked(folder: Path, doing: str) -> BinaryIO:
    """Open the lock file of a folder and wait until it is ours; it holds the name of who has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context((folder / ".lock").open("ab+", buffering=0))
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().decode(errors="replace").strip() or "another process"
            print(f"waiting: {holder} is {doing}", file=sys.stderr, flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(0)
        stream.write(process_name().encode())
        stack.pop_all()
        return stream


@dataclass(frozen=True)
class Times:
    """Seconds: between two refreshes of a lock; until one that is not refreshed is taken over; until
    a lock just made is read back; between two looks of who waits."""

    beat: float = 20.0
    stale: float = 120.0
    settle: float = 1.0
    look: float = 5.0


class Lease:
    """The lock of a run in a store, for ``with``: the object ``.lock``, refreshed by a thread.

    Who finds one waits until it is gone, or until it has not changed for ``times.stale`` seconds by
    the waiting machine's own clock: then its holder was killed, and it is taken over. Who makes one
    reads it back after a moment, since not every store can refuse a second one. A holder that slept
    through all this notices at its next refresh and writes nothing more; what two then wrote side by
    side are the same rows, for a row depends on its key alone.
    """

    def __init__(self, folder: StorePath, times: Times | None = None) -> None:
        self.folder, self.path, self.times = folder, folder / ".lock", times or Times()
        self.token, self.beats = secrets.token_hex(8), 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._refresh, name="lock", daemon=True)

    def __enter__(self) -> Lease:
        found, since, told = self._found(), time.monotonic(), False
        while not self._claim(found, time.monotonic() - since >= self.times.stale):
            now = self._found()
            if now != found:
                found, since = now, time.monotonic()
            if found is not None and not told:
                told = True
                print(f"waiting: {_holder(found)} is playing {self.folder.name} (a lock that is not "
                      f"refreshed for {self.times.stale:.0f} s is taken over)", file=sys.stderr, flush=True)
            time.sleep(self.times.look)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        stores.closed.pop(self.folder, None)
        # If the store does not answer the lock goes stale by itself, and the run's own error counts.
        with contextlib.suppress(UserError):
            if self._ours(self._found()):
                self.path.unlink(missing_ok=True)

    def _record(self) -> bytes:
        self.beats += 1
        record = {"holder": process_name(), "time": datetime.now(UTC).isoformat(timespec="seconds"),
                  "beats": self.beats, "token": self.token}
        return json.dumps(record).encode()

    def _found(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _ours(self, found: bytes | None) -> bool:
        return found is not None and self.token.encode() in found

    def _claim(self, found: bytes | None, stale: bool) -> bool:
        """Try to make the lock ours; False if it is somebody's."""
        if found is not None:
            if not stale or self._found() != found:
                return False
            self.path.unlink(missing_ok=True)
        try:
            self.path.create(self._record())
        except FileExistsError:
            return False
        time.sleep(self.times.settle)
        return self._ours(self._found())

    def _refresh(self) -> None:
        """What the thread does, until the run is over or the lock is another's."""
        while not self.done.wait(self.times.beat):
            # A store that does not answer is asked again at the next beat.
            with contextlib.suppress(UserError):
                found = self._found()
                if not self._ours(found):
                    stores.closed[self.folder] = (
                        f"{self.folder} is now played by {_holder(found)}, since this process did not "
                        "refresh its lock in time: finished rows are kept, this run stops here")
                    return
                self.path.write_bytes(self._record())


def _holder(found: bytes | None) -> str:
    """The name in a lock, for messages."""
    try:
        return str(json.loads(found or b"")["holder"])
    except (ValueError, KeyError, TypeError):
        return "another process"
