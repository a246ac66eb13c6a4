"""Several workers on one machine: processes with models of their own, fed with shards.

The workers are started afresh (spawn), since CUDA and thread pools do not survive a fork. They
divide the processors' cores, and the graphics cards where there are several. A worker that is
killed is replaced, and its shard is played again.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from lib.errors import UserError
from lib.jobs import TRIES, Hooks, Job, Ledger, Load, Report, answer, book
from lib.players import Models, describe_models, load_models
from lib.presets import Preset

_CONTEXT = multiprocessing.get_context("spawn")
PATIENCE = 10.0  # seconds that a dismissed worker has to end


def play_in_processes(jobs: Sequence[Job], preset: Preset, workers: int, load: Load | None,
                      hooks: Hooks) -> None:
    """Play all jobs with so many workers.

    load: makes a worker's models (a function that pickle can name); None loads the preset's.
    Raises UserError when all is done that can be done, if shards were given up; at once, if files
    cannot be written or no worker comes to life.
    """
    ledger = Ledger.of(jobs)
    crew = [_hire(number, workers, preset, load) for number in range(min(workers, len(jobs)))]
    try:
        _serve(crew, ledger, hooks, functools.partial(_hire, workers=workers, preset=preset, load=load))
    finally:
        for worker in crew:
            _dismiss(worker)
        for worker in crew:
            worker.process.join(PATIENCE)
            worker.process.kill()  # of no effect on one that has ended
            worker.process.join()
    ledger.conclude()


# --- in the process that hands out jobs ---------------------------------------------------------


@dataclass
class _Worker:
    """A process, our end of its pipe, whether its models are loaded, and the job it has."""

    number: int
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    job: Job | None = None

    def give(self, job: Job) -> None:
        """Hand over a job. If the process has just died, its pipe will tell."""
        self.job = job
        with contextlib.suppress(ConnectionError):
            self.pipe.send(job)


def _hire(number: int, workers: int, preset: Preset, load: Load | None) -> _Worker:
    """Start a worker process."""
    ours, theirs = _CONTEXT.Pipe()
    arguments = (number, workers, theirs, load or functools.partial(_load_share, preset, number))
    process = _CONTEXT.Process(target=_main, args=arguments, name=f"worker {number}", daemon=True)
    process.start()
    theirs.close()  # so that the pipe ends with the process
    return _Worker(number, process, ours)


def _dismiss(worker: _Worker) -> None:
    """End a worker: an idle one goes by itself once its pipe ends, and leaves nothing behind.

    Another is in the middle of something that nobody waits for: files are whole or absent.
    """
    idle = worker.ready and worker.job is None
    worker.pipe.close()
    if not idle:
        worker.process.terminate()


def _serve(crew: list[_Worker], ledger: Ledger, hooks: Hooks, hire: functools.partial) -> None:
    """Hand out jobs and book reports until no job waits and none is being played."""
    stillborn = 0
    while ledger.waiting or any(worker.job for worker in crew):
        for worker in crew:
            if worker.ready and worker.job is None and ledger.waiting:
                worker.give(ledger.waiting.popleft())
        for pipe in wait([worker.pipe for worker in crew]):
            place = next(i for i, worker in enumerate(crew) if worker.pipe is pipe)
            worker = crew[place]
            try:
                message = pipe.recv()
            except (EOFError, ConnectionError):
                stillborn += not worker.ready
                _bury(worker, ledger, hooks, stillborn)
                crew[place] = hire(worker.number)
                continue
            job, worker.job, worker.ready, stillborn = worker.job, None, True, 0
            book(message, job, ledger, hooks)


def _bury(worker: _Worker, ledger: Ledger, hooks: Hooks, stillborn: int) -> None:
    """Book the death of a worker; UserError if workers die again and again before they can play."""
    worker.pipe.close()
    worker.process.join()
    code = worker.process.exitcode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    if worker.job is not None:
        ledger.settle(worker.job, Report(problem=f"its worker {how} (out of memory?)"), hooks)
    elif stillborn >= TRIES:
        raise UserError(f"{stillborn} workers died while they loaded the models (the last {how}, out "
                        "of memory?): use fewer workers; finished rows are kept")


# --- in the worker -----------------------------------------------------------------------------


def _main(number: int, workers: int, pipe: Connection, load: Load) -> None:
    """A worker's life: load the models, then play one job after the other until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first process, which ends us
    # Read when torch is imported, thus in load(). What the user has set stays.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // workers)))
    try:
        models = load()
    except UserError as error:
        pipe.send(("stop", str(error)))
        return
    with contextlib.suppress(EOFError, ConnectionError):  # the first process is gone: so are we
        pipe.send(("ready", describe_models(models)))
        while True:
            pipe.send(answer(pipe.recv(), models))


def _load_share(preset: Preset, number: int) -> Models:
    """Load a preset's models, each worker on the next graphics card."""
    import torch  # slow to import, and only needed where models are loaded

    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    return load_models(preset)


def _cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
