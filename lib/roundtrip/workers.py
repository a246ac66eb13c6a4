"""Who makes the shards of a run: this process, several processes of this machine, or the actors of a Ray cluster.

Workers share nothing but the run's folder; each loads the models once and writes its shards itself.

- ``engine="local"``: processes, which divide the processor's cores and take the graphics cards in turn. One that is
  killed is replaced. Its shard is tried again alone, so that no other is blamed; after three tries it is given up.
- ``engine="ray"``: actors of the cluster that RAY_ADDRESS names (``ray start --head`` prints it), or of one that is
  started here. Program, data and run folder lie under the same path on each machine. Ray replaces actors that die.
  Needs ``pip install --no-deps -r requirements-ray.lock``.

A shard that fails does not stop the others. It is named when all that can be done is done. What goes wrong in
writing (a full disk) stops the run at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lib.base import ROOT, UserError
from lib.presets import Preset

if TYPE_CHECKING:
    from lib.models import Models
    from lib.roundtrip.run import Run, Shard
    from lib.roundtrip.steps import Cost

TRIES = 3
Load = Callable[[], "Models"]
Done = Callable[["Shard", "Cost"], None]


class Progress:
    """A bar over a run's rows: drawn on a terminal, elsewhere a plain line every ten seconds."""

    def __init__(self, run: Run, waiting: Sequence[Shard], shown: bool) -> None:
        terminal, k = sys.stderr.isatty(), run.n_candidates
        rest = k * sum(len(shard.items) for shard in waiting)
        plain = None if terminal else "{desc}: {n_fmt} of {total_fmt} rows, {elapsed} since the start, {remaining} left\n"
        self.bar = tqdm(total=k * len(run.dataset.items), initial=k * len(run.dataset.items) - rest, desc=run.name,
                        unit="row", disable=not shown, bar_format=plain, mininterval=0.5 if terminal else 10,
                        maxinterval=10, dynamic_ncols=terminal)
        self.begun, self.ahead = time.perf_counter(), 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.begun

    def alive(self) -> None:
        """Show on a terminal that time goes on."""
        if sys.stderr.isatty() and not self.bar.disable:
            self.bar.refresh()

    def tick(self, rows: int) -> None:
        """Count rows whose image is there, before their shard is done."""
        self.ahead += rows
        self.bar.update(rows)

    def done(self, shard: Shard) -> None:
        """Count a shard."""
        rows = len(shard.items) * shard.n_candidates
        ahead = min(rows, self.ahead)
        self.ahead -= ahead
        self.bar.update(rows - ahead)


def make(shards: Sequence[Shard], workers: int, engine: str, models: Models | Load | None, preset: Preset, done: Done,
         bar: Progress) -> dict[str, Any]:
    """Make the shards and call done with each and its cost; what the models are (revision, device, number type).

    Raises UserError for an engine that is not there, and when all that can be done is done, if shards were given up.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise UserError(f"WORKERS = {workers!r}: must be a whole number of at least 1")
    if engine not in ("local", "ray"):
        raise UserError(f"ENGINE = {engine!r}: choose local or ray")
    load = models if callable(models) else partial(_load, preset) if models is None else lambda: models
    if engine == "local" and workers == 1:
        return _make_here(shards, load(), done, bar)
    failed: dict[int, str] = {}
    if engine == "ray":
        described = _make_on_ray(shards, min(workers, len(shards)), load, done, failed)
    else:
        described = _make_in_processes(shards, min(workers, len(shards)), load, done, failed, bar)
    if failed:
        first = min(failed)
        name = next(str(shard) for shard in shards if shard.index == first)
        raise UserError(f"{len(failed)} of {len(shards)} shards could not be made, all others are kept. First {name}: "
                        f"{failed[first]}. Mend or take out these sources and run again")
    return described


def _load(preset: Preset) -> Models:
    """A preset's models; of several workers each takes the next graphics card."""
    import torch  # slow to import, and only needed where models are loaded

    from lib.models import load_models

    number = multiprocessing.current_process().name.rpartition("-")[2]
    if torch.cuda.is_available() and number.isdecimal():
        torch.cuda.set_device(int(number) % torch.cuda.device_count())
    return load_models(preset)


