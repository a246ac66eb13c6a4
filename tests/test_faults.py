"""A game that is killed again and again ends with the bytes of one that was left in peace.

The games are real processes with stand-in players, forked from a server that has imported the
program already, so that twenty kills take seconds. Moments and signals are drawn with a seed.
More kills by hand: FAULT_KILLS=200 ./tests/run.sh tests/test_faults.py -s
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from lib import roundtrip
from lib.players import Models
from lib.presets import get_preset
from tests.standins import Slow, stand_ins, without_weights, write_pictures

MINI = without_weights(get_preset("mini"))
N, K = 13, 3
KILLS = int(os.environ.get("FAULT_KILLS", "20"))
TABLES = ("rows.parquet", "baselines.parquet")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures without captions: their scores need no Java."""
    return write_pictures(tmp_path_factory.mktemp("faults") / "pictures", N, 11)


@pytest.fixture(scope="module")
def server():
    """Processes that start with the program imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_faults"])  # pytest calls this module test_faults
    return context


def play(pictures: str, root: Path, models: Models | None = None):
    """The game that is played everywhere here: thirteen shards of one source."""
    return roundtrip.play(MINI, pictures, "image", N, K, 0, models=models or stand_ins(),
                          root=root, shard_size=1, progress=False)


def play_in_a_process(pictures: str, root: Path, ready) -> None:
    """What a process does that is killed from outside."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    ready.send("ready")
    play(pictures, root, Slow.all(stand_ins()))


def play_until(pictures: str, root: Path, event: int, number: int, ready) -> None:
    """Play until the event-th action on a file (open, rename, remove ...), then send itself a
    signal; tells how many there were if it comes to the end."""
    seen = 0

    def count(name: str, _: tuple) -> None:
        nonlocal seen
        if name in ("open", "os.rename", "os.remove", "os.mkdir"):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), number)

    sys.addaudithook(count)
    play(pictures, root)
    ready.send(seen)


def start(context, target, *arguments):
    """Start a process; returns it and the end of its pipe."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender))
    process.start()
    sender.close()
    return process, receiver


def contents(run) -> dict[str, bytes]:
    """The bytes of everything that must repeat, by name."""
    kept = [*(run.path / name for name in TABLES), *(run.path / "shards").iterdir(),
            *(run.path / "baselines").iterdir(), *(run.path / "images").glob("*/*.png")]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def uncut(pictures, tmp_path_factory):
    run = play(pictures, tmp_path_factory.mktemp("uncut"))
    return contents(run)


def check(run, uncut) -> None:
    """The run is whole, byte for byte, and no temporary file is left."""
    assert contents(run) == uncut
    assert run.info()["counts"]["rows"] == N * K
    assert not list(run.path.rglob("*.tmp"))


def test_killed_at_random_times(server, pictures, uncut, tmp_path):
    """Twenty kills spread over as many games as it takes: a finished one is compared."""
    draw, kills, finished, lost = random.Random(5), 0, 0, 0
    while kills < KILLS:
        root = tmp_path / str(finished)
        before = len(list(root.glob("*/shards/*.parquet")))
        process, ready = start(server, play_in_a_process, pictures, root)
        assert ready.recv() == "ready"
        process.join(draw.uniform(0.01, 0.4))
        if process.is_alive():
            number = draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            os.kill(process.pid, number)
            kills += 1
        process.join()
        lost += len(list(root.glob("*/shards/*.parquet"))) < before
        if process.exitcode == 0:
            check(play(pictures, root), uncut)
            finished += 1
    check(play(pictures, tmp_path / str(finished)), uncut)
    print(f"\n{kills} kills at random times over {finished + 1} games: {lost} lost a shard")
    assert lost == 0


def test_killed_at_random_actions_on_files(server, pictures, uncut, tmp_path):
    """Twenty games, each cut at one of the moments at which it touches a file."""
    process, ready = start(server, play_until, pictures, tmp_path / "whole", 0, 0)
    events = ready.recv()
    process.join()
    draw, lost = random.Random(6), 0
    for game in range(KILLS):
        root = tmp_path / str(game)
        number = draw.choice((signal.SIGKILL, signal.SIGTERM))
        process, _ = start(server, play_until, pictures, root, draw.randint(1, events), number)
        process.join()
        assert process.exitcode == -number
        kept = {path: path.stat().st_mtime_ns for path in root.glob("*/shards/*.parquet")}
        run = play(pictures, root)
        check(run, uncut)
        lost += sum(path.stat().st_mtime_ns != written for path, written in kept.items())
    print(f"\n{KILLS} games killed at one of {events} actions on files: {lost} finished shards played again")
    assert lost == 0
