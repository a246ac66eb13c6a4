"""Several workers: the same bytes as one, after the death of a worker too; what cannot be played is
named while the rest is finished."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest

from lib import jobs, roundtrip
from lib.errors import UserError
from lib.players import Cost
from lib.presets import get_preset
from tests.mortal import contents, fragile, no_memory, paint
from tests.standins import stand_ins, without_weights

MINI = without_weights(get_preset("mini"))
N, K = 12, 3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return paint(tmp_path_factory.mktemp("crew") / "pictures", N)


def play(pictures, root, models, **options):
    options = {"workers": 2, "progress": False, "shard_size": 2, **options}
    return roundtrip.play(MINI, pictures, "image", N, K, 0, models=models, root=root, **options)


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
    assert report.trace.startswith("Traceback ") and "AttributeError" in report.trace
    some_jobs[1].folder.mkdir()
    (some_jobs[1].folder / "images").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        jobs.work(some_jobs[1], stand_ins())