def _described(models: Models) -> dict[str, Any]:
    """What was loaded, by part; nothing for models that keep no settings."""
    from lib.models import describe

    parts = {part: describe(model) for part, model in vars(models).items() if model is not None}
    return {part: facts for part, facts in parts.items() if facts}


def _make_here(shards: Sequence[Shard], models: Models, done: Done, bar: Progress) -> dict[str, Any]:
    """Make shards one after the other, while a thread writes the files of the last one."""
    with ThreadPoolExecutor(1) as writer:
        last: tuple[Shard, Future[Cost]] | None = None
        for shard in shards:
            batch = shard.make(models, bar.tick)
            if last:
                done(last[0], last[1].result())  # at most one shard waits in memory; a full disk stops us here
            last = shard, writer.submit(shard.publish, batch)
        if last:
            done(last[0], last[1].result())
    return _described(models)


# --- in a worker ----------------------------------------------------------------------------------

_models: Models  # of this worker process
_problem = ""  # why they could not be loaded


def _start(load: Load, threads: int) -> None:
    """Begin the life of a worker process, which ends with its parent, however that ends."""
    global _models, _problem
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read when torch is imported, thus in load()
    try:
        _models = load()
    except Exception as error:  # an initializer's own errors would be told as a death without a word
        _problem = _one_line(error)


def _ready() -> dict[str, Any]:
    """What this worker's models are; UserError if they could not be loaded."""
    if _problem:
        raise UserError(_problem)
    return _described(_models)


def _work(shard: Shard) -> tuple[Cost | str, bool]:
    """Make and write a shard with this worker's models."""
    return _made(shard, _models)


def _made(shard: Shard, models: Models) -> tuple[Cost | str, bool]:
    """Make and write a shard: its cost, or the problem in making it and whether another try may help."""
    try:
        batch = shard.make(models)
    except Exception as error:  # any library may raise anything
        return _one_line(error), not isinstance(error, UserError)  # bad input stays bad
    return shard.publish(batch), False


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text[:200]}"


# --- processes --------------------------------------------------------------------------------------


def _make_in_processes(shards: Sequence[Shard], workers: int, load: Load, done: Done, failed: dict[int, str],
                       bar: Progress) -> dict[str, Any]:
    """Make shards in processes; adds to failed {shard's index: problem}. A pool that broke is started afresh."""
    waiting, tries, deaths, described = list(shards), Counter(), 0, {}

    def settle(shard: Shard, outcome: Cost | str, again: bool) -> None:
        if not isinstance(outcome, str):
            waiting.remove(shard)
            done(shard, outcome)
            return
        tries[shard.index] += 1
        given_up = not again or tries[shard.index] >= TRIES
        print(f"{'given up' if given_up else 'is tried again'}: {shard}: {outcome}", file=sys.stderr, flush=True)
        if given_up:
            failed[shard.index] = outcome
            waiting.remove(shard)

    while waiting:
        suspects = [shard for shard in waiting if tries[shard.index]]
        queue, running = suspects or list(waiting), {}
        with _Pool(1 if suspects else workers, load) as pool:
            try:
                described, deaths = pool.ready(), 0
                while queue or running:
                    while queue and len(running) < pool.width:
                        shard = queue.pop(0)
                        running[pool.submit(_work, shard)] = shard
                    for future in wait(running, 2, FIRST_COMPLETED)[0]:
                        outcome = future.result()
                        settle(running.pop(future), *outcome)
                    bar.alive()
            except BrokenProcessPool:
                deaths += not running
                if deaths >= TRIES:
                    raise UserError(f"{deaths} workers died while they loaded the models (out of memory?): use fewer "
                                    "workers; finished rows are kept") from None
                for shard in running.values():
                    settle(shard, "its worker was killed (out of memory?)", True)
    return described


