"""A run on disk: planned, executed shard by shard, resumed where it stopped, then ranked and scored.

A run's folder (see README.md) has a hash over all that changes a row in its name. A shard, the rows of one batch of
sources, is done when its file is there, and every file appears only when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec.implementations.arrow import ArrowFSWrapper
from PIL import Image
from tqdm import tqdm
from upath import UPath

from lib import metrics, ranking
from lib.base import ROOT, UserError, folder_setting, write_atomic
from lib.data import Dataset, decode_image
from lib.data.datasets import examples
from lib.metrics import CAPTION_SCORES, SEMANTIC_SCORES
from lib.models import Models, fetch_models, weights_fingerprint
from lib.presets import Preset, row_settings
from lib.roundtrip.steps import Batch, Cost, Tick, round_trip
from lib.roundtrip.workers import make_shards

SHARD_SIZE = 32  # sources made, written and resumed together
Place = Path | UPath

_IDENTITY = ("run", "task", "dataset", "item", "domain")
_CLIP = ("clipscore", "ref_clipscore", "clip_score", "clip_score_second")
ROW_COLUMNS = (*_IDENTITY, "candidate", "seed", "message", "reconstruction", "source_text", "logprob", "n_words",
               "flagged", "similarity", "similarity_euclidean", "similarity_second", "rank", "selected",
               *CAPTION_SCORES, *_CLIP, *SEMANTIC_SCORES, "truncated")
BASELINE_COLUMNS = (*_IDENTITY, "kind", "caption", "logprob", "n_words", *CAPTION_SCORES, *_CLIP[:2], *SEMANTIC_SCORES)
_KINDS = dict.fromkeys((*_IDENTITY, "message", "reconstruction", "source_text", "kind", "caption"), pa.string()) | (
    dict.fromkeys(("candidate", "n_words", "rank"), pa.int32()) | {"seed": pa.int64()}
    | dict.fromkeys(("flagged", "selected", "truncated"), pa.bool_()))


def write_table(path: Place, frame: pd.DataFrame, columns: Sequence[str] = ()) -> None:
    """Write a Parquet file with checksums, whose bytes depend on nothing but the values; NaN becomes null."""
    frame = frame.reindex(columns=list(columns or frame))
    schema = pa.schema([(name, _KINDS.get(name, pa.float64())) for name in frame])
    table = pa.Table.from_pandas(frame, schema, preserve_index=False).replace_schema_metadata(None)
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    write_atomic(path, stream.getvalue())


def read_table(path: Place) -> pd.DataFrame:
    """A table that :func:`write_table` wrote; UserError if it is cut off or its checksums are wrong."""
    content = io.BytesIO(path.read_bytes())
    try:
        return pq.read_table(content, page_checksum_verification=True).to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged, remove it and execute the run again: {error}") from error


def read_json(path: Place) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Place, data: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    write_atomic(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def ranked(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with columns rank (1 = most similar, null without similarity) and selected."""
    rank = ranking.rank(rows["similarity"].to_numpy(float), rows["item"].to_numpy())
    return rows.assign(rank=pd.array(rank, dtype="Float64").astype("Int32"), selected=rank == 1)


@dataclass(frozen=True, eq=False)
class Shard:
    """A batch of a run's sources. Small, so that it can be sent to another process: run has no other items."""

    index: int
    run: Run

    def __str__(self) -> str:
        return f"shard {self.index} (items {examples([item.id for item in self.run.dataset.items], 10)})"

    def path(self, kind: str) -> Place:
        """The file of its "baselines" or, written last, its "shards"."""
        return self.run.folder / kind / f"{self.index:05d}.parquet"

    def make(self, models: Models, tick: Tick | None = None) -> Batch:
        """The round trip of its sources; writes nothing."""
        run, data = self.run, self.run.dataset
        return round_trip(run.task, data.items, models, run.preset, data.name, run.n_candidates, run.seed, tick)

    def publish(self, batch: Batch) -> Cost:
        """Write images, then baselines, then the rows that make it done; returns the batch's cost."""

        def write_image(name: str) -> None:
            stream = io.BytesIO()
            Image.fromarray(batch.images[name]).save(stream, format="PNG", compress_level=1)
            write_atomic(self.run.folder / name, stream.getvalue())

        with ThreadPoolExecutor(8) as pool:  # forcing files to disk side by side takes a fraction of the time
            list(pool.map(write_image, batch.images))
        if self.run.task == "image":
            write_table(self.path("baselines"), batch.baselines.assign(run=self.run.name))
        write_table(self.path("shards"), batch.rows.assign(run=self.run.name))
        return batch.cost


