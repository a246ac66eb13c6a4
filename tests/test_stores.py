"""Runs in stores: the same bytes as on a local disk, one writer at a time, one line for what fails.

Beside fsspec's own memory:// the tests have stores of their own: a disk that only fsspec knows,
which several processes can share, and one whose driver fails as drivers do.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lib import figures, pipeline, results, roundtrip, stores
from lib.errors import UserError
from lib.explorer.runs import finished_runs
from lib.leases import Lease, Times
from lib.presets import get_preset
from lib.results import Run
from lib.stores import StorePath
from tests.mortal import Disk
from tests.standins import Heard, Slow, stand_ins, without_weights, write_pictures

MINI = without_weights(get_preset("mini"))
N, K = 7, 3
QUICK = Times(beat=0.1, stale=0.6, settle=0.05, look=0.05)


class DriverError(Exception):
    """As of many drivers: no OSError."""


class Bad(Disk):
    """A disk that takes ``left`` files and then answers nothing but ``error``."""

    protocol = "bad"
    left, error = 0, DriverError("no")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("bad://"))

    def info(self, path, **options):
        if Bad.left < 0:
            raise Bad.error
        return super().info(path, **options)

    def cat_file(self, path, **options):
        Bad.info(self, "/")
        return super().cat_file(path, **options)

    def pipe_file(self, path, value, **options):
        Bad.left -= 1
        self.info("/")
        super().pipe_file(path, value, **options)


class Buckets(fsspec.AbstractFileSystem):
    """An object store with one bucket that is empty, as credentials of no great rights see it."""

    protocol = "buckets"

    def info(self, path, **_):
        if path == "ours":
            return {"name": path, "type": "directory", "size": 0}
        raise FileNotFoundError(path)


fsspec.register_implementation("bad", Bad, clobber=True)
fsspec.register_implementation("buckets", Buckets, clobber=True)
fsspec.register_implementation("driverless", "no_such_package.files.Files", errtxt="install it")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures without captions: their scores need no Java."""
    return write_pictures(tmp_path_factory.mktemp("stores") / "pictures", N, 3)


def play(pictures, root, **options):
    options = {"models": stand_ins(), "shard_size": 2, **options}
    return roundtrip.play(MINI, pictures, "image", N, K, 0, root=root, progress=False, **options)


def contents(run) -> dict[str, bytes]:
    """The bytes of everything that must repeat, by name."""
    patterns = ("*.parquet", "*/*.parquet", "images/*/*")
    found = [path for pattern in patterns for path in run.path.glob(pattern)]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def local(pictures, tmp_path_factory):
    return play(pictures, tmp_path_factory.mktemp("local"))


@pytest.fixture(params=["memory", "file", "disk"])
def address(request, tmp_path):
    """A place for runs, empty."""
    return f"{request.param}://{tmp_path}/runs"


# --- whole games -------------------------------------------------------------------------------


def test_a_game_in_a_store_has_the_bytes_of_a_local_one(pictures, local, address, monkeypatch):
    monkeypatch.setenv("COMPENDIUM_RUNS", address)
    run = play(pictures, None)
    assert isinstance(run.path, Path) == address.startswith("file")
    assert len(contents(local)) > 2 + 2 * 4 + N and contents(run) == contents(local)
    assert run.rows().equals(local.rows()) and run.baselines().equals(local.baselines())
    assert run.info()["counts"]["rows"] == N * K and set(run.cost()) == set(local.cost())
    # Finished: the tables stay, and everything that shows runs finds this one.
    before = (run.path / "rows.parquet").stat()
    assert play(pictures, None, models=lambda: pytest.fail("is finished")) == run
    assert (run.path / "rows.parquet").stat() == before and before.st_mtime_ns > 0
    assert roundtrip.find_run(MINI, pictures, "image", N, K, 0) == run
    assert finished_runs() == [run] and finished_runs(run.path / "nothing") == []
    name = run.rows()["reconstruction"][0]
    assert np.array_equal(np.asarray(run.image(name)), np.asarray(local.image(name)))
    assert list(run.path.glob(".scratch/*")) == []
    source = figures.Origin(MINI, (run,), 0, "03").record()["input"]
    digest = hashlib.sha256((local.path / "rows.parquet").read_bytes()).hexdigest()
    assert source == [{"rows": f"runs/{run.name}/rows.parquet", "sha256": digest}]


