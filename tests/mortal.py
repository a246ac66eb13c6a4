"""Processes that die while they execute a run, and models that their process does not survive."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from lib.models import Models
from lib.roundtrip import Run
from tests.standins import stand_ins


class Fragile:
    """A captioner that does something else at an image of 9 pixels a side: always, or until a file is there."""

    def __init__(self, captioner, harm: Callable[[], None], once: Path | None) -> None:
        self.captioner, self.harm, self.once = captioner, harm, once

    def caption(self, images, seeds, decoding):
        if any(np.asarray(image).shape[0] == 9 for image in images) and (self.once is None or not self.once.exists()):
            if self.once is not None:
                self.once.touch()
            self.harm()
        return self.captioner.caption(images, seeds, decoding)


def die() -> None:
    """End this process as the system does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """Fail as a library does."""
    raise RuntimeError("no kernel\nfor this image")


def fragile(harm: Callable[[], None] = die, once: Path | None = None) -> Models:
    """Models that do not survive the odd image: never, or until the file is there."""
    models = stand_ins()
    return dataclasses.replace(models, captioner=Fragile(models.captioner, harm, once))


def execute(run: Run, workers: int = 1) -> None:
    """Execute a run with models that take a moment; for a process that is killed from outside."""
    run.execute(workers=workers, models=partial(stand_ins, pause=0.05), progress=False)


def die_at_write(run: Run, n: int, before: bool) -> None:
    """Execute a run, and die right before or after the n-th file appears under its name."""
    replace, count = os.replace, itertools.count(1)

    def mortal(source, target):
        number = next(count)
        if number == n and before:
            die()
        replace(source, target)
        if number == n:
            die()

    os.replace = mortal
    run.execute(models=stand_ins(), progress=False)
