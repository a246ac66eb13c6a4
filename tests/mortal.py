"""Processes that die while they execute a run, and models that their process does not survive."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from pathlib import Path

import numpy as np

from lib.models import Models
from lib.roundtrip import Run
from lib.roundtrip import run as run_module
from tests.standins import stand_ins


class Fragile:
    """A captioner that kills its process at an image of 9 pixels a side: always, or until a file is there."""

    def __init__(self, captioner, once: Path | None) -> None:
        self.captioner, self.once = captioner, once

    def caption(self, images, seeds, decoding):
        if any(np.asarray(image).shape[0] == 9 for image in images) and (self.once is None or not self.once.exists()):
            if self.once is not None:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.captioner.caption(images, seeds, decoding)


class Moody:
    """A captioner that fails without a word at an image of 9 pixels a side."""

    def __init__(self, captioner) -> None:
        self.captioner = captioner

    def caption(self, images, seeds, decoding):
        if any(np.asarray(image).shape[0] == 9 for image in images):
            raise RuntimeError("no kernel\nfor this image")
        return self.captioner.caption(images, seeds, decoding)


def fragile(once: Path | None = None) -> Models:
    """Models whose process dies of the odd image: always, or until the file is there."""
    models = stand_ins()
    return dataclasses.replace(models, captioner=Fragile(models.captioner, once))


def moody() -> Models:
    """Models that fail at the odd image."""
    models = stand_ins()
    return dataclasses.replace(models, captioner=Moody(models.captioner))


def slow() -> Models:
    """Models that take a moment, so that a kill finds them at work."""
    return stand_ins(pause=0.05)


def no_memory() -> Models:
    """Loading that the system ends."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed before")


def execute(run: Run, workers: int = 1) -> None:
    """Execute a run; for a process that is killed from outside."""
    run.execute(workers=workers, models=slow, progress=False)


def die_at_write(run: Run, n: int, before: bool) -> None:
    """Execute a run, and die right before or after the n-th file appears under its name."""
    replace, count = os.replace, itertools.count(1)

    def mortal(source, target):
        number = next(count)
        if number == n and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if number == n:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = mortal
    run.execute(models=stand_ins(), progress=False)


def hold(run: Run, held, release) -> None:
    """Hold a run's lock as an executing process does, until told to let go."""
    with run_module._guarded(run.folder):
        held.set()
        release.wait(60)