def test_notebooks_see_that_rows_in_a_store_have_changed(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPENDIUM_RUNS", f"memory://{tmp_path}/runs")
    seen = [pipeline.data_digest()]
    for content in (b"one", b"other"):
        (results.runs_root() / "run" / "rows.parquet").write_bytes(content)
        seen.append(pipeline.data_digest())
    assert len({*seen, pipeline.data_digest()}) == 3


@pytest.mark.parametrize(("error", "told"), [
    (OSError(errno.ENOSPC, "full"), "no space left in bad://.*finished rows are kept"),
    (ConnectionResetError("gone"), "cannot be reached, or refuses .ConnectionResetError: gone"),
    (PermissionError(errno.EACCES, "Forbidden"), "PermissionError: .*Forbidden.*check the address"),
    (DriverError("expired https://host/x?sig=HUSHHUSH now"), "DriverError: expired https://host/x.... now"),
])
def test_a_store_that_fails_is_one_line_and_the_rest_is_kept(pictures, local, tmp_path, error, told):
    Bad.left, Bad.error = 10_000, error
    root = stores.at(f"bad://{tmp_path}/runs")
    Bad.left = 14  # in the midst of the shards
    with pytest.raises(UserError, match=told) as caught:
        play(pictures, root)
    assert "\n" not in str(caught.value) and "HUSHHUSH" not in str(caught.value)
    Bad.left = 10_000
    (path,) = root.iterdir()
    kept = {p.name: p.stat().st_mtime_ns for p in path.glob("shards/*.parquet")}
    assert 0 < len(kept) < 4 and not (path / "rows.parquet").is_file()
    (path / ".lock").unlink(missing_ok=True)  # the store could not be told that it is free
    run = play(pictures, root)
    assert contents(run) == contents(local)
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in path.glob("shards/*.parquet")}.items()


def test_a_lost_connection_is_not_taken_for_a_missing_file(tmp_path):
    Bad.left, Bad.error = 10, ConnectionResetError("gone")
    path = stores.at(f"bad://{tmp_path}") / "rows.parquet"
    assert not path.is_file()
    Bad.left = -1
    for look in (path.is_file, path.is_dir, path.stat, lambda: results.find(KEY, True, path.parent),
                 lambda: results.read_table(path, results.ROWS, None), lambda: results.read_json(path)):
        with pytest.raises(UserError, match="gone"):
            look()


KEY = results.RunKey(MINI, "d", "image", 1, 1, 0, "", {})

