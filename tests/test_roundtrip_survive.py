"""A run ends with the same bytes whatever befalls it: kills, damage, a full disk, company, workers, a store."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import multiprocessing
import os
import shutil
import signal
import threading
import time
from functools import partial

import psutil
import pyarrow.fs
import pytest
from filelock import FileLock
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
FORK.set_forkserver_preload(["tests.mortal", "lib.metrics", "torch"])


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


def test_killed_around_any_file_and_resumed(images, uncut, tmp_path):
    """Kill -9 right before or after the n-th file appears, again and again until the run comes through."""
    run = planned(images, tmp_path)
    for n, before in ((1, False), (4, True), (14, True), (13, False), (9, True), (11, False)):
        process = FORK.Process(target=mortal.die_at_write, args=(run, n, before))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert contents(execute(run)) == uncut
    assert not list(run.folder.rglob("*.tmp"))


def test_lost_files_are_made_again_and_a_damaged_one_is_named(images, uncut, tmp_path):
    run = execute(planned(images, tmp_path))
    (run.folder / "shards" / "00000.parquet").unlink()
    for name, change in (("rows.parquet", lambda data: data[:-1]),
                         ("shards/00001.parquet", lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:])):
        (run.folder / name).write_bytes(change((run.folder / name).read_bytes()))
        with pytest.raises(UserError, match=f"{name} is damaged, remove it and execute the run again"):
            execute(run).rows()
        (run.folder / name).unlink()
    assert contents(execute(run)) == uncut


def test_tables_do_not_depend_on_the_shard_size_and_a_begun_run_keeps_its_own(images, uncut, tmp_path):
    run = execute(planned(images, tmp_path, shard_size=5))
    kept = contents(run)
    assert all(kept[name] == uncut[name] for name in ("rows.parquet", "baselines.parquet"))
    shutil.rmtree(run.folder / "shards")
    (run.folder / "rows.parquet").unlink()
    assert contents(execute(planned(images, tmp_path))) == kept


def test_nothing_is_lost_when_the_disk_is_full(images, uncut, tmp_path, monkeypatch):
    run, write, written = planned(images, tmp_path), run_module.write_atomic, []

    def full(path, data):
        written.append(path)
        if len(written) > 25:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(run_module, "write_atomic", full)
    with pytest.raises(OSError, match="No space left on device"):
        execute(run)
    monkeypatch.setattr(run_module, "write_atomic", write)
    assert (run.folder / "shards" / "00000.parquet").exists()
    assert contents(execute(run)) == uncut


def test_a_second_command_waits_and_says_so(images, uncut, tmp_path, capsys):
    run, held = planned(images, tmp_path), threading.Event()

    def hold():
        run.folder.mkdir()
        with FileLock(run.folder / ".lock"):
            held.set()
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(60)
    execute(run)
    other.join()
    assert f"another process works on {run.name}: waiting" in capsys.readouterr().err
    assert contents(run) == uncut


@pytest.fixture()
def quick_start(monkeypatch):
    """Workers that begin with all modules imported."""
    monkeypatch.setattr(workers_module, "START", "forkserver")


def test_a_killed_worker_is_replaced_and_the_bytes_are_those_of_one(quick_start, images, uncut, tmp_path, capfd):
    once = partial(mortal.fragile, once=tmp_path / "died")
    run = execute(planned(images, tmp_path), once, workers=2)
    assert (tmp_path / "died").exists() and contents(run) == uncut
    assert "its worker was killed" in capfd.readouterr().err and run.cost()["sources"] == N


@pytest.mark.parametrize(("harm", "told"), [
    (mortal.die, "its worker was killed"), (mortal.fail, "RuntimeError: no kernel for this image")])
def test_what_cannot_be_made_is_named_and_the_rest_completes(quick_start, images, uncut, tmp_path, capfd, harm, told):
    run = planned(images, tmp_path)
    with pytest.raises(UserError, match=rf"1 of 4 shards.*shard 1 \(items 04.png, 05.png.*{told}"):
        execute(run, partial(mortal.fragile, harm), workers=2)
    assert [shard.path("shards").is_file() for shard in run.shards()] == [True, False, True, True]
    assert "try 3 of 3 failed: shard 1" in capfd.readouterr().err
    assert contents(execute(run)) == uncut


@pytest.mark.parametrize(("models", "told"), [
    (mortal.die, r"no worker could make anything \(its worker was killed"),
    (partial(stand_ins, spoilt=0.0), "candidate 0 of item 05.png: its similarity")])
def test_what_befalls_all_workers_and_bad_input_stop_the_run(quick_start, images, tmp_path, models, told):
    with pytest.raises(UserError, match=told):
        execute(planned(images, tmp_path), models, workers=2)


def test_workers_end_with_their_parent(images, tmp_path):
    run = planned(images, tmp_path)
    process = FORK.Process(target=mortal.execute, args=(run, 2))
    process.start()
    while process.is_alive() and not list(run.folder.glob("shards/*.parquet")):
        time.sleep(0.05)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.join()
    assert children and not psutil.wait_procs(children, timeout=30)[1]


@pytest.mark.parametrize("url", ["memory://bucket/runs", "s3://bucket/runs"])
def test_a_run_in_a_store_has_the_bytes_of_a_local_one(images, uncut, tmp_path, monkeypatch, url):
    monkeypatch.setattr(pyarrow.fs, "S3FileSystem", lambda: pyarrow.fs.SubTreeFileSystem(
        str(tmp_path), pyarrow.fs.LocalFileSystem()))  # no store can be reached from here
    monkeypatch.setenv("COMPENDIUM_RUNS", url)
    run = execute(planned(images, None))
    (run.folder / "shards" / "00002.parquet").unlink()
    (run.folder / "rows.parquet").unlink()
    assert isinstance(run.folder, UPath) and not run.finished
    execute(planned(images, None))
    assert all((run.folder / name).read_bytes() == data for name, data in uncut.items())
    assert planned(images, None).finished and planned(images, None).rows()["selected"].sum() == N
    assert run.image(run.rows()["reconstruction"][0]).size == (16, 16)
    smaller = plan_run(preset(), images, "image", 2, 0)
    assert smaller.finished and smaller.rows()["rank"].max() == 2


@pytest.fixture(scope="module")
def cluster():
    """A small Ray cluster on this machine, for all tests of this file."""
    pytest.importorskip("ray")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(workers_module._ray_tasks(2, stand_ins))
        except Exception as error:  # Ray gives up by itself after half a minute on a very busy machine
            pytest.skip(f"Ray does not start here: {error}")
        yield


def test_ray_replaces_a_killed_worker(cluster, images, uncut, tmp_path):
    once = partial(mortal.fragile, once=tmp_path / "died")
    run = execute(planned(images, tmp_path), once, workers=2, engine="ray")
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
