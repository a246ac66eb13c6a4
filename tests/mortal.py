"""Pictures of which one is deadly, players that die of it, and a store that they share: for the tests
of several workers."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from lib.players import Models
from lib.scoring.meteor import Meteor
from tests.standins import COLOURS, stand_ins

DEADLY = 5  # the place of the picture that some players here cannot bear
DOOMED = "COMPENDIUM_TEST_DOOMED"  # set on the machine that is going to be lost


def paint(folder: Path, n: int) -> str:
    """Pictures of n colours as a dataset; the deadly one is of a size of its own."""
    folder.mkdir()
    for i in range(n):
        base = np.array(list(COLOURS.values())[i % 6]) * (1 - i / 20)
        shape = (9, 9, 3) if i == DEADLY else (8, 8, 3)
        noise = np.random.default_rng(i).normal(0, 30, shape)
        pixels = np.clip(base + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return f"folder:{folder}"


class Disk(LocalFileSystem):
    """A local folder behind a protocol of its own: every process that knows these players
    knows it, and what is written in place shows while it grows."""

    protocol = "disk"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("disk://"))


fsspec.register_implementation("disk", Disk, clobber=True)


class Fragile:
    """A captioner that kills its process at the deadly picture: always, or until a file is there."""

    def __init__(self, captioner, once: Path | None) -> None:
        self.captioner, self.once = captioner, once

    def caption(self, images, seeds, decoding):
        if any(np.asarray(image).shape[0] == 9 for image in images):
            if self.once is None:
                os.kill(os.getpid(), signal.SIGKILL)
            if not self.once.exists():
                self.once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.captioner.caption(images, seeds, decoding)


class Doomed:
    """A captioner that gets stuck on the doomed machine once it has captioned some pictures there.

    It leaves a file when it has played, and one when it is stuck. On the other machine it plays one
    picture, then waits until the doomed one is stuck: it could play all the rest in the time that a
    busy machine takes to start the other's actor.
    """

    def __init__(self, captioner, notes: Path) -> None:
        self.captioner, self.notes, self.played = captioner, notes, 0

    def caption(self, images, seeds, decoding):
        machine = "doomed" if DOOMED in os.environ else "safe"
        if machine == "doomed" and self.played == 2:
            (self.notes / "stuck").touch()
            time.sleep(3600)
        if machine == "safe" and self.played == 1:
            self.await_stuck()
        self.played += 1
        (self.notes / machine).touch()
        return self.captioner.caption(images, seeds, decoding)

    def await_stuck(self):
        """Wait until the doomed machine is stuck; TimeoutError if it never plays."""
        end = time.monotonic() + 480
        while not (self.notes / "stuck").exists():
            if time.monotonic() > end:
                raise TimeoutError("the doomed machine did not play within eight minutes")
            time.sleep(0.05)


def fragile(once: Path | None = None) -> Models:
    """Players that die of the deadly picture: always, or until the file is there."""
    models = stand_ins()
    return dataclasses.replace(models, captioner=Fragile(models.captioner, once))


def doomed(notes: Path) -> Models:
    """Players that get stuck on the doomed machine."""
    models = stand_ins()
    return dataclasses.replace(models, captioner=Doomed(models.captioner, notes))


def kill_when_asked(meteor: Meteor) -> None:
    """Hold a METEOR still, so that it cannot answer, and kill it in the middle of a conversation."""
    meteor.process.send_signal(signal.SIGSTOP)

    def kill() -> None:
        while not meteor.lock.locked():
            time.sleep(0.02)
        meteor.process.kill()

    threading.Thread(target=kill, daemon=True).start()


def no_memory() -> Models:
    """Loading that the system ends."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed before")


def broken() -> Models:
    """Loading that fails."""
    raise RuntimeError("no such\nthing")


def contents(run) -> dict[str, bytes]:
    """The bytes of everything in a run that must repeat, by name."""
    kept = [run.path / "rows.parquet", run.path / "baselines.parquet",
            *(run.path / "shards").iterdir(), *(run.path / "baselines").iterdir(),
            *(run.path / "images").glob("*/*.png")]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in kept}