@pytest.fixture(scope="module")
def server():
    """Processes that start with the program imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_stores"])  # pytest calls this module test_stores
    return context


def play_slowly(pictures: str, root: StorePath) -> None:
    """What a process does that is killed from outside."""
    play(pictures, root, models=Slow.all(stand_ins()), shard_size=1)


def test_killed_in_a_store_and_resumed_here(server, pictures, tmp_path):
    root = stores.at(f"disk://{tmp_path}/runs")
    other = server.Process(target=play_slowly, args=(pictures, root))
    other.start()
    while other.is_alive() and not list(root.glob("*/shards/*.parquet")):
        time.sleep(0.01)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    (path,) = root.iterdir()
    assert not (path / "rows.parquet").is_file() and f"process {other.pid} " in (path / ".lock").read_text()
    (path / ".lock").unlink()  # else it is taken over after two minutes
    run = play(pictures, root)
    assert contents(run) == contents(play(pictures, tmp_path / "uncut", shard_size=1))
    assert list(path.glob(".scratch/*")) == []


def test_a_job_for_another_machine_takes_its_place_along(pictures, local, tmp_path):
    plan = roundtrip.plan_run(MINI, pictures, "image", N, K, 0, f"disk://{tmp_path}/runs", shard_size=2)
    job = pickle.loads(pickle.dumps(plan.jobs[1]))
    job.publish(job.play(stand_ins()))
    assert job.is_done() and roundtrip.pending(plan) == [plan.jobs[0], *plan.jobs[2:]]
    for name in ("shards/00001.parquet", "baselines/00001.parquet"):
        assert (plan.run.path / name).read_bytes() == (local.path / name).read_bytes()


# --- two writers -------------------------------------------------------------------------------


def hold(folder: StorePath, pipe) -> None:
    """What the other process does: it goes when it is told to."""
    with Lease(folder, QUICK):
        pipe.send("held")
        pipe.recv()
        (folder / "left").write_bytes(b"")


def test_the_second_waits_and_says_so(server, tmp_path, monkeypatch, capsys):
    folder = stores.at(f"disk://{tmp_path}/run")
    ours, theirs = server.Pipe()
    other = server.Process(target=hold, args=(folder, theirs))
    other.start()
    assert ours.recv() == "held"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Heard(lambda: ours.send("go")))
        with Lease(folder, dataclasses.replace(QUICK, stale=600)):
            assert (folder / "left").is_file()
        assert f"waiting: process {other.pid} on" in sys.stderr.getvalue()
    other.join()
    with Lease(folder, QUICK):
        assert capsys.readouterr().err == ""
    assert not (folder / ".lock").is_file()


def test_a_lock_is_refreshed_and_a_dead_one_taken_over(tmp_path, capsys):
    lock = stores.at(f"memory://{tmp_path}") / "run" / ".lock"
    lock.write_bytes(b"half of a record")
    start = time.monotonic()
    with Lease(lock.parent, QUICK):
        assert time.monotonic() - start >= QUICK.stale
        deadline = time.monotonic() + 120
        while json.loads(lock.read_text())["beats"] < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        record = json.loads(lock.read_text())
        assert record["beats"] >= 4 and record["holder"].startswith(f"process {os.getpid()} on ")
        assert datetime.fromisoformat(record["time"]) <= datetime.now(UTC)
    assert "waiting: another process is playing run (a lock that" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_of_many_at_once_one_holds(kind, tmp_path):
    """Neither store can refuse a second file of a name, so all may write the lock. They have a whole
    second between looking for it and reading it back: a busy machine may stop one in between."""
    folder = stores.at(f"{kind}://{tmp_path}/run")
    inside, most, turns = [], [], []

    def writer(number: int) -> None:
        with Lease(folder, Times(beat=5, stale=600, settle=1.0, look=0.02)):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(number)
            turns.append(number)

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(turns) == list(range(3)) and max(most) == 1


def test_who_lost_the_lock_writes_nothing_more(tmp_path):
    folder = stores.at(f"memory://{tmp_path}") / "run"
    with Lease(folder, QUICK):
        deadline = time.monotonic() + 120
        while folder not in stores.closed and time.monotonic() < deadline:
            # Again and again: a refresh that had looked before may write over it once.
            (folder / ".lock").write_bytes(b'{"holder": "process 1 on moon"}')
            time.sleep(0.02)
        for write in (lambda: results.write_json(folder / "run.json", {}),
                      lambda: results.write_many({folder / "images" / "1.png": b""}, folder / ".scratch")):
            with pytest.raises(UserError, match=r"now played by process 1 on moon.*finished rows are kept"):
                write()
        (folder.parent / "other").write_bytes(b"")
    assert (folder / ".lock").read_bytes().endswith(b'moon"}') and not (folder / "run.json").is_file()
    results.write_json(folder / "run.json", {})


# --- addresses and paths -----------------------------------------------------------------------


@pytest.mark.parametrize(("address", "told"), [
    ("nonsense://x/y", "nonsense://x/y: no driver knows nonsense://: use s3"),
    ("driverless://b/runs", "needs the package no_such_package, which is not installed: pip install -c"),
    ("buckets://theirs/runs", "'theirs' does not exist there: check the name"),
    ("sftp://me:HUSHHUSH@host/runs", "password or settings in it: .* such as FSSPEC_SFTP_PASSWORD"),
    ("s3://bucket/runs?secret_key=HUSHHUSH", "set the driver's variables, such as AWS_SECRET_ACCESS_KEY"),
    ("simplecache::s3://b/runs", "chained addresses are not supported"),
    ("file://runs", "needs a path from the root"),
])
def test_an_address_that_cannot_be_used_is_one_line(address, told, monkeypatch):
    monkeypatch.setenv("COMPENDIUM_RUNS", address)
    with pytest.raises(UserError, match=told) as caught:
        results.runs_root()
    assert "\n" not in str(caught.value) and "HUSHHUSH" not in str(caught.value)


def test_addresses(tmp_path):
    assert stores.at("data/runs") == Path("data/runs") and stores.at(tmp_path) is tmp_path
    assert stores.at(f"file://{tmp_path}/a") == tmp_path / "a"
    assert stores.at("memory://") == StorePath("memory://")
    assert stores.at("buckets://ours/runs/") == StorePath("buckets://ours/runs")


def test_store_paths_are_like_local_ones(tmp_path):
    names = ["b/rows.parquet", "a/rows.parquet", "a/shards/0", "a/shards/.0.tmp", ".x", "c/d/e/f"]
    there = stores.at(f"disk://{tmp_path}/tree")
    for name in names:
        (there / name).write_bytes(name.encode())
    here = tmp_path / "tree"
    for pattern in ("*", "*/rows.parquet", "a/*", "*/*/*", "a/shards/.*.tmp", "*/nothing", "a*/s*/0"):
        found = sorted(str(path.relative_to(there)) for path in there.glob(pattern)
                       if path.name != ".scratch")
        assert found == sorted(str(path.relative_to(here)) for path in here.glob(pattern)
                               if path.name != ".scratch")
    for name in ("a", "a/rows.parquet", "c/d", "nothing", "nothing/x"):
        remote, path = there / name, here / name
        assert (remote.is_file(), remote.is_dir()) == (path.is_file(), path.is_dir())
        assert remote.name == path.name and remote.parent == there / path.parent.relative_to(here)
        assert remote.parts[-2:] == path.parts[-2:] and remote.is_relative_to(there)
    assert not (there / "ab").is_relative_to(there / "a") and not there.is_relative_to(here)
    assert pickle.loads(pickle.dumps(there / "a")) == there / "a" and str(there / "a").endswith("/tree/a")
    with (there / "b" / "rows.parquet").open("rb") as stream:
        assert stream.read(1) == b"b"
    (there / "a" / "rows.parquet").unlink()
    (there / "a" / "rows.parquet").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (there / "a" / "rows.parquet").unlink()


def test_image_paths_stay_in_the_run(tmp_path):
    run = Run(stores.at(f"memory://{tmp_path}") / "run")
    (run.path.parent / "x.png").write_bytes(b"")
    for name in ("../x.png", "/x.png", "images/../../x.png"):
        with pytest.raises(UserError, match="not inside"):
            run.image(name)
    with pytest.raises(UserError, match=r"image memory://.*/x.png does not exist"):
        run.image("x.png")
