"""A run on disk: planned, executed shard by shard, resumed where it stopped, then ranked and scored.

A run's folder is ``<preset>--<dataset>--<task>--n<N>k<K>s<seed>--<hash8>/``, the hash being over all that changes
a row, so that runs never mix::

    run.json                what was run, with what, from which commit; counts when finished
    shards/00000.parquet    rows of one batch of sources as the models left them
    baselines/00000.parquet greedy captions of the same sources
    images/<item>/<k>.png   what the generator made
    rows.parquet            all rows, ranked and scored: what notebooks read
    baselines.parquet       the baselines, scored
    cost.json               seconds by stage (differs from time to time)

There is no ledger: a shard is done when its file is there and whole, and every file appears only when it is whole.
So a killed run goes on where it stopped and ends with the same tables byte for byte. The folder may lie in a store
that fsspec reaches. There no lock is held: two commands on the same run do the same work twice and write the same
bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from PIL import Image
from upath import UPath

from lib import metrics, ranking
from lib.base import ROOT, UserError, folder_setting, write_atomic
from lib.data import Dataset, Item, decode_image
from lib.metrics import CAPTION_SCORES, SEMANTIC_SCORES
from lib.presets import Preset, row_settings
from lib.roundtrip import provenance, workers
from lib.roundtrip.steps import TASKS, Batch, Cost, Tick, round_trip

if TYPE_CHECKING:
    from lib.models import Models

SHARD_SIZE = 32  # sources made, written and resumed together
SCORED_TOGETHER = 256  # sources: enough to share the start of Java, few enough to keep memory flat
NO_REFERENCES = "the dataset has no reference captions"
Place = Path | UPath

# --- tables -------------------------------------------------------------------------------------

_IDENTITY = ("run", "task", "dataset", "item", "domain")
_KINDS = {"candidate": pa.int32(), "seed": pa.int64(), "n_words": pa.int32(), "rank": pa.int32(), "flagged": pa.bool_(),
          "selected": pa.bool_(), "truncated": pa.bool_()} | dict.fromkeys(
    (*_IDENTITY, "message", "reconstruction", "source_text", "kind", "caption"), pa.string())
_MADE = (*_IDENTITY, "candidate", "seed", "message", "reconstruction", "source_text", "logprob", "n_words", "flagged",
         "similarity", "similarity_euclidean", "similarity_second")
_CLIP = ("clipscore", "ref_clipscore")
_GREEDY = (*_IDENTITY, "kind", "caption", "logprob", "n_words")
SHARD_COLUMNS = (*_MADE, *_CLIP, "clip_score", "clip_score_second", "truncated")
ROW_COLUMNS = (*_MADE, "rank", "selected", *CAPTION_SCORES, *_CLIP, "clip_score", "clip_score_second",
               *SEMANTIC_SCORES, "truncated")
GREEDY_COLUMNS = (*_GREEDY, *_CLIP)
BASELINE_COLUMNS = (*_GREEDY, *CAPTION_SCORES, *_CLIP, *SEMANTIC_SCORES)


def write_table(path: Place, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Write a Parquet file with checksums, whose bytes depend on nothing but the values; NaN becomes null."""
    schema = pa.schema([(name, _KINDS.get(name, pa.float64())) for name in columns])
    table = pa.Table.from_pandas(frame.reindex(columns=list(columns)), schema, preserve_index=False)
    stream = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(None), stream, compression="zstd", write_page_checksum=True)
    write_atomic(path, stream.getvalue())


def read_table(path: Place) -> pd.DataFrame:
    """A table that :func:`write_table` wrote; pyarrow's error if it is cut off or its checksums are wrong."""
    return pq.read_table(io.BytesIO(path.read_bytes()), page_checksum_verification=True).to_pandas()


