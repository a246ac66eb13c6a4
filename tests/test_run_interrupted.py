"""Ctrl-C ends the run command at once with all that it has started, and the same command goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil

from lib.base import ROOT

FLAGS = ["--n", "34", "--candidates", "2", "--dataset", "picturebook-coco", "--only", "01"]  # two shards
COMMAND = [sys.executable, "-m", "lib.run", *FLAGS]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # both shards side by side, as where there are two cores
    cut = subprocess.Popen(COMMAND, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (shards := list(tmp_path.glob("runs/*/shards/00000.parquet"))):
        assert cut.poll() is None
        time.sleep(0.02)
    started, made = psutil.Process(cut.pid).children(recursive=True), shards[0].stat().st_mtime_ns
    cut.send_signal(signal.SIGINT)
    assert cut.communicate(timeout=60)[1].strip() == "interrupted, run again to continue" and cut.returncode == 130
    assert started and not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.glob("runs/*/rows.parquet"))

    done = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert shards[0].stat().st_mtime_ns == made  # reused, not made again
    assert len(pd.read_parquet(next(tmp_path.glob("runs/*/rows.parquet")))) == 68


def test_a_killed_run_leaves_no_process_behind(tmp_path):
    killed = subprocess.Popen(COMMAND, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("runs/*/run.json")):  # its notebook has begun
        assert killed.poll() is None
        time.sleep(0.02)
    started = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    assert started and not psutil.wait_procs(started, timeout=30)[1]


def test_ctrl_c_while_packages_are_imported_is_one_line():
    cut = subprocess.Popen(COMMAND, cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True)
    while len(psutil.Process(cut.pid).children()) < 2:  # until kernels' common process begins
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(cut.pid, signal.SIGINT)  # as a terminal sends it
    assert cut.communicate(timeout=60)[1].strip() == "interrupted, run again to continue"
