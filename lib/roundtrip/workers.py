"""Who makes the shards of a run: this process, several processes of this machine, or a Ray cluster.

Workers share nothing but the run's folder; each loads the models once and writes its shards itself.

- ``engine="local"``: processes, which divide the processor's cores and take the graphics cards in turn.
- ``engine="ray"``: the cluster that RAY_ADDRESS names (``ray start --head`` prints it), or one that is started here.
  Program, data and run folder lie under the same path on each machine. Needs ``pip install --no-deps -r
  requirements-ray.lock``.

A worker that is killed is replaced. Its shard is tried again alone, so that no other is blamed; after three tries it is
given up and named when all others are done. What goes wrong in writing (a full disk) stops the run at once.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
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
    pools = contextlib.nullcontext(_Processes) if engine == "local" else _ray_cluster(workers)
    with pools as pool:
        return _make_in_pool(shards, min(workers, len(shards)), pool, load, done, tick)


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


def _make_in_pool(shards: Sequence[Shard], workers: int, pool: Callable[[int], Any], load: Load, done: Done, tick: Tick
                  ) -> dict[str, Any]:
    """Make shards in the pools of workers that ``pool(width)`` starts."""
    waiting, tries, failed, answers = list(shards), Counter[int](), {}, []

    def settle(shard: Shard, outcome: Cost | str | Exception, again: bool) -> None:
        tries[shard.index] += 1
        if isinstance(outcome, Exception):
            raise outcome
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
        suspects = sorted((shard for shard in waiting if tries[shard.index]), key=lambda shard: tries[shard.index])
        queue, running, width = suspects or list(waiting), dict[Future[Any], "Shard"](), 1 if suspects else workers
        with contextlib.suppress(BrokenProcessPool), pool(width) as crew:
            while queue or running:
                while queue and len(running) < width:
                    shard = queue.pop(0)
                    running[crew.submit(_work, load, shard)] = shard
                for future in wait(running, 2, FIRST_COMPLETED)[0]:
                    try:
                        answers.append(future.result())
                    except BrokenProcessPool:  # of which worker is not told
                        raise
                    except Exception as error:  # of this worker: Ray tells
                        settle(running.pop(future), f"its worker was killed ({_one_line(error)})", True)
                    else:
                        settle(running.pop(future), *answers[-1][:2])
                tick(0)
        for shard in running.values():
            settle(shard, "its worker was killed (out of memory?)", True)
        if failed and not answers:
            raise UserError("every worker was killed before it made anything (out of memory?): use fewer workers")
    if failed:
        shard = min(failed, key=lambda one: one.index)
        raise UserError(f"{len(failed)} of {len(shards)} shards could not be made, all others are kept. First {shard}: "
                        f"{failed[shard]}. Mend or take out these sources and run again")
    return answers[-1][2]


# in a worker

_models: dict[str, Models] = {}  # of this process, by what loads them


def _work(load: Load, shard: Shard) -> tuple[Cost | str | Exception, bool, dict[str, Any]]:
    """Make and write a shard: its cost; or what went wrong with it, and whether another try may help; or what would
    befall the others, too. And what the models are."""
    try:
        if repr(load) not in _models:
            _models[repr(load)] = load()
        models = _models[repr(load)]
    except Exception as error:
        return error if isinstance(error, UserError) else UserError(_one_line(error)), False, {}
    try:
        batch = shard.make(models)
    except Exception as error:  # any library may raise anything
        return _one_line(error), not isinstance(error, UserError), _described(models)  # bad input stays bad
    try:
        return shard.publish(batch), False, _described(models)
    except OSError as error:
        return error, False, _described(models)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text[:200]}"


# pools of workers


class _Processes(ProcessPoolExecutor):
    """Processes of this machine, which end with this one, however that ends."""

    def __init__(self, width: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.others = set(multiprocessing.active_children())
        super().__init__(width, multiprocessing.get_context(START), _begin, (max(1, cores // width),))

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind:  # interrupted, or the disk is full: nobody waits for what they do, and files are whole or absent
            for worker in set(multiprocessing.active_children()) - self.others:
                worker.terminate()
        super().__exit__(kind, *rest)


def _begin(threads: int) -> None:
    """Begin the life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read when torch is imported, thus in load()


@contextlib.contextmanager
def _ray_cluster(workers: int) -> Iterator[Callable[[int], Any]]:
    """Join or start a cluster; a function that makes pools of its processes."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("ENGINE = 'ray' needs the package ray: .venv/bin/python -m pip install --no-deps -r "
                        "requirements-ray.lock, or use local")
    import ray

    ours, settings = not ray.is_initialized(), {"log_to_driver": False, "job_config": ray.job_config.JobConfig(
        _py_driver_sys_path=[str(ROOT)])}  # where its processes find the program
    if not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        settings |= {"address": "local", "include_dashboard": False, "object_store_memory": 100 << 20}
    if ours:
        ray.init(**settings)
    work = ray.remote(_work).options(max_retries=0, scheduling_strategy="SPREAD", **share(ray.nodes(), workers))

    class Pool(contextlib.ExitStack):
        def submit(self, _: Any, *arguments: Any) -> Future[Any]:
            return work.remote(*arguments).future()

    try:
        yield lambda width: Pool()
    finally:
        if ours:
            ray.shutdown()


def share(nodes: Sequence[Mapping[str, Any]], workers: int) -> dict[str, float]:
    """What one Ray worker gets so that all fit: whole processors while there are enough, an equal part of a card."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cores, cards = [int(node.get("CPU", 0)) for node in alive], sum(int(node.get("GPU", 0)) for node in alive)
    whole = [n for n in range(1, max(cores) + 1) if sum(core // n for core in cores) >= workers]
    return {"num_cpus": max(whole, default=1 / math.ceil(workers / max(1, sum(cores)))),
            "num_gpus": 1 / math.ceil(workers / cards) if cards else 0}
