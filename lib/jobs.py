"""Shards as jobs: what is sent to a worker, what comes back, and what is tried again.

A job is small (names, numbers and paths; no pictures, no models), so that it can go to another
process or another machine. The worker writes the shard's files itself: only the folder is shared.
"""

from __future__ import annotations

import copyreg
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lib import results
from lib.errors import UserError
from lib.game import TASKS, Played, Shard, play_shard
from lib.images import png_bytes
from lib.players import Cost, Models
from lib.stores import Place

TRIES = 3  # a shard whose worker dies, or that fails, as often is given up
_NAMED = 10  # sources named in a message at most

Load = Callable[[], Models]  # what a worker calls once, to have models of its own
# What a worker says: ("ready", what its models are), ("report", Report), ("stop", why it cannot go on)
Message = tuple[str, Any]


def _read_only(content: dict[Any, Any]) -> MappingProxyType:
    return MappingProxyType(content)


# A preset holds read-only views of mappings, which Python cannot send to another process by itself.
copyreg.pickle(MappingProxyType, lambda view: (_read_only, (dict(view),)))


@dataclass(frozen=True)
class Job:
    """One shard to be played, and where its files go. owner: the hash of the run."""

    index: int
    shard: Shard
    task: str
    folder: Place
    owner: str

    @property
    def rows_path(self) -> Place:
        """Where the rows lie; the shard is done when this file is there."""
        return self.folder / "shards" / f"{self.index:05d}.parquet"

    @property
    def baselines_path(self) -> Place:
        """Where the baselines of the shard's sources lie."""
        return self.folder / "baselines" / f"{self.index:05d}.parquet"

    def play(self, models: Models) -> Played:
        """Play the shard; writes nothing."""
        return play_shard(self.shard, TASKS[self.task], models)

    def publish(self, played: Played) -> None:
        """Put the shard on disk: pictures, then baselines, then the rows that make it done."""
        pictures = {self.folder / name: png_bytes(p) for name, p in played.pictures.items()}
        results.write_many(pictures, self.folder / ".scratch")
        if played.baselines is not None:
            results.write_table(self.baselines_path, played.baselines, self.owner)
        results.write_table(self.rows_path, played.rows, self.owner)

    def is_done(self) -> bool:
        """Whether the files are there and whole. A damaged one is reported and counts as not done.

        Raises UserError if a file has another schema or belongs to another run.
        """
        files = [(self.rows_path, results.PLAYED, self.shard.n_candidates)]
        if self.task == "image":
            files.append((self.baselines_path, results.PLAYED_BASELINES, 1))
        return all(self._holds(*file) for file in files)

    def _holds(self, path: Place, schema: Any, each: int) -> bool:
        """Whether a table is whole and has ``each`` rows for each of the shard's sources."""
        if not path.is_file():
            return False
        try:
            table = results.read_table(path, schema, self.owner)
        except results.DamagedTable as error:
            print(f"damaged, is played again: {error}", file=sys.stderr, flush=True)
            return False
        if table["item"].to_pylist() != [item.id for item in self.shard.items for _ in range(each)]:
            print(f"not the expected sources, is played again: {path}", file=sys.stderr, flush=True)
            return False
        return True

    def __str__(self) -> str:
        ids = [item.id for item in self.shard.items]
        more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
        return f"shard {self.index} (items {', '.join(ids[:_NAMED])}{more})"


# --- in the worker -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What became of a job: its cost, or the problem, where in the code it came up, and whether
    another try may help."""

    cost: Cost | None = None
    problem: str = ""
    trace: str = ""
    hopeless: bool = False


def work(job: Job, models: Models) -> Report:
    """Play a job and put it on disk.

    What goes wrong in playing is reported, for it need not befall the other shards. What goes
    wrong in writing (UserError for a full disk, say) is raised, for it would.
    """
    try:
        played = job.play(models)
    except UserError as error:  # bad input stays bad
        return Report(problem=str(error), hopeless=True)
    except Exception as error:
        # Any library may raise anything; the next try may well succeed.
        return Report(problem=one_line(error), trace=traceback.format_exc())
    job.publish(played)
    return Report(cost=played.cost)


def one_line(error: BaseException) -> str:
    """An error as a part of a message: its kind and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def answer(job: Job, models: Models) -> Message:
    """Play a job and put it on disk; what there is to say about it."""
    try:
        return "report", work(job, models)
    except UserError as error:
        return "stop", str(error)


# --- in the process that hands out jobs ---------------------------------------------------------


@dataclass(frozen=True)
class Hooks:
    """Whom to tell: ``loaded`` what a worker's models are, ``done`` that a job is finished."""

    loaded: Callable[[Mapping[str, Any]], None]
    done: Callable[[Job, Cost], None]


@dataclass
class Ledger:
    """Which jobs wait, how often each was tried in vain, which are given up and why."""

    waiting: deque[Job]
    total: int
    failures: Counter[int] = field(default_factory=Counter)
    given_up: list[tuple[Job, str]] = field(default_factory=list)

    @classmethod
    def of(cls, jobs: Iterable[Job]) -> Ledger:
        """A ledger of jobs that nobody has tried."""
        waiting = deque(jobs)
        return cls(waiting, len(waiting))

    def settle(self, job: Job, report: Report, hooks: Hooks) -> None:
        """Book a report: done, to be tried again, or given up."""
        if report.cost is not None:
            hooks.done(job, report.cost)
            return
        print(report.trace, end="", file=sys.stderr)  # here, for a worker's own output may be far away
        self.failures[job.index] += 1
        if report.hopeless or self.failures[job.index] >= TRIES:
            self.given_up.append((job, report.problem))
            print(f"given up: {job}: {report.problem}", file=sys.stderr, flush=True)
        else:
            print(f"is tried again: {job}: {report.problem}", file=sys.stderr, flush=True)
            self.waiting.append(job)

    def conclude(self) -> None:
        """Raise UserError if jobs were given up."""
        if self.given_up:
            job, problem = min(self.given_up, key=lambda pair: pair[0].index)
            raise UserError(f"{len(self.given_up)} of {self.total} shards could not be played, all "
                            f"others are kept. First {job}: {problem}. Mend or take out these "
                            "sources and run again")


def book(message: Message, job: Job | None, ledger: Ledger, hooks: Hooks) -> None:
    """Take what a worker says, ``job`` being the one it had. UserError if it cannot go on."""
    kind, content = message
    if kind == "stop":
        raise UserError(content)
    if kind == "ready":
        hooks.loaded(content)
    elif job is not None:
        ledger.settle(job, content, hooks)
