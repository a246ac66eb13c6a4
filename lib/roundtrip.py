"""Playing the game over a dataset: shard by shard, resumable, then ranked and scored.

::

    run = play(get_preset("mini"), "picturebook-coco", "image", n_sources=120, n_candidates=10, seed=0)
    rows = run.rows()

A run that was cut off anywhere continues where it stopped, and ends with the same tables byte for
byte: a shard is a pure function of its items (``game.play_shard``), a file appears only when it is
whole, and a shard counts as done only when its file is there. One process may play, several
workers on this machine (``crew``), or the actors of a Ray cluster (``crew_ray``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from lib import provenance, results, scorecard, stores
from lib.cost import Cost
from lib.cost import line as cost_line
from lib.datasets import Dataset, Item, load_dataset
from lib.errors import UserError
from lib.game import TASKS, Played, Shard
from lib.jobs import Hooks, Job, Load
from lib.leases import run_lock
from lib.metrics import Corpus
from lib.players import Models, describe_models, load_models
from lib.presets import REPO_ROOT, Preset, preset_to_dict
from lib.results import Run, RunKey
from lib.stores import Place

SHARD_SIZE = 32
ENGINES = ("local", "ray")
# Scored together: enough to share the start of Java processes, few enough to keep memory flat.
SHARDS_SCORED_TOGETHER = 8
CACHE = REPO_ROOT / "data" / "cache"
_LISTED = 1000  # ids listed in run.json at most; the count is always whole


@dataclass(frozen=True)
class Plan:
    """A run to be played: its key, its folder, its sources in their order."""

    key: RunKey
    run: Run
    dataset: Dataset
    shard_size: int
    left_out: tuple[str, ...] = ()

    @cached_property
    def jobs(self) -> list[Job]:
        """The run's sources in batches, each with the place of its files."""
        items, key = self.dataset.items, self.key
        starts = range(0, len(items), self.shard_size)
        shards = [Shard(key.name, key.dataset, key.preset, items[start : start + self.shard_size],
                        key.n_candidates, key.seed) for start in starts]
        return [Job(i, shard, key.task, self.run.path, key.hash) for i, shard in enumerate(shards)]


# --- planning ----------------------------------------------------------------------------------


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} = {value!r}: must be a whole number of at least 1")


def plan_run(
    preset: Preset, dataset: str | Dataset, task: str, n_sources: int, n_candidates: int, seed: int,
    root: str | Place | None = None, shard_size: int = SHARD_SIZE,
) -> Plan:
    """Work out what a run consists of, without playing it.

    dataset: a name, or a loaded dataset that is played as it is. Where the dataset has fewer than
    n_sources sources, all are played. Raises UserError for a bad count, an unknown task or
    dataset, or a task that the dataset cannot feed.
    """
    _check_counts(n_sources=n_sources, n_candidates=n_candidates, shard_size=shard_size)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"seed = {seed!r}: must be a whole number")
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    whole = load_dataset(dataset) if isinstance(dataset, str) else dataset
    fitting, left_out = _fit(whole, task)
    chosen = fitting.subset(n_sources, seed)
    key = RunKey(preset, chosen.name, task, len(chosen), n_candidates, seed, chosen.fingerprint,
                 provenance.model_fingerprints(preset))
    run = Run(stores.at(root or results.runs_root()) / key.name)
    # A run keeps the shards that it was begun with, whatever the size asked for now.
    begun = results.read_json(run.path / "run.json") or {}
    kept = begun.get("shard_size") if begun.get("hash") == key.hash else None
    return Plan(key, run, chosen, kept or shard_size, left_out)


def _fit(dataset: Dataset, task: str) -> tuple[Dataset, tuple[str, ...]]:
    """The items that a task can start from, and the ids of those it cannot."""
    if task == "image":
        fitting = tuple(item for item in dataset.items if item.path is not None)
        needs = "pictures"
    else:
        fitting = tuple(item for item in dataset.items if item.references)
        needs = "captions"
    if not fitting:
        raise UserError(f"dataset {dataset.name} has no {needs}: the {task} task starts from them")
    kept = {item.id for item in fitting}
    left_out = tuple(item.id for item in dataset.items if item.id not in kept)
    return dataclasses.replace(dataset, items=fitting), left_out


