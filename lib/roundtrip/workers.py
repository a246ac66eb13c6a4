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
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from lib.base import ROOT, UserError
from lib.presets import Preset

if TYPE_CHECKING:
    from lib.models import Models
    from lib.roundtrip.run import Shard
    from lib.roundtrip.steps import Cost, Tick

TRIES = 3
START = "spawn"  # workers begin afresh: CUDA and thread pools do not survive a fork
Load = Callable[[], "Models"]
Done = Callable[["Cost"], None]


def make_shards(shards: Sequence[Shard], workers: int, engine: str, models: Models | Load | None, preset: Preset,
                done: Done, tick: Tick) -> dict[str, Any]:
    """Make the shards; what the models are (id, revision, device, number type).

    done is called with the cost of each shard when its files are written, tick with the rows that came along (0: time
    goes on). Raises UserError for an engine that is not there, and when all that can be done is done, if shards were
    given up.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise UserError(f"WORKERS = {workers!r}: must be a whole number of at least 1")
    if engine not in ("local", "ray"):
        raise UserError(f"ENGINE = {engine!r}: choose local or ray")
    load = models if callable(models) else partial(_load, preset) if models is None else lambda: models
    if engine == "local" and workers == 1:
        return _make_here(shards, load, done, tick)
    make = _make_on_ray if engine == "ray" else _make_in_processes
    described, failed = make(shards, min(workers, len(shards)), load, done, tick)
    if failed:
        shard = min(failed, key=lambda one: one.index)
        raise UserError(f"{len(failed)} of {len(shards)} shards could not be made, all others are kept. First {shard}: "
                        f"{failed[shard]}. Mend or take out these sources and run again")
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


def _make_here(shards: Sequence[Shard], load: Load, done: Done, tick: Tick) -> dict[str, Any]:
    """Make shards one after the other, while a thread writes the files of the last one."""
    begun = time.perf_counter()
    models, loading, last = load(), time.perf_counter() - begun, None
    with ThreadPoolExecutor(1) as writer:
        for shard in shards:
            batch = shard.make(models, tick)
            batch.cost["seconds: load"], loading = loading, 0.0
            if last is not None:
                done(last.result())  # at most one shard waits in memory; a full disk stops us here
            last = writer.submit(shard.publish, batch)
        done(last.result())
    return _described(models)


# in a worker process

_models: Models  # of this process
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


def _work(shard: Shard, models: Models | None = None) -> tuple[Cost | str, bool]:
    """Make and write a shard: its cost, or the problem in making it and whether another try may help."""
    try:
        batch = shard.make(models or _models)
    except Exception as error:  # any library may raise anything
        return _one_line(error), not isinstance(error, UserError)  # bad input stays bad
    return shard.publish(batch), False


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text[:200]}"


# processes


class _Pool(ProcessPoolExecutor):
    """Worker processes with models of their own, which divide the processor's cores."""

    def __init__(self, width: int, load: Load) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.width, self.others = width, set(multiprocessing.active_children())
        super().__init__(width, multiprocessing.get_context(START), _start, (load, max(1, cores // width)))

    def ready(self) -> dict[str, Any]:
        """Wait for a worker's models; what they are."""
        answers = [self.submit(_ready) for _ in range(self.width)]  # one each, so that all are started
        return wait(answers, None, FIRST_COMPLETED)[0].pop().result()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind:  # interrupted, or the disk is full: nobody waits for what they do, and files are whole or absent
            for worker in set(multiprocessing.active_children()) - self.others:
                worker.terminate()
        super().__exit__(kind, *rest)


def _make_in_processes(shards: Sequence[Shard], workers: int, load: Load, done: Done, tick: Tick
                       ) -> tuple[dict[str, Any], dict[Shard, str]]:
    """Make shards in processes; what the models are and {shard given up: problem}. A broken pool is started afresh."""
    waiting, tries, failed, described, deaths = list(shards), Counter[int](), {}, {}, 0

    def settle(shard: Shard, outcome: Cost | str, again: bool) -> None:
        tries[shard.index] += 1
        if not isinstance(outcome, str):
            done(outcome)
            tick(shard.n_rows)
        elif again and tries[shard.index] < TRIES:
            print(f"is tried again: {shard}: {outcome}", file=sys.stderr, flush=True)
            return
        else:
            print(f"given up: {shard}: {outcome}", file=sys.stderr, flush=True)
            failed[shard] = outcome
        waiting.remove(shard)

    while waiting:
        suspects = [shard for shard in waiting if tries[shard.index]]
        queue, running = suspects or list(waiting), dict[Future[Any], "Shard"]()
        with contextlib.suppress(BrokenProcessPool), _Pool(1 if suspects else workers, load) as pool:
            described, deaths = pool.ready(), 0
            while queue or running:
                while queue and len(running) < pool.width:
                    shard = queue.pop(0)
                    running[pool.submit(_work, shard)] = shard
                for future in wait(running, 2, FIRST_COMPLETED)[0]:
                    outcome = future.result()
                    settle(running.pop(future), *outcome)
                tick(0)
            continue
        deaths += not running
        if deaths >= TRIES:
            raise UserError(f"{deaths} workers died while they loaded the models (out of memory?): use fewer workers; "
                            "finished rows are kept")
        for shard in running.values():
            settle(shard, "its worker was killed (out of memory?)", True)
    return described, failed


# Ray


class _Actor:
    """A Ray actor: one set of models, which makes one shard after the other; after a restart it loads them anew."""

    def __init__(self, load: Load) -> None:
        self.load = cache(load)  # not called here: Ray tells the errors of __init__ as a death without a word

    def ready(self) -> dict[str, Any]:
        """Load the models; what they are."""
        return _described(self.load())

    def work(self, shard: Shard) -> tuple[int, Cost | str]:
        """Make and write a shard; its index and its cost or the problem."""
        for _ in range(TRIES):
            outcome, again = _work(shard, self.load())
            if not again:
                break
        return shard.index, outcome


def _make_on_ray(shards: Sequence[Shard], workers: int, load: Load, done: Done, tick: Tick
                 ) -> tuple[dict[str, Any], dict[Shard, str]]:
    """Make shards by actors, as :func:`_make_in_processes` does. Ray restarts actors and repeats their calls."""
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
    actors, left, failed = [maker.remote(load) for _ in range(workers)], {shard.index: shard for shard in shards}, {}
    try:
        described = ray.get(ray.wait([actor.ready.remote() for actor in actors])[0][0])
        pool = ActorPool(actors)
        for shard in shards:
            pool.submit(lambda actor, one: actor.work.remote(one), shard)
        while pool.has_next():
            with contextlib.suppress(ray.exceptions.RayActorError):  # the shard that it could not survive stays left
                index, outcome = pool.get_next_unordered()
                shard = left.pop(index)
                if isinstance(outcome, str):
                    failed[shard] = outcome
                else:
                    done(outcome)
                    tick(shard.n_rows)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, (UserError, OSError)) else error from None
    except ray.exceptions.RayActorError as error:
        raise UserError(f"Ray actors died while they loaded the models (out of memory?): use fewer workers ({error})"
                        ) from None
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()
    lost = f"its actor was lost {TRIES} times (killed, out of memory, or its machine is gone)"
    return described, failed | dict.fromkeys(left.values(), lost)


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
