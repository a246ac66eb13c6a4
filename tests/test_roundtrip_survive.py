"""A run ends with the same bytes whatever befalls it: kills, damage, a full disk, company, workers, a store."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from functools import partial

import pyarrow.fs
import pytest
from upath import UPath

from lib.base import UserError
from lib.data import load_dataset
from lib.roundtrip import plan_run
from lib.roundtrip import run as run_module
from lib.roundtrip import workers as workers_module
from tests import mortal
from tests.standins import contents, paint, preset, stand_ins

N, K = 14, 3
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.mortal", "lib.metrics"])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images without captions, so that no Java is started; image 5 is odd, in shard 1 of four."""
    return load_dataset(paint(tmp_path_factory.mktemp("survive") / "images", N, odd=5))


def planned(images, root, shard_size=4):
    return plan_run(preset(), images, "image", K, 0, root, shard_size=shard_size)


def execute(run, models=None, **options):
    return run.execute(models=models or stand_ins(), progress=False, **options)


@pytest.fixture(scope="module")
def uncut(images, tmp_path_factory):
    """What every run here must end with."""
    return contents(execute(planned(images, tmp_path_factory.mktemp("uncut"))))


def tables(run):
    """The bytes of the two finished tables."""
    return [(run.folder / name).read_bytes() for name in ("rows.parquet", "baselines.parquet")]


# --- kills and damage -----------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_killed_around_any_file_and_resumed(images, uncut, tmp_path, before):
    """Kill -9 right before or after the n-th file appears, again and again until the run comes through."""
    run, kills = planned(images, tmp_path), 0
    for n in random.Random(before).sample(range(1, 16), 5):
        process = FORK.Process(target=mortal.die_at_write, args=(run, n, before))
        process.start()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 2
    assert contents(execute(run)) == uncut
    assert not list(run.folder.rglob("*.tmp"))


def test_killed_from_outside_and_resumed(images, uncut, tmp_path):
    run = planned(images, tmp_path)
    for wait in (0.05, 0.1, 0.2):
        process = FORK.Process(target=mortal.execute, args=(run,))
        process.start()
        while process.is_alive() and not (run.folder / "run.json").exists():
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        process.join()
    assert contents(execute(run)) == uncut


