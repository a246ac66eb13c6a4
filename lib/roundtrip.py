"""Playing the game over a dataset: shard by shard, resumable, then ranked and scored.

::

    run = play(get_preset("mini"), "picturebook-coco", "image", n_sources=120, n_candidates=10, seed=0)
    rows = run.rows()

A run that was cut off anywhere continues where it stopped, and ends with the same tables byte for
byte: a shard is a pure function of its items (``game.play_shard``), a file appears only when it is
whole, and a shard counts as done only when its file is there.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from lib import provenance, results, scorecard
from lib.datasets import Dataset, Item, load_dataset
from lib.errors import UserError
from lib.game import TASKS, Played, Shard, Task, play_shard
from lib.images import png_bytes
from lib.metrics import Corpus
from lib.players import Cost, Models, describe_models, load_models
from lib.presets import REPO_ROOT, Preset, preset_to_dict
from lib.results import Run, RunKey

SHARD_SIZE = 32
# Scored together: enough to share the start of Java processes, few enough to keep memory flat.
SHARDS_SCORED_TOGETHER = 32
CACHE = REPO_ROOT / "data" / "cache"
_LISTED = 1000  # ids listed in run.json at most; the count is always whole


@dataclass(frozen=True)
class Plan:
    """A run to be played: its key, its folder, its sources in their order."""

    key: RunKey
    run: Run
    dataset: Dataset
    task: Task
    shard_size: int
    left_out: tuple[str, ...] = ()

    def shards(self) -> list[Shard]:
        """The run's sources in batches."""
        items, key = self.dataset.items, self.key
        return [
            Shard(key.name, key.dataset, key.preset, items[start : start + self.shard_size],
                  key.n_candidates, key.seed)
            for start in range(0, len(items), self.shard_size)
        ]

    def shard_path(self, index: int) -> Path:
        """Where a shard's rows lie."""
        return self.run.path / "shards" / f"{index:05d}.parquet"

    def baseline_path(self, index: int) -> Path:
        """Where the baselines of a shard's sources lie."""
        return self.run.path / "baselines" / f"{index:05d}.parquet"


# --- planning ----------------------------------------------------------------------------------


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} = {value!r}: must be a whole number of at least 1")


def plan_run(
    preset: Preset, dataset: str | Dataset, task: str, n_sources: int, n_candidates: int, seed: int,
    root: Path | None = None, shard_size: int = SHARD_SIZE,
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
    run = Run(Path(root or results.runs_root()) / key.name)
    # A run keeps the shards that it was begun with, whatever the size asked for now.
    begun = results.read_json(run.path / "run.json") or {}
    kept = begun.get("shard_size") if begun.get("hash") == key.hash else None
    return Plan(key, run, chosen, TASKS[task], kept or shard_size, left_out)


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
    models: Models | None = None, root: Path | None = None, shard_size: int = SHARD_SIZE,
) -> Run:
    """Play a run to its end, or return at once if it is finished.

    models: already loaded ones; the preset's are loaded when None and something is to be played.
    Raises UserError for bad input; whatever was finished before stays.
    """
    plan = plan_run(preset, dataset, task, n_sources, n_candidates, seed, root, shard_size)
    if engine != "local" or workers != 1:
        raise UserError(f"engine {engine!r} with {workers} workers: only 'local' with 1 is built in")
    with results.run_lock(plan.run.path):
        if not _scored(plan):
            begin(plan)
            waiting = pending(plan)
            if waiting:
                players = models or load_models(preset)
                _record_models(plan, players)
                play_pending(plan, waiting, players, progress)
            if progress:
                print(f"scoring {plan.key.name}", file=sys.stderr, flush=True)
            finish(plan)
    return plan.run


def begin(plan: Plan) -> None:
    """Write ``run.json`` before the first shard; a begun run's first record stays."""
    results.remove_leftovers(plan.run.path)
    path = plan.run.path / "run.json"
    known = results.read_json(path)
    if known is None or known.get("hash") != plan.key.hash:
        results.write_json(path, describe_run(plan))


def _record_models(plan: Plan, models: Models) -> None:
    """Add to ``run.json`` what was really loaded: revision, device, number type."""
    loaded = describe_models(models)
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


def pending(plan: Plan) -> list[int]:
    """Indices of the shards that are not done. A damaged one is reported and counts as not done.

    Raises UserError if a shard has another schema or belongs to another run.
    """
    return [i for i, shard in enumerate(plan.shards()) if not _done(plan, i, shard)]


def _done(plan: Plan, index: int, shard: Shard) -> bool:
    files = [(plan.shard_path(index), results.PLAYED)]
    if plan.key.task == "image":
        files.append((plan.baseline_path(index), results.PLAYED_BASELINES))
    for path, schema in files:
        if not path.is_file():
            return False
        try:
            table = results.read_table(path, schema, plan.key.hash)
        except results.DamagedTable as error:
            print(f"damaged, is played again: {error}", file=sys.stderr, flush=True)
            return False
        each = shard.n_candidates if schema is results.PLAYED else 1
        if table["item"].to_pylist() != [item.id for item in shard.items for _ in range(each)]:
            print(f"not the expected sources, is played again: {path}", file=sys.stderr, flush=True)
            return False
    return True


