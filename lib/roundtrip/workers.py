"""Who makes the shards of a run: this process, several processes of this machine, or a Ray cluster (see README.md).

Workers share nothing but the run's folder; each loads the models once and writes its shards itself; a killed one is
replaced. What failed is tried again alone when all else is done. Bad input and a full disk stop the run at once.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from functools import partial
from typing import TYPE_CHECKING, Any

from lib.base import ROOT, UserError
from lib.models import Models, describe, load_models
from lib.presets import Preset
from lib.roundtrip.steps import Cost, Tick

if TYPE_CHECKING:
    from lib.roundtrip.run import Shard

TRIES = 3
START = "spawn"  # workers begin afresh: CUDA and thread pools do not survive a fork
Load = Callable[[], Models]
Done = Callable[[Cost], None]
Answer = tuple[Cost | str | Exception, dict[str, Any]]  # see _work
Worker = Callable[["Shard"], Future[Answer]]
Start = Callable[[], Worker]


def make_shards(shards: Sequence[Shard], workers: int, engine: str, models: Models | Load | None, preset: Preset,
                done: Done, tick: Tick) -> dict[str, Any]:
    """Make the shards; what the models are (id, revision, device, number type). done is called with the cost of each
    shard when its files are written, tick with the rows that came along."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise UserError(f"WORKERS = {workers!r}: must be a whole number of at least 1")
    if engine not in ("local", "ray"):
        raise UserError(f"ENGINE = {engine!r}: choose local or ray")
    load = models if callable(models) else partial(_load, preset) if models is None else lambda: models
    if engine == "local" and workers == 1:
        return _make_here(shards, load, done, tick, preset.shards_at_once)
    workers = min(workers, len(shards))
    with (_processes if engine == "local" else _ray_tasks)(workers, load) as start:
        return _make_by_workers(shards, workers, start, done, tick)


def _load(preset: Preset) -> Models:
    """A preset's models; of several workers each takes the next graphics card."""
    import torch  # slow to import, and only needed where models are loaded

    number = multiprocessing.current_process().name.rpartition("-")[2]
    if torch.cuda.is_available() and number.isdecimal():
        torch.cuda.set_device(int(number) % torch.cuda.device_count())
    return load_models(preset)


def _described(models: Models) -> dict[str, Any]:
    """What was loaded, by part; without details for models that keep no settings."""
    return {part: describe(model) for part, model in vars(models).items() if model is not None}


def _make_here(shards: Sequence[Shard], load: Load, done: Done, tick: Tick, at_once: int) -> dict[str, Any]:
    """Make shards, ``at_once`` side by side in threads that share the models and divide the cores."""
    import torch  # slow to import, and only needed where models are loaded

    begun = time.perf_counter()
    models = load()
    loading, cores = {"seconds: load": time.perf_counter() - begun}, torch.get_num_threads()
    if any(not type(model).__module__.startswith("lib.") for model in vars(models).values() if model is not None):
        at_once = 1  # whether a model of your own bears two threads is not known
    at_once = min(at_once, len(shards), cores)
    turn, ticking, stopped = threading.Semaphore(at_once), threading.Lock(), threading.Event()

    def tell(rows: int) -> None:
        with ticking:
            if stopped.is_set():
                raise InterruptedError("another shard failed, or Ctrl-C")
            tick(rows)

    def make(shard: Shard) -> Cost:
        with turn:
            batch = shard.make(models, tell)
        return shard.publish(batch)  # while this thread's place is taken by the next shard

    share = max(1, cores // at_once)
    with ThreadPoolExecutor(at_once + 1, initializer=torch.set_num_threads, initargs=(share,)) as pool:
        try:
            for made in as_completed([pool.submit(make, shard) for shard in shards]):
                cost = made.result()  # a full disk stops us here
                cost.update(loading)
                done(cost)
                loading.clear()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)
    return _described(models)


