"""Several workers: the same bytes as one, after the death of a worker too; what cannot be played is
named while the rest is finished."""

from __future__ import annotations

import dataclasses
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.standins import COLOURS, stand_ins, without_weights

from lib import jobs, roundtrip
from lib.errors import UserError
from lib.players import Cost, Models
from lib.presets import get_preset

MINI = without_weights(get_preset("mini"))
N, K = 12, 3
MARKED = 5  # the place of the picture that some players here cannot bear


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of twelve colours; the marked one is of a size of its own."""
    folder = tmp_path_factory.mktemp("crew") / "pictures"
    folder.mkdir()
    for i in range(N):
        base = np.array(list(COLOURS.values())[i % 6]) * (1 - i / 20)
        shape = (9, 9, 3) if i == MARKED else (8, 8, 3)
        noise = np.random.default_rng(i).normal(0, 30, shape)
        pixels = np.clip(base + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return f"folder:{folder}"


class Fragile:
    """A captioner that kills its process at the marked picture: always, or until a file is there."""

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


def fragile(once: Path | None = None) -> Models:
    models = stand_ins()
    return dataclasses.replace(models, captioner=Fragile(models.captioner, once))


def no_memory() -> Models:
    """Loading that the system ends."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed before")


def play(pictures, root, models, **options):
    options = {"workers": 2, "progress": False, "shard_size": 2, **options}
    return roundtrip.play(MINI, pictures, "image", N, K, 0, models=models, root=root, **options)


def contents(run):
    """The bytes of everything that must repeat, by name."""
    kept = [run.path / "rows.parquet", run.path / "baselines.parquet",
            *(run.path / "shards").iterdir(), *(run.path / "baselines").iterdir(),
            *(run.path / "images").glob("*/*.png")]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    return play(pictures, tmp_path_factory.mktemp("alone"), stand_ins, workers=1)


def test_a_killed_worker_is_replaced_and_the_bytes_are_those_of_one(
        pictures, alone, tmp_path, capfd):
    run = play(pictures, tmp_path, partial(fragile, tmp_path / "once"), progress=True)
    assert contents(run) == contents(alone)
    said = capfd.readouterr().err
    assert "is tried again: shard 2 (items 04.png, 05.png): its worker was killed by signal 9" in said
    assert said.count("12/12") == 1  # one bar for all workers
    assert run.cost()["passes"] == alone.cost()["passes"]


def test_what_cannot_be_played_is_named_and_the_rest_completes(pictures, alone, tmp_path, capfd):
    with pytest.raises(UserError, match=r"1 of 6 shards could not be played, all others are kept. "
                                        r"First shard 2 \(items 04.png, 05.png\): its worker was"):
        play(pictures, tmp_path, fragile)
    assert capfd.readouterr().err.count("its worker was killed by signal 9") == jobs.TRIES
    kept = {path.stem for path in tmp_path.glob("*/shards/*.parquet")}
    assert kept == {"00000", "00001", "00003", "00004", "00005"}
    run = play(pictures, tmp_path, stand_ins, workers=1)  # mended: only that shard is played
    assert contents(run) == contents(alone)


def test_no_worker_comes_to_life(pictures, tmp_path):
    with pytest.raises(UserError, match="3 workers died while they loaded the models"):
        play(pictures, tmp_path, no_memory)


@pytest.mark.parametrize(("options", "reason"), [
    ({"workers": 0}, "workers = 0"), ({"workers": "2"}, "workers = '2'"),
    ({"engine": "abacus"}, "unknown engine 'abacus'"),
    ({"models": stand_ins()}, "hand over a function"),
])
def test_bad_parameters(pictures, tmp_path, options, reason):
    with pytest.raises(UserError, match=reason):
        play(pictures, tmp_path, **{"models": stand_ins, **options})
    assert not list(tmp_path.iterdir())


# --- the ledger, without processes ---------------------------------------------------------------


@pytest.fixture
def some_jobs(pictures, tmp_path):
    return roundtrip.plan_run(MINI, pictures, "image", N, K, 0, tmp_path, 2).jobs


def test_a_failing_shard_is_tried_three_times_and_bad_input_once(some_jobs, capsys):
    finished = []
    hooks = jobs.Hooks(lambda loaded: None, lambda job, cost: finished.append(job.index))
    ledger = jobs.Ledger.of(some_jobs)
    tried = []
    while ledger.waiting:
        job = ledger.waiting.popleft()
        tried.append(job.index)
        answer = {1: jobs.Report(problem="flaky"), 4: jobs.Report(problem="bad", hopeless=True)}
        ledger.settle(job, answer.get(job.index, jobs.Report(cost=Cost())), hooks)
    assert tried == [0, 1, 2, 3, 4, 5, 1, 1] and finished == [0, 2, 3, 5]
    with pytest.raises(UserError, match=r"^2 of 6 shards .* First shard 1 .*: flaky. Mend"):
        ledger.conclude()
    assert capsys.readouterr().err.count("given up: ") == 2


def test_work_reports_what_fails_in_playing_and_raises_what_fails_in_writing(some_jobs):
    broken = dataclasses.replace(stand_ins(), generator=None)
    report = jobs.work(some_jobs[0], broken)
    assert report.problem.startswith("AttributeError: ") and not report.hopeless
    some_jobs[1].folder.mkdir()
    (some_jobs[1].folder / "images").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        jobs.work(some_jobs[1], stand_ins())