class _Pool(ProcessPoolExecutor):
    """Worker processes with models of their own, which divide the processor's cores."""

    def __init__(self, width: int, load: Load) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Started afresh (spawn): CUDA and thread pools do not survive a fork.
        super().__init__(width, multiprocessing.get_context("spawn"), _start, (load, max(1, cores // width)))
        self.width, self.others = width, set(multiprocessing.active_children())

    def ready(self) -> dict[str, Any]:
        """Wait for a worker's models; what they are."""
        answers = [self.submit(_ready) for _ in range(self.width)]  # one each, so that all are started
        return wait(answers, None, FIRST_COMPLETED)[0].pop().result()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind:  # interrupted, or the disk is full: nobody waits for what they do, and files are whole or absent
            for worker in set(multiprocessing.active_children()) - self.others:
                worker.terminate()
        super().__exit__(kind, *rest)


# --- Ray --------------------------------------------------------------------------------------------


class _Actor:
    """A Ray actor: one set of models, which makes one shard after the other."""

    def __init__(self, load: Load) -> None:
        self.load = load

    def ready(self) -> dict[str, Any]:
        """Load the models; what they are. Not in ``__init__``, whose errors Ray tells as a death without a word."""
        self.models = self.load()
        return _described(self.models)

    def work(self, shard: Shard) -> tuple[Shard, Cost | str]:
        """Make and write a shard; after a restart the models are loaded anew."""
        if not hasattr(self, "models"):
            self.ready()
        for _ in range(TRIES):
            outcome, again = _made(shard, self.models)
            if not isinstance(outcome, str) or not again:
                break
        return shard, outcome


def _make_on_ray(shards: Sequence[Shard], workers: int, load: Load, done: Done, failed: dict[int, str]) -> dict[str, Any]:
    """Make shards by Ray actors; adds to failed {shard's index: problem}. Ray restarts actors and repeats their calls."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("ENGINE = 'ray' needs the package ray: .venv/bin/python -m pip install --no-deps -r "
                        "requirements-ray.lock, or use local")
    import ray
    from ray.util import ActorPool

    ours = not ray.is_initialized()
    if ours:
        _join(ray)
    maker = ray.remote(_Actor).options(max_restarts=-1, max_task_retries=TRIES - 1, scheduling_strategy="SPREAD",
                                       **_share(ray.nodes(), workers))
    actors = [maker.remote(load) for _ in range(workers)]
    left = {shard.index for shard in shards}
    try:
        described = ray.get(ray.wait([actor.ready.remote() for actor in actors])[0][0])
        pool = ActorPool(actors)
        for shard in shards:
            pool.submit(lambda actor, one: actor.work.remote(one), shard)
        while pool.has_next():
            with contextlib.suppress(ray.exceptions.ActorError):  # the shard that killed it three times stays left
                shard, outcome = pool.get_next_unordered()
                left.discard(shard.index)
                if isinstance(outcome, str):
                    failed[shard.index] = outcome
                else:
                    done(shard, outcome)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, (UserError, OSError)) else error from None
    except ray.exceptions.ActorError as error:
        raise UserError(f"Ray actors died while they loaded the models (out of memory?): use fewer workers ({error})"
                        ) from None
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()
    failed |= dict.fromkeys(left, f"its actor was lost {TRIES} times (killed, out of memory, or its machine is gone)")
    return described


def _join(ray: Any) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine without dashboard and telemetry."""
    settings: dict[str, Any] = {"log_to_driver": False, "job_config": ray.job_config.JobConfig(
        _py_driver_sys_path=[str(ROOT)])}  # where actors find the program
    if not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        settings |= {"address": "local", "include_dashboard": False, "object_store_memory": 100 << 20}
    ray.init(**settings)


def _share(nodes: Sequence[Mapping[str, Any]], workers: int) -> dict[str, float]:
    """What one actor gets so that all fit: whole processors while there are enough, and an equal part of a card."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cores = [int(node.get("CPU", 0)) for node in alive]
    cards = sum(int(node.get("GPU", 0)) for node in alive)
    part = lambda total: 1 / math.ceil(workers / max(1, total))  # noqa: E731
    whole = [n for n in range(1, max(cores) + 1) if sum(core // n for core in cores) >= workers]
    return {"num_cpus": max(whole, default=part(sum(cores))), "num_gpus": part(cards) if cards else 0}