@dataclass(frozen=True)
class Run:
    """One preset, dataset (the drawn sources), task, K and seed, and the folder of its files, which may have more
    candidates than K, as row k does not depend on K. Reads from disk when asked. weights: see :func:`weights_of`."""

    preset: Preset
    dataset: Dataset
    task: str
    n_candidates: int
    seed: int
    folder: Place
    weights: Mapping[str, str | None] = field(default_factory=dict)
    shard_size: int = SHARD_SIZE

    @property
    def identity(self) -> dict[str, Any]:
        """All that changes a row, and nothing else."""
        return {"settings": _digest(row_settings(self.preset)), "data": self.dataset.fingerprint,
                "weights": dict(self.weights), "dataset": self.dataset.name, "task": self.task, "n": len(self.dataset),
                "k": self.n_candidates, "seed": self.seed}

    @property
    def name(self) -> str:
        """The folder's name, which is also the column ``run`` of the rows."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether all rows are there, scored and counted."""
        return (self.folder / "rows.parquet").is_file() and "counts" in self.info()

    def info(self) -> dict[str, Any]:
        """What ``run.json`` says; empty before the run is begun."""
        return read_json(self.folder / "run.json")

    def cost(self) -> dict[str, Any]:
        """Sums over all sittings and workers: sources, captions, images, wall (s), and a dict of seconds by stage."""
        flat, mark = read_json(self.folder / "cost.json"), "seconds: "
        return flat | {"seconds": {key.removeprefix(mark): flat.pop(key) for key in list(flat) if key.startswith(mark)}}

    def rows(self) -> pd.DataFrame:
        """All rows by source and candidate, ranked among this run's K; missing values are NaN or None."""
        rows = self._table("rows.parquet")
        if self.n_candidates < self.info()["n_candidates"]:
            fewer = ranked(rows[rows["candidate"] < self.n_candidates].reset_index(drop=True))
            return fewer.astype({"rank": rows["rank"].dtype})
        return rows

    def baselines(self) -> pd.DataFrame:
        """Greedy captions of the sources; no rows in text reconstruction."""
        return self._table("baselines.parquet")

    def image(self, name: str) -> Image.Image:
        """The generated image of a row (RGB), by the path in its column message or reconstruction."""
        return decode_image(self.folder / name)

    def _table(self, name: str) -> pd.DataFrame:
        if not self.finished:
            notebook = {"image": "01_image_reconstruction", "text": "02_text_reconstruction"}[self.task]
            raise UserError(f"run {self.name} is not finished: execute notebooks/{notebook}.ipynb with the same "
                            "parameters first, or ./run_all.sh")
        return read_table(self.folder / name)

    def shards(self) -> list[Shard]:
        """The sources in batches; a run keeps the size that it was begun with."""
        size, items = self.info().get("shard_size", self.shard_size), self.dataset.items
        return [Shard(i, replace(self, dataset=replace(self.dataset, items=items[start : start + size], references={})))
                for i, start in enumerate(range(0, len(items), size))]

    def execute(self, workers: int = 1, engine: str = "local", models: Models | Callable[[], Models] | None = None,
                progress: bool = True, rescore: bool = False) -> Run:
        """Run the models where rows are missing, then rank and score; the finished run. A finished one is only scored
        again: where a metric was missing and is available now, and always with rescore. engine, workers: see
        :mod:`lib.roundtrip.workers`. models: loaded ones, or a function that loads them, which several workers need."""
        run = self
        if None in self.weights.values() and not self.finished:  # known by their content once they are here
            fetch_models(self.preset)
            run = plan_run(self.preset, self.dataset, self.task, self.n_candidates, self.seed, self.folder.parent)
        if run._complete() and not rescore:
            return run  # before any lock: its folder may be read-only
        with _lock(run.folder) if isinstance(run.folder, Path) else contextlib.nullcontext():  # a store has no locks
            if not run.finished:
                run._make(workers, engine, models, progress)
            if rescore or not run._complete():
                run._score(progress)
        return run

    def _complete(self) -> bool:
        """Whether it is finished and has every score that can be had here."""
        return self.finished and not any(metrics.available()[name] is None for name in self.info().get("fillable", []))

    def _make(self, workers: int, engine: str, models: Any, progress: bool) -> None:
        """Make the shards that are not done, and keep what they cost; the record of a begun run stays."""
        for path in self.folder.rglob(".*.tmp") if isinstance(self.folder, Path) else ():
            path.unlink(missing_ok=True)  # what killed processes left; the lock is ours
        if not self.info():
            write_json(self.folder / "run.json", {
                "run": self.name, "identity": self.identity, "task": self.task, "n_candidates": self.n_candidates,
                "seed": self.seed, "shard_size": self.shard_size, "preset": self.preset.model_dump(mode="json"),
                "dataset": {"name": self.dataset.name, "notes": self.dataset.notes}, "made_by": program()})
        shards = self.shards()
        waiting = [shard for shard in shards if not shard.path("shards").is_file()]
        if not waiting:
            return
        self.dataset.check_images()
        cost = Cost(read_json(self.folder / "cost.json"))
        begun = time.perf_counter() - cost["wall"]

        def done(spent: Cost) -> None:
            cost.update(spent)
            cost["wall"] = time.perf_counter() - begun
            write_json(self.folder / "cost.json", cost)

        rows, left = (sum(len(shard.run.dataset) for shard in some) * self.n_candidates for some in (shards, waiting))
        with _progress(self.name, rows, rows - left, progress) as bar:
            loaded = make_shards(waiting, workers, engine, models, self.preset, done, bar.update)
        write_json(self.folder / "run.json", self.info() | {"loaded": loaded})

    def _score(self, progress: bool) -> None:
        """Rank and score all shards into the two tables, then write the counts that make the run finished."""
        cost, shards = Cost(read_json(self.folder / "cost.json")), self.shards()
        with cost.stage("score"):
            rows = ranked(pd.concat([read_table(shard.path("shards")) for shard in shards], ignore_index=True))
            greedy = [read_table(shard.path("baselines")) for shard in shards if self.task == "image"]
            greedy = pd.concat(greedy or [pd.DataFrame(columns=["item", "caption"])], ignore_index=True)
            said = rows["message" if self.task == "image" else "reconstruction"].where(~rows["flagged"])
            pairs = pd.concat([rows[["item"]].assign(caption=said), greedy[["item", "caption"]]], ignore_index=True)
            with _progress(f"scoring {self.name}", len(pairs), 0, progress) as bar:
                scores, gaps = self._scores(pairs)
                bar.update(len(pairs))
            greedy = greedy.join(scores[len(rows):].reset_index(drop=True))
            write_table(self.folder / "baselines.parquet", greedy, BASELINE_COLUMNS)
            write_table(self.folder / "rows.parquet", rows.join(scores[: len(rows)]), ROW_COLUMNS)
        write_json(self.folder / "cost.json", cost)
        flagged = rows.loc[rows["flagged"], "item"]
        counts = {"rows": len(rows), "flagged": len(flagged), "flagged_sources": flagged.nunique(),
                  "truncated_prompts": int(rows["truncated"].sum())}
        write_json(self.folder / "run.json", self.info() | {"counts": counts} | gaps)

    def _scores(self, pairs: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Every score of (item, caption) pairs, each distinct one scored once, and what has none: metrics with the
        reason, those of them that can be had once something is installed, and single captions with the reason."""
        items, names = self.dataset.by_id(), [*CAPTION_SCORES, *SEMANTIC_SCORES]
        distinct = pairs.dropna().drop_duplicates().reset_index(drop=True).reindex(columns=[*pairs, *names])
        known = distinct["item"].map(lambda item: bool(items[item].references)).astype(bool)
        missing, unscored = dict.fromkeys(CAPTION_SCORES, "the dataset has no reference captions"), []
        if known.any():
            references = metrics.References.build(self.dataset.references)
            found = metrics.score_captions(*(distinct.loc[known, name].tolist() for name in pairs), references)
            distinct.loc[known, list(CAPTION_SCORES)] = found[list(CAPTION_SCORES)].to_numpy(float)
            missing, unscored = found.attrs["missing"], list(found.attrs["unscored"].values())
        if unscored:
            print(f"{self.name}: captions without a score: {examples(unscored)}", file=sys.stderr, flush=True)
        scenes = [items[item].scene for item in distinct["item"]]
        if any(scenes):
            found = metrics.score_semantics(distinct["caption"].tolist(), scenes)
            distinct[list(SEMANTIC_SCORES)] = found[list(SEMANTIC_SCORES)].to_numpy(float)
        fillable = [name for name, reason in metrics.available().items() if reason and name in missing]
        gaps = {"missing_scores": missing, "fillable": fillable, "unscored": unscored}
        return pairs.merge(distinct, how="left", on=list(pairs))[names], gaps


def _progress(what: str, total: int, done: int, shown: bool) -> tqdm:
    """A progress bar that moves at least every ten seconds; outside a terminal it is a line each time."""
    lines = {"mininterval": float("inf"), "bar_format": "{desc}: {n_fmt} of {total_fmt}, {elapsed} < {remaining}\n"}
    bar = tqdm(total=total, initial=done, desc=what, unit="row", disable=not shown,
               **({} if sys.stderr.isatty() else lines))

    def refresh() -> None:
        while not bar.disable:  # until it is closed
            time.sleep(10)
            bar.refresh()

    threading.Thread(target=refresh, daemon=True).start()
    return bar


class S3(ArrowFSWrapper):
    """s3:// by the driver inside pyarrow: no further package; keys, region and endpoint by the usual AWS variables."""

    protocol = "s3"
    _parent = fsspec.AbstractFileSystem._parent  # upath calls it as a class method

    def __init__(self, **options: Any) -> None:
        super().__init__(pyarrow.fs.S3FileSystem(), **options)


fsspec.register_implementation("s3", S3, clobber=True)


def runs_root() -> Place:
    """Where runs lie: ``data/runs``, or the folder or URL that COMPENDIUM_RUNS names."""
    return folder_setting("COMPENDIUM_RUNS", ROOT / "data" / "runs")


def weights_of(preset: Preset) -> dict[str, str | None]:
    """What identifies the weights of each model by part: a content hash or id@revision; None where unknown."""
    parts = ("captioner", "generator", "encoder", "second_encoder")
    return {part: weights_fingerprint(getattr(preset, part)) for part in parts if getattr(preset, part) is not None}


def plan_run(preset: Preset, dataset: Dataset, task: str, n_candidates: int, seed: int, root: Place | None = None,
             weights: Mapping[str, str | None] | None = None, shard_size: int = SHARD_SIZE) -> Run:
    """The run over the given sources, in the folder where it lies or will lie: one with more candidates if that is
    finished, and where weights are not on this machine one with the same settings and data."""
    root = root or runs_root()
    run = Run(preset, dataset, task, n_candidates, seed, root, weights or weights_of(preset), shard_size)
    wanted, parts = run.identity, (preset.name, dataset.name, task)
    stem = "--".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part)[:60].strip("-.") for part in parts)
    exact = replace(run, folder=root / f"{stem}--n{len(dataset)}k{n_candidates}s{seed}--{_digest(wanted)[:8]}")
    if exact.finished or not root.is_dir():
        return exact

    def serves(other: Run) -> bool:
        found = other.info().get("identity", {})
        same = all(found.get(name) == value for name, value in wanted.items() if name not in ("k", "weights"))
        return same and found["k"] >= n_candidates and other.finished and all(
            value in (None, found["weights"].get(part)) for part, value in wanted["weights"].items())

    others = (replace(run, folder=folder) for folder in root.glob(f"{stem}--n{len(dataset)}k*s{seed}--*"))
    return min(filter(serves, others), key=lambda one: (one.info()["n_candidates"], one.name), default=exact)


@lru_cache(maxsize=1)
def program() -> dict[str, Any]:
    """The program's commit, whether its code was changed since (None where unknown), versions, system. No secrets."""
    git, status = ["git", "-C", str(ROOT)], ["status", "--porcelain", "--", "lib", "notebooks", "data", "requirements.lock"]
    try:
        commit, changes = (subprocess.check_output([*git, *one], stderr=subprocess.DEVNULL, text=True).strip()
                           for one in (["rev-parse", "HEAD"], status))
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        commit = changes = None
    packages = ("torch", "transformers", "diffusers", "numpy", "scipy", "pillow", "pyarrow", "pandas", "pycocoevalcap")
    return {"commit": commit, "dirty": None if changes is None else bool(changes), "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "versions": {name: importlib.metadata.version(name) for name in packages}}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _lock(folder: Path) -> contextlib.AbstractContextManager[Any]:
    """What holds a run's folder, after a word where another process holds it. The kernel frees it of a killed one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): set COMPENDIUM_RUNS to another folder") from error
    lock = FileLock(folder / ".lock")
    with contextlib.suppress(Timeout):
        return lock.acquire(timeout=0)
    print(f"another process works on {folder.name}: waiting", file=sys.stderr, flush=True)
    return lock