def play_pending(plan: Plan, waiting: Sequence[int], models: Models, progress: bool) -> None:
    """Play the pending shards one after the other, while a thread writes the last one's files."""
    shards = plan.shards()
    cost = Cost.from_dict(plan.run.cost())  # what earlier sittings have spent
    with progress_bar(len(plan.dataset), plan.key.name, progress) as bar, \
            ThreadPoolExecutor(max_workers=1) as writer:
        bar.update(len(plan.dataset) - sum(len(shards[i].items) for i in waiting))
        last: Future[None] | None = None
        for index in waiting:
            played = play_shard(shards[index], plan.task, models)
            if last is not None:
                last.result()  # at most one shard waits in memory; a full disk stops us here
            cost.add(played.cost)
            last = writer.submit(publish, plan, index, played, cost.as_dict())
            bar.update(len(shards[index].items))
        if last is not None:
            last.result()


def publish(plan: Plan, index: int, played: Played, cost: Mapping[str, Any]) -> None:
    """Put a shard on disk: pictures, then baselines, then its rows, whose file makes it done."""
    pictures = {plan.run.path / name: png_bytes(p) for name, p in played.pictures.items()}
    results.write_many(pictures, plan.run.path / ".scratch")
    if played.baselines is not None:
        results.write_table(plan.baseline_path(index), played.baselines, plan.key.hash)
    results.write_table(plan.shard_path(index), played.rows, plan.key.hash)
    results.write_json(plan.run.path / "cost.json", cost)


def progress_bar(total: int, name: str, shown: bool) -> tqdm:
    """A bar on a terminal; elsewhere (a log, a notebook run by papermill) a plain line now and then."""
    terminal = sys.stderr.isatty()
    return tqdm(total=total, desc=name, unit="source", disable=not shown, ascii=not terminal,
                mininterval=0.5 if terminal else 30.0, maxinterval=60.0)


# --- ranking and scoring -----------------------------------------------------------------------


def _scored(plan: Plan) -> bool:
    """Whether the tables are there, of this run, and scored as this version scores."""
    marks = results.marks(plan.run.path / "rows.parquet")
    return (plan.run.finished and marks.get("run") == plan.key.hash
            and marks.get("scores") == scorecard.version()
            and (plan.run.path / "baselines.parquet").is_file())


def finish(plan: Plan) -> None:
    """Rank and score all shards into ``rows.parquet`` and ``baselines.parquet``.

    Can be repeated at any time without playing again. ``rows.parquet`` comes last: it is what
    makes a run finished.
    """
    items = plan.dataset.by_id()
    references = plan.dataset.references
    corpus = Corpus.build(references, cache_dir=CACHE) if references else None
    counts: dict[str, int] = {"rows": 0, "flagged": 0, "truncated_prompts": 0}
    missing: dict[str, str] = {}

    def scored_rows() -> Iterator[pa.Table]:
        for played in _batches(plan, plan.shard_path, results.PLAYED):
            rows, reasons = scorecard.score_rows(played, items, corpus)
            missing.update(reasons)
            counts["rows"] += rows.num_rows
            counts["flagged"] += sum(rows["flagged"].to_pylist())
            counts["truncated_prompts"] += sum(rows["truncated"].to_pylist())
            yield rows

    def scored_baselines() -> Iterator[pa.Table]:
        if plan.key.task == "image":
            for played in _batches(plan, plan.baseline_path, results.PLAYED_BASELINES):
                yield scorecard.score_baselines(played, items, corpus)

    _write_parts(plan, "baselines.parquet", results.BASELINES, scored_baselines)
    _write_parts(plan, "rows.parquet", results.ROWS, scored_rows)
    record = plan.run.info()
    record.update(counts=counts, missing_scores=missing)
    results.write_json(plan.run.path / "run.json", record)


def _batches(
    plan: Plan, place: Callable[[int], Path], schema: pa.Schema
) -> Iterator[pa.Table]:
    """The run's shards in order, some together."""
    paths = [place(i) for i in range(len(plan.shards()))]
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
    seed: int, root: Path | None = None,
) -> Run:
    """The finished run with these parameters; UserError says which notebook makes it."""
    plan = plan_run(preset, dataset, task, n_sources, n_candidates, seed, root)
    return results.find(plan.key, provenance.weights_present(preset), plan.run.path.parent)


def sources_of(run: Run, dataset: str | Dataset) -> dict[str, Item]:
    """The dataset's items by id, for showing a run's sources beside its rows."""
    whole = load_dataset(dataset) if isinstance(dataset, str) else dataset
    wanted = set(run.rows()["item"])
    return {item.id: item for item in whole.items if item.id in wanted}