# --- playing -----------------------------------------------------------------------------------


def play(
    preset: Preset, dataset: str | Dataset, task: str, n_sources: int, n_candidates: int,
    seed: int, engine: str = "local", workers: int = 1, progress: bool = True,
    models: Models | Load | None = None, root: str | Place | None = None, shard_size: int = SHARD_SIZE,
) -> Run:
    """Play a run to its end, or return at once if it is finished.

    engine, workers: "local" is processes of this machine, each with models of its own; one worker
    is this process itself. "ray" is actors of the Ray cluster that RAY_ADDRESS names, or of one
    that is started here.
    models: loaded ones, or a function that loads them (what several workers need); the preset's are
    loaded when None and something is to be played.
    Raises UserError for bad input; whatever was finished before stays.
    """
    crew = _crew(engine, workers, models)
    plan = plan_run(preset, dataset, task, n_sources, n_candidates, seed, root, shard_size)
    if _scored(plan):
        return plan.run  # before any lock: its folder may be read-only
    with run_lock(plan.run.path):
        if not _scored(plan):
            begin(plan)
            waiting = pending(plan)
            if waiting and crew is None:
                load = models or partial(load_models, preset)
                with booking(plan, "load"):
                    players = load if isinstance(load, Models) else load()
                _record_models(plan, describe_models(players))
                play_pending(plan, waiting, players, progress)
            elif waiting:
                play_with_crew(plan, waiting, partial(crew, workers=workers, load=models), progress)
            if progress:
                print(f"scoring {plan.key.name}", file=sys.stderr, flush=True)
            finish(plan)
            if progress:
                _tell(plan)
    return plan.run


def _tell(plan: Plan) -> None:
    """Say what was flagged, and what the run cost."""
    counts = plan.run.info()["counts"]
    if counts["flagged"]:
        print(f"flagged by the safety checker: {counts['flagged']} of {counts['rows']} rows; the "
              f"{counts['flagged_sources']} of {len(plan.dataset)} sources that have such a row are "
              "left out of every comparison", file=sys.stderr, flush=True)
    print(cost_line(plan.key.name, Cost.from_dict(plan.run.cost())), file=sys.stderr, flush=True)


def _crew(engine: str, workers: int, models: Models | Load | None) -> Callable[..., None] | None:
    """Who plays the jobs: None for this process itself. UserError for an engine that is not there."""
    _check_counts(workers=workers)
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}: choose one of {', '.join(ENGINES)}")
    if engine == "local" and workers == 1:
        return None
    if isinstance(models, Models):
        raise UserError(f"engine {engine!r} with {workers} workers: each loads its own models, hand "
                        "over a function that does, not loaded ones")
    if engine == "ray":
        from lib import crew_ray

        crew_ray.check_installed()
        return crew_ray.play_on_ray
    from lib.crew import play_in_processes

    return play_in_processes


def begin(plan: Plan) -> None:
    """Write ``run.json`` before the first shard; a begun run's first record stays."""
    results.remove_leftovers(plan.run.path)
    path = plan.run.path / "run.json"
    known = results.read_json(path)
    if known is None or known.get("hash") != plan.key.hash:
        results.write_json(path, describe_run(plan))


def _record_models(plan: Plan, loaded: Mapping[str, Any]) -> None:
    """Add to ``run.json`` what was really loaded: revision, device, number type."""
    record = plan.run.info()
    if loaded and record.get("loaded") != loaded:
        record["loaded"] = loaded
        results.write_json(plan.run.path / "run.json", record)


