"""The notebooks are played beside the other tests, on a core that these leave idle: it takes a minute.

Hence the order of the tests: first those that keep to this process, then those that read what the
notebooks have left, then, with the machine to themselves, those that start many processes.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.scoring import meteor
from lib.scoring.java import find_java
from tests.background import Playing

# Read when torch is imported. With two programs at work on two cores, threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
CROWDED = ("test_browser", "test_crew", "test_crew_ray", "test_faults")


def reads_notebooks(item: pytest.Item) -> bool:
    """Whether a test reads what the notebooks leave behind."""
    return "whole_run" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests in the order that the file's head tells; within a turn they keep theirs."""
    items.sort(key=lambda item: 2 if item.path.stem in CROWDED else reads_notebooks(item))


@pytest.fixture(scope="session", autouse=True)
def playing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playing | None]:
    """The notebooks, started before the first test; None where no chosen test reads them."""
    if not any(map(reads_notebooks, request.session.items)):
        yield None
        return
    with contextlib.suppress(UserError):  # without a Java: the tests that need one say so
        meteor.shared(find_java())  # loads for some seconds beside the first tests
    playing = Playing.start(tmp_path_factory.mktemp("whole_run"))
    yield playing
    playing.stop()


@pytest.fixture(scope="session")
def whole_run(playing: Playing) -> Path:
    """The folder where the run command has played all notebooks."""
    return playing.finish()


@pytest.fixture(scope="module")
def frozen() -> Iterator[None]:
    """For tests that collect garbage: all that was imported need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