@pytest.mark.parametrize("name", ["shards/00001.parquet", "baselines/00002.parquet", "rows.parquet"])
@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_a_lost_or_damaged_file_is_made_again(images, uncut, tmp_path, name, damage, capsys):
    run = execute(planned(images, tmp_path))
    path, data = run.folder / name, (run.folder / name).read_bytes()
    flipped = data[:200] + bytes([data[200] ^ 1]) + data[201:]
    path.write_bytes({"lost": b"", "cut": data[: len(data) // 2], "flipped": flipped}[damage])
    if damage == "lost":
        path.unlink()
    if name == "rows.parquet" and damage != "lost":
        with pytest.raises(UserError, match="rows.parquet is damaged, remove it"):
            run.rows()
    (run.folder / "rows.parquet").unlink(missing_ok=True)
    assert contents(execute(run)) == uncut
    assert ("is damaged, and made again" in capsys.readouterr().err) == (damage != "lost" and name != "rows.parquet")


def test_a_shard_of_other_sources_is_made_again(images, uncut, tmp_path):
    run = execute(planned(images, tmp_path))
    (run.folder / "shards" / "00001.parquet").write_bytes((run.folder / "shards" / "00000.parquet").read_bytes())
    (run.folder / "rows.parquet").unlink()
    assert contents(execute(run)) == uncut


def test_a_begun_run_keeps_its_shards(images, uncut, tmp_path):
    run = planned(images, tmp_path)
    execute(run)
    shutil.rmtree(run.folder / "shards")
    (run.folder / "rows.parquet").unlink()
    assert contents(execute(planned(images, tmp_path, shard_size=5))) == uncut


def test_tables_do_not_depend_on_the_shard_size(images, uncut, tmp_path):
    run = execute(planned(images, tmp_path, shard_size=5))
    assert tables(run) == [uncut["rows.parquet"], uncut["baselines.parquet"]]


@pytest.mark.parametrize(("code", "told"), [
    (errno.ENOSPC, "No space left.*make room"), (errno.EDQUOT, "make room"), (errno.EACCES, "another folder")])
def test_a_full_or_forbidden_disk_is_one_line_and_nothing_is_lost(images, uncut, tmp_path, monkeypatch, code, told):
    run, write, written = planned(images, tmp_path), run_module.write_atomic, []

    def full(path, data):
        written.append(path)
        if len(written) > 25:
            raise OSError(code, os.strerror(code), str(path))
        write(path, data)

    monkeypatch.setattr(run_module, "write_atomic", full)
    with pytest.raises(UserError, match=told) as caught:
        execute(run)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(run_module, "write_atomic", write)
    assert (run.folder / "shards" / "00000.parquet").exists()
    assert contents(execute(run)) == uncut


def test_a_second_command_waits_and_says_so(images, uncut, tmp_path, capsys):
    run, held, release = planned(images, tmp_path), FORK.Event(), FORK.Event()
    process = FORK.Process(target=mortal.hold, args=(run, held, release))
    process.start()
    assert held.wait(60)

    said = threading.Timer(1.0, release.set)
    said.start()
    execute(run)
    process.join()
    assert f"another process works on {run.name}: waiting" in capsys.readouterr().err
    assert contents(run) == uncut


# --- several workers ------------------------------------------------------------------------------


@pytest.fixture()
def quick_start(monkeypatch):
    """Workers that begin with all modules imported."""
    monkeypatch.setattr(workers_module, "START", "forkserver")


def test_a_killed_worker_is_replaced_and_the_bytes_are_those_of_one(quick_start, images, uncut, tmp_path, capfd):
    run = execute(planned(images, tmp_path), partial(mortal.fragile, tmp_path / "died"), workers=2)
    assert (tmp_path / "died").exists() and contents(run) == uncut
    assert "its worker was killed" in capfd.readouterr().err and run.cost()["sources"] == N


def test_what_cannot_be_made_is_named_and_the_rest_completes(quick_start, images, uncut, tmp_path, capfd):
    run = planned(images, tmp_path)
    with pytest.raises(UserError, match=r"1 of 4 shards.*shard 1 \(items 04.png, 05.png.*its worker was killed"):
        execute(run, mortal.fragile, workers=2)
    assert [shard.done() for shard in run.shards()] == [True, False, True, True]
    assert capfd.readouterr().err.count("is tried again: shard 1") == 2
    assert contents(execute(run)) == uncut


def test_no_worker_comes_to_life(quick_start, images, tmp_path):
    with pytest.raises(UserError, match="every worker was killed before it made anything"):
        execute(planned(images, tmp_path), mortal.no_memory, workers=2)


class Inline(contextlib.ExitStack):
    """A pool that works in this process, so that failing models can be tried quickly."""

    def __init__(self, width):
        super().__init__()

    def submit(self, work, *arguments):
        future = workers_module.Future()
        future.set_result(work(*arguments))
        return future


@pytest.mark.parametrize(("models", "times", "told"), [
    (mortal.moody, 2, "RuntimeError: no kernel for this image"),
    (lambda: stand_ins(spoilt=0.0), 0, "candidate 0 of item 05.png: its similarity")])
def test_bad_input_is_tried_once_else_three_times(images, tmp_path, monkeypatch, capsys, models, times, told):
    monkeypatch.setattr(workers_module, "_Processes", Inline)
    run = planned(images, tmp_path)
    with pytest.raises(UserError, match=f"1 of 4 shards.*{told}"):
        execute(run, models, workers=2)
    assert capsys.readouterr().err.count("is tried again: shard 1") == times
    assert [shard.done() for shard in run.shards()] == [True, False, True, True]


def test_workers_end_with_their_parent(images, tmp_path):
    run = planned(images, tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=mortal.execute, args=(run, 2))
    process.start()
    while process.is_alive() and not list(run.folder.glob("shards/*.parquet")):
        time.sleep(0.05)
    children = children_of(process.pid)
    process.kill()
    process.join()
    end = time.monotonic() + 30
    while any(map(alive, children)) and time.monotonic() < end:
        time.sleep(0.1)
    assert children and not any(map(alive, children))


def children_of(pid):
    """The process numbers of a process's children (Linux)."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as stream:
        return [int(number) for number in stream.read().split()]


def alive(pid):
    """Whether a process runs (a dead one that nobody has waited for does not)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- a store --------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["memory://bucket/runs", "s3://bucket/runs"])
def test_a_run_in_a_store_has_the_bytes_of_a_local_one(images, uncut, tmp_path, monkeypatch, url):
    monkeypatch.setattr(pyarrow.fs, "S3FileSystem", lambda: pyarrow.fs.SubTreeFileSystem(
        str(tmp_path), pyarrow.fs.LocalFileSystem()))  # no store can be reached from here
    monkeypatch.setenv("COMPENDIUM_RUNS", url)
    run = execute(planned(images, None))
    (run.folder / "shards" / "00002.parquet").write_bytes(b"damaged")
    (run.folder / "rows.parquet").unlink()
    assert isinstance(run.folder, UPath) and not run.finished
    execute(planned(images, None))
    assert all((run.folder / name).read_bytes() == data for name, data in uncut.items())
    assert planned(images, None).finished and planned(images, None).rows()["selected"].sum() == N
    assert run.image(run.rows()["reconstruction"][0]).size == (16, 16)
    smaller = plan_run(preset(), images, "image", 2, 0)
    assert smaller.finished and smaller.rows()["rank"].max() == 2


# --- Ray ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    """A small Ray cluster on this machine, for all tests of this file."""
    pytest.importorskip("ray")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(workers_module._ray_cluster(2))
        except Exception as error:  # Ray gives up by itself after half a minute on a very busy machine
            pytest.skip(f"Ray does not start here: {error}")
        yield


def test_ray_replaces_a_killed_worker(cluster, images, uncut, tmp_path):
    run = execute(planned(images, tmp_path), partial(mortal.fragile, tmp_path / "died"), workers=2, engine="ray")
    assert (tmp_path / "died").exists() and contents(run) == uncut


def test_ray_names_what_cannot_be_made(cluster, images, uncut, tmp_path):
    run = planned(images, tmp_path)
    with pytest.raises(UserError, match=r"1 of 4 shards.*shard 1 \(items 04.png.*its worker was killed"):
        execute(run, mortal.fragile, workers=2, engine="ray")
    assert contents(execute(run, stand_ins, workers=2, engine="ray")) == uncut


def test_ray_that_is_not_installed_is_one_line(images, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package ray"):
        execute(planned(images, tmp_path), stand_ins, engine="ray")


@pytest.mark.parametrize(("nodes", "workers", "cpus", "gpus"), [
    ([(8, 0)], 2, 4, 0), ([(8, 0)], 3, 2, 0), ([(3, 0), (3, 0)], 3, 1, 0), ([(2, 0)], 4, 0.5, 0),
    ([(16, 2)], 2, 8, 1), ([(16, 2)], 4, 4, 0.5), ([(8, 5)], 8, 1, 0.5)])
def test_all_ray_workers_fit(nodes, workers, cpus, gpus):
    known = [{"Alive": True, "Resources": {"CPU": float(c), "GPU": float(g)}} for c, g in nodes]
    share = workers_module.share([*known, {"Alive": False, "Resources": {}}], workers)
    assert share == {"num_cpus": cpus, "num_gpus": gpus}
