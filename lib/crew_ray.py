"""Many graphics cards and machines: the same shards, played by the actors of a Ray cluster.

Ray is an optional package (``requirements-ray.lock``). The variable RAY_ADDRESS names the cluster
(``ray start --head`` prints its address); without it one is started on this machine for as long as
the run plays. Machines share nothing but the run's folder; the program and the data lie under the
same path on each. The actors divide processors and graphics cards between them, one set of models
each. An actor that dies, with its machine or alone, is replaced, and its shard is played again.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lib.errors import UserError
from lib.jobs import TRIES, Hooks, Job, Ledger, Load, Message, Report, answer, book, one_line
from lib.players import Models, describe_models, load_models
from lib.presets import REPO_ROOT, Preset

_PATIENCE = 60.0  # seconds without an actor before we say that we wait for the cluster
_CONNECT = 10.0  # seconds for a cluster's port to answer; Ray itself would try for minutes
_STORE = 100 << 20  # bytes of shared memory that a cluster of ours takes; jobs and reports are small


def check_installed() -> None:
    """Raise UserError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("engine 'ray' needs the package ray: .venv/bin/python -m pip install --no-deps "
                        "-r requirements-ray.lock, or use engine 'local'")


def play_on_ray(jobs: Sequence[Job], preset: Preset, workers: int, load: Load | None,
                hooks: Hooks) -> None:
    """Play all jobs with so many actors.

    load: makes an actor's models (a function that pickle can name); None loads the preset's.
    Raises UserError when all is done that can be done, if shards were given up; at once, if there
    is no cluster, files cannot be written or no actor comes to life.
    """
    import ray  # an optional package, slow to import

    ours, workers = not ray.is_initialized(), min(workers, len(jobs))
    if ours:
        _join(ray)
    ledger = Ledger.of(jobs)
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        crew = _Crew(ray, share(alive, workers), load or functools.partial(load_models, preset))
        try:
            crew.serve(workers, ledger, hooks)
        finally:
            crew.dismiss()
    finally:
        if ours:
            ray.shutdown()
    ledger.conclude()


# --- the cluster -------------------------------------------------------------------------------


def _join(ray: Any) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine."""
    settings: dict[str, Any] = {
        "logging_level": logging.ERROR, "log_to_driver": False,
        # Where actors find the program. A runtime environment would say it too, at the price of a
        # helper process that has to be up on each machine before the first actor.
        "job_config": ray.job_config.JobConfig(_py_driver_sys_path=[str(REPO_ROOT)])}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_address(address)
    else:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        settings |= {"address": "local", "include_dashboard": False, "object_store_memory": _STORE}
    try:
        ray.init(**settings)
    except Exception as error:  # of many kinds, plain Exception among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if address:
            raise UserError(f"the Ray cluster at RAY_ADDRESS = {address} cannot be used ({reason}): see "
                            "`ray status` there; one that was started with a token needs "
                            "RAY_AUTH_MODE=token here too") from error
        raise UserError(f"Ray does not start on this machine ({reason}): if it is very busy try "
                        "again later, or use engine 'local'") from error


def _check_address(address: str) -> None:
    """Raise UserError if nothing answers at the address, at once rather than after minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"RAY_ADDRESS = {address}: must be HOST:PORT as `ray start --head` prints it, "
                        "and the run started on a machine of that cluster")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT).close()
    except OSError as error:
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS = {address} ({error.strerror or error}): "
                        "start one with `ray start --head`, or unset RAY_ADDRESS to play here") from error