def _make_by_workers(shards: Sequence[Shard], workers: int, start: Start, done: Done, tick: Tick) -> dict[str, Any]:
    """Make shards by workers that ``start`` starts, and again, one by one, what failed."""
    waiting, idle, running = list(shards), [start() for _ in range(workers)], {}
    tries, failed, loaded = Counter(), {}, {}
    while waiting or running:
        while waiting and idle and not (running and tries[waiting[0]]):
            worker, shard = idle.pop(), waiting.pop(0)
            running[worker(shard)] = worker, shard
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            worker, shard = running.pop(future)
            try:
                outcome, facts = future.result()
            except Exception as error:  # each engine has its own for a process that is gone
                worker, outcome, facts = start(), f"its worker was killed ({_one_line(error)})", {}
            idle.append(worker)
            loaded = facts or loaded
            if isinstance(outcome, Exception):
                raise outcome
            if isinstance(outcome, Cost):
                failed.pop(shard, None)
                done(outcome)
                tick(len(shard.run.dataset) * shard.run.n_candidates)
                continue
            failed[shard], tries[shard] = outcome, tries[shard] + 1
            waiting += [shard] if tries[shard] < TRIES else []
            print(f"try {tries[shard]} of {TRIES} failed: {shard}: {outcome}", file=sys.stderr, flush=True)
            if not loaded and len(failed) > workers:
                raise UserError(f"no worker could make anything ({outcome}): out of memory? Use fewer workers")
    if failed:
        shard = min(failed, key=lambda one: one.index)
        raise UserError(f"{len(failed)} of {len(shards)} shards could not be made, all others are kept. First {shard}: "
                        f"{failed[shard]}")
    return loaded


_models: dict[str, Models] = {}  # of this worker's process, by what loads them


def _work(load: Load, shard: Shard) -> Answer:
    """Make and write a shard: its cost, why it failed or what must stop the run; and what the models are."""
    try:
        if repr(load) not in _models:
            _models[repr(load)] = load()
        models = _models[repr(load)]
        return shard.publish(shard.make(models)), _described(models)
    except (UserError, OSError) as error:
        return error, {}
    except Exception as error:  # any library may raise anything
        return _one_line(error), {}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def _processes(workers: int, load: Load) -> Iterator[Start]:
    """A function that starts a process of this machine; all end with this one, however it ends."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = (1, multiprocessing.get_context(START), _begin, (max(1, cores // workers),))
    others = set(multiprocessing.active_children())
    try:
        yield lambda: partial(ProcessPoolExecutor(*settings).submit, _work, load)
    finally:  # after an interrupt nobody waits for what they do: files are whole or absent
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()


def _begin(threads: int) -> None:
    """Begin the life of a worker process."""
    import torch  # slow to import, and only needed where models are loaded

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(min(threads, torch.get_num_threads()))


@contextlib.contextmanager
def _ray_tasks(workers: int, load: Load) -> Iterator[Start]:
    """A function that gives a worker of a Ray cluster, which is joined or started; all share what it has now."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("ENGINE = 'ray' needs the package ray: .venv/bin/python -m pip install --no-deps -r "
                        "requirements-ray.lock, or use local")
    import ray

    ours = not ray.is_initialized()
    if ours:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        settings = {} if os.environ.get("RAY_ADDRESS") else {
            "address": "local", "include_dashboard": False, "object_store_memory": 100 << 20}
        program = ray.job_config.JobConfig(_py_driver_sys_path=[str(ROOT)])  # where processes find it
        ray.init(log_to_driver=False, job_config=program, **settings)
    cores, cards = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    work = ray.remote(_work).options(max_retries=0, scheduling_strategy="SPREAD", num_cpus=max(1, cores // workers),
                                     num_gpus=1 / math.ceil(workers / cards) if cards else 0)
    try:
        yield lambda: lambda shard: work.remote(load, shard).future()
    finally:
        if ours:
            ray.shutdown()