def describe_run(plan: Plan) -> dict[str, Any]:
    """Everything that is needed to repeat a run. No keys: nothing of the environment is in it."""
    key, data = plan.key, plan.dataset
    return {
        "run": key.name, "hash": key.hash, "schema": results.SCHEMA, "task": key.task,
        "dataset": {
            "name": data.name, "fingerprint": key.data, "sources": len(data),
            "split_size": len(data.references), "missing": len(data.missing),
            "missing_files": list(data.missing[:_LISTED]),
            "without_references": len(data.unreferenced),
            "without_references_ids": list(data.unreferenced[:_LISTED]),
            "left_out": len(plan.left_out), "left_out_ids": list(plan.left_out[:_LISTED]),
        },
        "n_sources": key.n_sources, "n_candidates": key.n_candidates, "seed": key.seed,
        "shard_size": plan.shard_size, "preset": preset_to_dict(key.preset),
        "models": dict(key.models), "made_by": provenance.collect(),
    }


def pending(plan: Plan) -> list[Job]:
    """The shards that are not done. A damaged one is reported and counts as not done.

    Raises UserError if a shard has another schema or belongs to another run.
    """
    with ThreadPoolExecutor(max_workers=stores.lanes(plan.run.path)) as pool:
        done = pool.map(Job.is_done, plan.jobs)
        return [job for job, is_done in zip(plan.jobs, done, strict=True) if not is_done]


def play_pending(plan: Plan, waiting: Sequence[Job], models: Models, progress: bool) -> None:
    """Play the pending shards one after the other, while a thread writes the last one's files."""
    cost = Cost.from_dict(plan.run.cost())  # what earlier sittings have spent
    begun = time.perf_counter() - cost.wall
    with progress_bar(plan, waiting, progress) as bar, ThreadPoolExecutor(max_workers=1) as writer:
        last: Future[None] | None = None
        for job in waiting:
            played = job.play(models)
            if last is not None:
                last.result()  # at most one shard waits in memory; a full disk stops us here
            cost.add(played.cost)
            cost.wall = time.perf_counter() - begun
            last = writer.submit(_publish, plan, job, played, cost.as_dict())
            bar.update(len(job.shard.items))
        if last is not None:
            last.result()


@contextlib.contextmanager
def booking(plan: Plan, stage: str) -> Iterator[None]:
    """Add the time of a block outside the game to ``cost.json``."""
    spent = Cost()
    with spent.stage(stage):
        yield
    spent.add(Cost.from_dict(plan.run.cost()))
    results.write_json(plan.run.path / "cost.json", spent.as_dict())


def _publish(plan: Plan, job: Job, played: Played, cost: Mapping[str, Any]) -> None:
    job.publish(played)
    results.write_json(plan.run.path / "cost.json", cost)


def play_with_crew(plan: Plan, waiting: Sequence[Job], crew: Callable[..., None], progress: bool) -> None:
    """Let several workers play the pending shards; costs are summed here, in one bar."""
    cost = Cost.from_dict(plan.run.cost())
    begun = time.perf_counter() - cost.wall
    with progress_bar(plan, waiting, progress) as bar:

        def done(job: Job, spent: Cost) -> None:
            cost.add(spent)
            cost.wall = time.perf_counter() - begun  # the loading of several workers included
            results.write_json(plan.run.path / "cost.json", cost.as_dict())
            bar.update(len(job.shard.items))

        crew(waiting, plan.key.preset, hooks=Hooks(partial(_record_models, plan), done))


def progress_bar(plan: Plan, waiting: Sequence[Job], shown: bool) -> tqdm:
    """A bar on a terminal; elsewhere (a log, a notebook run by papermill) a plain line now and then."""
    terminal, total = sys.stderr.isatty(), len(plan.dataset)
    done = total - sum(len(job.shard.items) for job in waiting)
    return tqdm(total=total, initial=done, desc=plan.key.name, unit="source", disable=not shown,
                ascii=not terminal, mininterval=0.5 if terminal else 30.0, maxinterval=60.0)


# --- ranking and scoring -----------------------------------------------------------------------