def ranked(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with columns rank (1 = most similar, null without similarity) and selected."""
    rank = ranking.rank(rows["similarity"].to_numpy(float), rows["item"].to_numpy())
    return rows.assign(rank=pd.array(rank, dtype="Float64").astype("Int32"), selected=rank == 1)


# --- one batch of sources -------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A batch of a run's sources and where its files go. Small, so that it can be sent to another process."""

    index: int
    items: tuple[Item, ...]
    run: str
    folder: Place
    preset: Preset
    dataset: str
    task: str
    n_candidates: int
    seed: int

    def __str__(self) -> str:
        ids = [item.id for item in self.items]
        return f"shard {self.index} (items {', '.join(ids[:10])}{' ...' if len(ids) > 10 else ''})"

    def path(self, kind: str) -> Place:
        """The file of its "shards" or "baselines"."""
        return self.folder / kind / f"{self.index:05d}.parquet"

    def make(self, models: Models, tick: Tick | None = None) -> Batch:
        """The round trip of its sources; writes nothing."""
        return round_trip(self.task, self.items, models, self.preset, self.dataset, self.n_candidates, self.seed, tick)

    def publish(self, batch: Batch) -> Cost:
        """Write images, then baselines, then the rows that make it done; returns the batch's cost."""
        with ThreadPoolExecutor(8) as pool:  # forcing files to disk side by side takes a fraction of the time
            list(pool.map(self._write_image, batch.images.items()))
        if self.task == "image":
            write_table(self.path("baselines"), batch.baselines.assign(run=self.run), GREEDY_COLUMNS)
        write_table(self.path("shards"), batch.rows.assign(run=self.run), SHARD_COLUMNS)
        return batch.cost

    def _write_image(self, named: tuple[str, np.ndarray]) -> None:
        stream = io.BytesIO()
        Image.fromarray(named[1]).save(stream, format="PNG", compress_level=6)
        write_atomic(self.folder / named[0], stream.getvalue())

    def done(self) -> bool:
        """Whether its files are there and whole; a damaged one is named and made again."""
        kinds = {"shards": self.n_candidates} | ({"baselines": 1} if self.task == "image" else {})
        return all(self._holds(kind, each) for kind, each in kinds.items())

    def _holds(self, kind: str, each: int) -> bool:
        path = self.path(kind)
        try:
            found = read_table(path)["item"].tolist()
        except FileNotFoundError:
            return False
        except (pa.ArrowException, OSError, KeyError) as error:
            print(f"{path} is damaged and made again: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            return False
        return found == [item.id for item in self.items for _ in range(each)]


# --- a run ----------------------------------------------------------------------------------------


def runs_root() -> Place:
    """Where runs lie: ``data/runs``, or the folder or URL that COMPENDIUM_RUNS names."""
    root = folder_setting("COMPENDIUM_RUNS", ROOT / "data" / "runs")
    return Path(root.path) if isinstance(root, UPath) and root.protocol in ("", "file", "local") else root


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def weights_of(preset: Preset) -> dict[str, str | None]:
    """What identifies the weights of each model by part: a content hash or id@revision; None where unknown."""
    from lib.models import weights_fingerprint

    parts = ("captioner", "generator", "encoder", "second_encoder")
    return {part: weights_fingerprint(getattr(preset, part)) for part in parts if getattr(preset, part) is not None}


@dataclass(frozen=True)
class Run:
    """One preset, dataset, task, K and seed, and the folder of its files. Reads from disk when asked.

    dataset: the drawn sources; n_candidates: K, perhaps fewer than the folder has (row k does not depend on K);
    weights: what :func:`weights_of` says.
    """

    preset: Preset
    dataset: Dataset
    task: str
    n_candidates: int
    seed: int
    folder: Place
    weights: Mapping[str, str | None] = field(default_factory=dict)
    shard_size: int = SHARD_SIZE

    # identity

    @property
    def identity(self) -> dict[str, Any]:
        """All that changes a row, and nothing else. Revisions are left out of the settings: weights hold them."""
        settings = row_settings(self.preset)
        for part in settings.values():
            if isinstance(part, dict):
                part.pop("revision", None), part.pop("lora_revision", None)
        return {"settings": _digest(settings), "data": self.dataset.fingerprint, "weights": dict(self.weights),
                "dataset": self.dataset.name, "task": self.task, "n": len(self.dataset.items), "k": self.n_candidates,
                "seed": self.seed}

    @property
    def name(self) -> str:
        """The folder's name, which is also the column ``run`` of the rows."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether all rows are there, scored and counted."""
        return (self.folder / "rows.parquet").is_file() and "counts" in self._json("run.json")

    # reading

    def info(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        found = self._json("run.json")
        if not found:
            raise UserError(f"{self.folder / 'run.json'} is absent or damaged: execute the run again")
        return found

    def cost(self) -> dict[str, Any]:
        """Sums over all sittings and workers: sources, captions, images, seconds by stage, wall (s); empty if not kept."""
        return self._json("cost.json")

    def rows(self) -> pd.DataFrame:
        """All rows by source and candidate, ranked among this run's K; missing values are NaN or None."""
        rows = self._table("rows.parquet")
        if rows["candidate"].max() >= self.n_candidates:
            rows = ranked(rows[rows["candidate"] < self.n_candidates].reset_index(drop=True))
        return rows

    def baselines(self) -> pd.DataFrame:
        """Greedy captions of the sources; no rows in text reconstruction."""
        return self._table("baselines.parquet")

    def image(self, name: str) -> Image.Image:
        """The generated image of a row (RGB), by the path in its column message or reconstruction."""
        try:
            return decode_image((self.folder / name).read_bytes())
        except FileNotFoundError as error:
            raise UserError(f"{self.folder / name} is absent: remove rows.parquet and the folder shards beside it and "
                            "execute the run again") from error

    def _table(self, name: str) -> pd.DataFrame:
        if not self.finished:
            number = "01_image" if self.task == "image" else "02_text"
            raise UserError(f"run {self.name} is not finished: execute notebooks/{number}_reconstruction.ipynb with "
                            "the same parameters first, or ./run_all.sh")
        try:
            return read_table(self.folder / name)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.folder / name} is damaged: remove it and execute the run again ({error})") from error

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _write_json(self, name: str, data: Mapping[str, Any]) -> None:
        write_atomic(self.folder / name, json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    # executing

    @property
    def shards(self) -> list[Shard]:
        """The sources in batches; a run keeps the size that it was begun with."""
        size, items = self._json("run.json").get("shard_size", self.shard_size), self.dataset.items
        return [Shard(i, items[start : start + size], self.name, self.folder, self.preset, self.dataset.name, self.task,
                      self.n_candidates, self.seed) for i, start in enumerate(range(0, len(items), size))]

    def execute(self, workers: int = 1, engine: str = "local", models: Models | Callable[[], Models] | None = None,
                progress: bool = True, rescore: bool = False) -> Run:
        """Run the models where rows are missing, then rank and score; the finished run.

        engine, workers: see :mod:`lib.roundtrip.workers`. models: loaded ones, or a function that loads them (what
        several workers need); None loads the preset's. A finished run is only scored again, without models: where a
        metric was missing and is available now, and always with rescore. Raises UserError in one line.
        """
        run = self if self.finished or None not in self.weights.values() else self._fetched()
        if run.finished and not (rescore or run._fillable()):
            return run  # before any lock: its folder may be read-only
        with _locked(run.folder), _disk_errors(run.folder):
            if not run.finished:
                run._begin()
                run._make(workers, engine, models, progress)
            if not run.finished or rescore or run._fillable():
                run._score(progress)
        return run

    def _fetched(self) -> Run:
        """This run once its models are on this machine and known by their content."""
        from lib.models import fetch_models

        fetch_models(self.preset)
        return plan_run(self.preset, self.dataset, self.task, self.n_candidates, self.seed, self.folder.parent)

    def _fillable(self) -> bool:
        """Whether a score that is missing in the rows could be had now."""
        missing = self._json("run.json").get("missing_scores", {})
        had = metrics.available() if missing else {}
        return any(had.get(name, "") is None for name, reason in missing.items() if reason != NO_REFERENCES)

    def _begin(self) -> None:
        """Write ``run.json`` before the first shard; the record of a begun run stays."""
        for path in self.folder.glob("**/.*.tmp") if isinstance(self.folder, Path) else ():
            path.unlink(missing_ok=True)  # what killed processes left; the lock is ours
        if self._json("run.json").get("identity") == self.identity:
            return
        data = self.dataset
        self._write_json("run.json", {
            "run": self.name, "task": self.task, "identity": self.identity, "n_candidates": self.n_candidates,
            "seed": self.seed, "shard_size": self.shard_size, "preset": self.preset.model_dump(mode="json"),
            "dataset": {"name": data.name, "sources": len(data.items), "split_size": len(data.references),
                        "notes": list(data.notes)},
            "made_by": provenance.collect()})

    def _make(self, n_workers: int, engine: str, models: Any, progress: bool) -> None:
        """Make the shards that are not done, and keep what they cost."""
        shards = self.shards
        waiting = [shard for shard in shards if not shard.done()]
        if not waiting:
            return
        spent = self.cost()
        cost = Cost(spent.get("sources", 0), spent.get("captions", 0), spent.get("images", 0))
        cost.seconds.update(spent.get("seconds", {}))
        with workers.Progress(self, waiting, progress) as bar:

            def done(shard: Shard, more: Cost) -> None:
                cost.add(more)
                wall = spent.get("wall", 0.0) + bar.elapsed
                self._write_json("cost.json", asdict(cost) | {"wall": wall, "workers": n_workers})
                bar.done(shard)

            described = workers.make(waiting, n_workers, engine, models, self.preset, done, bar)
        self._write_json("run.json", self.info() | {"loaded": described})

    # ranking and scoring

    def _score(self, progress: bool) -> None:
        """Rank and score all shards into the two tables, then write the counts that make the run finished."""
        if progress:
            print(f"scoring {self.name}", file=sys.stderr, flush=True)
        references = metrics.References.build(self.dataset.references) if self.dataset.references else None
        missing: dict[str, str] = {}
        parts: list[tuple[pd.DataFrame, pd.DataFrame]] = []
        cost, shards = Cost(), self.shards
        together = max(1, SCORED_TOGETHER // len(shards[0].items))
        with cost.stage("score"):
            for start in range(0, len(shards), together):
                parts.append(self._score_part(shards[start : start + together], references, missing))
        rows, baselines = (pd.concat(part, ignore_index=True) for part in zip(*parts, strict=True))
        write_table(self.folder / "baselines.parquet", baselines, BASELINE_COLUMNS)
        write_table(self.folder / "rows.parquet", rows, ROW_COLUMNS)
        spent = self.cost()
        self._write_json("cost.json", spent | {"seconds": spent.get("seconds", {}) | cost.seconds})
        flagged = rows.loc[rows["flagged"], "item"]
        counts = {"rows": len(rows), "flagged": len(flagged), "flagged_sources": flagged.nunique(),
                  "truncated_prompts": int(rows["truncated"].sum())}
        self._write_json("run.json", self.info() | {"counts": counts, "missing_scores": missing})

    def _score_part(self, shards: Sequence[Shard], references: Any, missing: dict[str, str]
                    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Rows and baselines of some shards with every score; adds to missing {metric: reason}."""
        rows = ranked(pd.concat([read_table(shard.path("shards")) for shard in shards], ignore_index=True))
        greedy = [read_table(shard.path("baselines")) for shard in shards if self.task == "image"]
        baselines = pd.concat(greedy, ignore_index=True) if greedy else pd.DataFrame(columns=list(GREEDY_COLUMNS))
        said = rows["message" if self.task == "image" else "reconstruction"]
        pairs = pd.concat([rows[["item"]].assign(caption=said.where(~rows["flagged"])), baselines[["item", "caption"]]],
                          ignore_index=True)
        scores = self._score_pairs(pairs, references, missing)
        rows = rows.join(scores.iloc[: len(rows)])
        return rows, baselines.join(scores.iloc[len(rows):].reset_index(drop=True))

    def _score_pairs(self, pairs: pd.DataFrame, references: Any, missing: dict[str, str]) -> pd.DataFrame:
        """Every score of (item, caption) pairs, each distinct one scored once; null where it cannot be had."""
        items = self.dataset.by_id()
        distinct = pairs.dropna().drop_duplicates().reset_index(drop=True)
        known = distinct[[bool(items[item].references) for item in distinct["item"]]]
        scores = distinct.assign(**dict.fromkeys((*CAPTION_SCORES, *SEMANTIC_SCORES), np.nan))
        if references is None or known.empty:
            missing.update(dict.fromkeys(CAPTION_SCORES, NO_REFERENCES))
        else:
            found = metrics.score_captions(known["item"].tolist(), known["caption"].tolist(), references)
            scores.loc[known.index, list(CAPTION_SCORES)] = found[list(CAPTION_SCORES)].to_numpy(float)
            missing.update(found.attrs["missing"])
        scenes = [items[item].scene for item in distinct["item"]]
        if any(scenes):
            found = metrics.score_semantics(distinct["caption"].tolist(), scenes)
            scores[list(SEMANTIC_SCORES)] = found[list(SEMANTIC_SCORES)].to_numpy(float)
        return pairs.merge(scores, how="left", on=["item", "caption"])[[*CAPTION_SCORES, *SEMANTIC_SCORES]]


# --- finding --------------------------------------------------------------------------------------


def plan_run(preset: Preset, dataset: Dataset, task: str, n_candidates: int, seed: int, root: Place | None = None,
             weights: Mapping[str, str | None] | None = None, shard_size: int = SHARD_SIZE) -> Run:
    """The run over the given sources, in the folder where it lies or will lie.

    A finished run with more candidates serves, and where weights are not on this machine one with the same settings
    and data.
    """
    root = runs_root() if root is None else root
    run = Run(preset, dataset, task, n_candidates, seed, root, weights_of(preset) if weights is None else weights,
              shard_size)
    identity = run.identity
    slugs = [re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:60].strip("-.") for name in (preset.name, dataset.name)]
    stem, size = f"{slugs[0]}--{slugs[1]}--{task}", f"--n{identity['n']}k{{}}s{seed}--"
    exact = replace(run, folder=root / f"{stem}{size.format(n_candidates)}{_digest(identity)[:8]}")
    if exact.finished:
        return exact
    others = [replace(run, folder=folder) for folder in root.glob(stem + size.format("*") + "*")] if root.is_dir() else []
    serving = [other for other in others if _serves(other._json("run.json").get("identity", {}), identity)
               and other.finished]
    return min(serving, key=lambda other: (other.info()["n_candidates"], other.name), default=exact)


def _serves(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a run's rows answer for another identity: equal, but for more candidates and weights unknown here."""
    same = all(found.get(name) == value for name, value in wanted.items() if name not in ("k", "weights"))
    return same and found.get("k", 0) >= wanted["k"] and all(
        value in (None, found["weights"].get(part)) for part, value in wanted["weights"].items())


# --- writing safely -------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(folder: Place) -> Iterator[None]:
    """Hold a run's folder on this file system; a second command says so and waits. A killed one leaves no lock."""
    if not isinstance(folder, Path):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process works on {folder.name}: waiting", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _disk_errors(folder: Place) -> Iterator[None]:
    """Turn a full disk or a folder without permission into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left in {folder}: make room and run again, finished rows are kept") from error
        if isinstance(error, PermissionError):
            raise UserError(f"{error.filename} cannot be written ({error.strerror}): set COMPENDIUM_RUNS to a folder "
                            "where you may write") from error
        raise