def share(nodes: Sequence[Mapping[str, float]], workers: int) -> dict[str, float]:
    """What one actor gets so that all fit: whole processors while there are enough, and a graphics
    card, or an equal part of one where there are more actors than cards.

    nodes: the resources of each machine, such as {"CPU": 8.0, "GPU": 2.0}.
    """
    cards = [int(node.get("GPU", 0)) for node in nodes]
    cores = [int(node.get("CPU", 0)) for node in nodes]
    crowd = math.ceil(workers / max(1, sum(cards)))  # actors on one card

    def seats(cpus: int) -> int:
        limits = [card * crowd if any(cards) else workers for card in cards]
        return sum(min(core // cpus, limit) for core, limit in zip(cores, limits, strict=True))

    fitting = [cpus for cpus in range(1, max(cores, default=0) + 1) if seats(cpus) >= workers]
    cpus = max(fitting) if fitting else _part(math.ceil(workers / max(1, sum(cores))))
    return {"num_cpus": cpus, "num_gpus": _part(crowd) if any(cards) else 0}


def _part(crowd: int) -> float:
    """1 / crowd, rounded down to the ten-thousandths in which Ray counts."""
    return math.floor(1e4 / crowd) / 1e4


# --- the actors --------------------------------------------------------------------------------


class Player:
    """An actor: one set of models, which plays one job after the other."""

    models: Models

    def start(self, load: Load) -> Message:
        """Load the models. Not in ``__init__``, whose errors Ray tells as a death without a word."""
        try:
            self.models = load()
        except UserError as error:
            return "stop", str(error)
        return "ready", describe_models(self.models)

    def play(self, job: Job) -> Message:
        """Play a job and put it on disk."""
        return answer(job, self.models)


class _Crew:
    """The actors: those that answer a call, and those that wait for one."""

    def __init__(self, ray: Any, part: Mapping[str, float], load: Load) -> None:
        self.ray, self.part, self.load = ray, part, load
        # Spread over the machines: Ray would fill one to the half before it takes the next.
        self.maker = ray.remote(Player).options(max_restarts=0, scheduling_strategy="SPREAD", **part)
        self.calls: dict[Any, tuple[Any, Job | None]] = {}
        self.idle: list[Any] = []
        self.stillborn = 0  # actors in a row that died while they loaded the models
        self.begun = False

    def hire(self) -> None:
        """Start an actor; it may wait for its place in the cluster."""
        actor = self.maker.remote()
        self.calls[actor.start.remote(self.load)] = actor, None

    def dismiss(self) -> None:
        """End all actors: a cluster that is not ours goes on without them."""
        for actor in [*self.idle, *(actor for actor, _ in self.calls.values())]:
            self.ray.kill(actor)

    def serve(self, workers: int, ledger: Ledger, hooks: Hooks) -> None:
        """Hand out jobs and book reports until no job waits and none is being played."""
        for _ in range(workers):
            self.hire()
        while ledger.waiting or any(job for _, job in self.calls.values()):
            while ledger.waiting and self.idle:
                actor, job = self.idle.pop(), ledger.waiting.popleft()
                self.calls[actor.play.remote(job)] = actor, job
            call = self._next_call()
            actor, job = self.calls.pop(call)
            try:
                message = self.ray.get(call)
            except self.ray.exceptions.RayError as error:
                self._bury(actor, job, error, ledger, hooks)
                self.hire()
                continue
            self.idle.append(actor)
            self.stillborn, self.begun = 0, True
            book(message, job, ledger, hooks)

    def _next_call(self) -> Any:
        """The first call that is answered. Says so, once, if the cluster has no place for us."""
        told = self.begun
        while True:
            answered, _ = self.ray.wait(list(self.calls), num_returns=1,
                                        timeout=None if told else _PATIENCE)
            if answered:
                return answered[0]
            needs = f"{self.part['num_cpus']} CPUs and {self.part['num_gpus']} GPUs"
            print(f"still waiting for a first Ray actor ({needs} each): its models load, or the cluster is "
                  "busy (see `ray status`)", file=sys.stderr, flush=True)
            told = True

    def _bury(self, actor: Any, job: Job | None, error: Exception, ledger: Ledger, hooks: Hooks) -> None:
        """Book the loss of an actor; UserError if actors die again and again before they can play."""
        self.ray.kill(actor)  # it may be out of reach only, and must not hold its share
        reason = _reason(self.ray, error)
        if job is not None:
            ledger.settle(job, Report(problem=reason), hooks)
            return
        self.stillborn += 1
        if self.stillborn >= TRIES:
            raise UserError(f"{self.stillborn} Ray actors in a row died while they loaded the models (the "
                            f"last: {reason}): use fewer workers; finished rows are kept")


def _reason(ray: Any, error: Exception) -> str:
    """Why a call was not answered, in one line."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return one_line(error.cause)
    return f"its actor was lost ({type(error).__name__}: killed, out of memory, or its machine is gone)"