def _scored(plan: Plan) -> bool:
    """Whether the tables are there, of this run, scored as this version scores, and counted in run.json."""
    marks = results.marks(plan.run.path / "rows.parquet")
    return (plan.run.finished and marks.get("run") == plan.key.hash
            and marks.get("scores") == scorecard.version()
            and (plan.run.path / "baselines.parquet").is_file()
            and "counts" in (results.read_json(plan.run.path / "run.json") or {}))


def finish(plan: Plan) -> None:
    """Rank and score all shards into ``rows.parquet`` and ``baselines.parquet``.

    Can be repeated at any time without playing again. Tables and cost first, then the counts in
    ``run.json``: a run without them is scored again, one with them is never written to again.
    """
    with booking(plan, "score"):
        facts = _score(plan)
    results.write_json(plan.run.path / "run.json", plan.run.info() | facts)


def _score(plan: Plan) -> dict[str, Any]:
    """Write the ranked and scored tables; returns what ``run.json`` says of them."""
    items = plan.dataset.by_id()
    references = plan.dataset.references
    corpus = Corpus.build(references, cache_dir=CACHE) if references else None
    counts = dict.fromkeys(("rows", "flagged", "flagged_sources", "truncated_prompts"), 0)
    missing: dict[str, str] = {}

    def forget() -> None:
        if corpus is not None:
            corpus.forget()

    def scored_rows() -> Iterator[pa.Table]:
        for played in _batches(plan, [job.rows_path for job in plan.jobs], results.PLAYED):
            rows, reasons = scorecard.score_rows(played, items, corpus)
            missing.update(reasons)
            counts["rows"] += rows.num_rows
            flagged = rows.filter(rows["flagged"])
            counts["flagged"] += flagged.num_rows
            counts["flagged_sources"] += len(flagged["item"].unique())
            counts["truncated_prompts"] += sum(rows["truncated"].to_pylist())
            yield rows
            forget()

    def scored_baselines() -> Iterator[pa.Table]:
        if plan.key.task == "image":
            paths = [job.baselines_path for job in plan.jobs]
            for played in _batches(plan, paths, results.PLAYED_BASELINES):
                yield scorecard.score_baselines(played, items, corpus)
                forget()

    _write_parts(plan, "baselines.parquet", results.BASELINES, scored_baselines)
    _write_parts(plan, "rows.parquet", results.ROWS, scored_rows)
    return {"counts": counts, "missing_scores": missing}


def _batches(plan: Plan, paths: Sequence[Place], schema: pa.Schema) -> Iterator[pa.Table]:
    """The tables of the run's shards in order, some together."""
    for start in range(0, len(paths), SHARDS_SCORED_TOGETHER):
        group = paths[start : start + SHARDS_SCORED_TOGETHER]
        try:
            yield pa.concat_tables(results.read_table(p, schema, plan.key.hash) for p in group)
        except results.DamagedTable as error:
            raise UserError(f"{error}: run again, that shard is then played again") from error


def _write_parts(
    plan: Plan, name: str, schema: pa.Schema, parts: Callable[[], Iterator[pa.Table]]
) -> None:
    """Write tables one after the other into one Parquet file, atomically."""

    def write(temporary: Path) -> None:
        with results.table_writer(temporary, schema, plan.key.hash,
                                  scores=scorecard.version()) as writer:
            for part in parts():
                writer.write_table(part)

    results.write_atomic(plan.run.path / name, write)


# --- finding -----------------------------------------------------------------------------------


def find_run(
    preset: Preset, dataset: str | Dataset, task: str, n_sources: int, n_candidates: int,
    seed: int, root: str | Place | None = None,
) -> Run:
    """The finished run with these parameters; UserError says which notebook makes it."""
    plan = plan_run(preset, dataset, task, n_sources, n_candidates, seed, root)
    return results.find(plan.key, provenance.weights_present(preset), plan.run.path.parent)


def sources_of(run: Run, dataset: str | Dataset) -> dict[str, Item]:
    """The dataset's items by id, for showing a run's sources beside its rows."""
    whole = load_dataset(dataset) if isinstance(dataset, str) else dataset
    wanted = set(run.rows()["item"])
    return {item.id: item for item in whole.items if item.id in wanted}
