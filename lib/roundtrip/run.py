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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm
from upath import UPath

from lib import metrics, ranking
from lib.base import ROOT, UserError, folder_setting, write_atomic
from lib.data import Dataset, Item, decode_image
from lib.metrics import CAPTION_SCORES, SEMANTIC_SCORES
from lib.presets import Preset, row_settings
from lib.roundtrip import provenance
from lib.roundtrip.steps import Batch, Cost, Tick, round_trip
from lib.roundtrip.workers import make_shards

if TYPE_CHECKING:
    from lib.models import Models

SHARD_SIZE = 32  # sources made, written and resumed together
SCORED_TOGETHER = 256  # sources: enough to share the start of Java, few enough to keep memory flat
NO_REFERENCES = "the dataset has no reference captions"
Place = Path | UPath

# --- tables ---------------------------------------------------------------------------------------

_IDENTITY = ("run", "task", "dataset", "item", "domain")
_MADE = (*_IDENTITY, "candidate", "seed", "message", "reconstruction", "source_text", "logprob", "n_words", "flagged",
         "similarity", "similarity_euclidean", "similarity_second")
_CLIP = ("clipscore", "ref_clipscore", "clip_score", "clip_score_second")
SHARD_COLUMNS = (*_MADE, *_CLIP, "truncated")
ROW_COLUMNS = (*_MADE, "rank", "selected", *CAPTION_SCORES, *_CLIP, *SEMANTIC_SCORES, "truncated")
GREEDY_COLUMNS = (*_IDENTITY, "kind", "caption", "logprob", "n_words", *_CLIP[:2])
BASELINE_COLUMNS = (*GREEDY_COLUMNS[:-2], *CAPTION_SCORES, *_CLIP[:2], *SEMANTIC_SCORES)
_KINDS = {"candidate": pa.int32(), "seed": pa.int64(), "n_words": pa.int32(), "rank": pa.int32(), "flagged": pa.bool_(),
          "selected": pa.bool_(), "truncated": pa.bool_()} | dict.fromkeys(
    (*_IDENTITY, "message", "reconstruction", "source_text", "kind", "caption"), pa.string())


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


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


# --- one batch of sources -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shard:
    """A batch of a run's sources and where its files go. Small, so that it can be sent to another process."""

    index: int
    items: tuple[Item, ...]
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
            list(pool.map(lambda name: write_atomic(self.folder / name, _png(batch.images[name])), batch.images))
        if self.task == "image":
            write_table(self.path("baselines"), batch.baselines.assign(run=self.folder.name), GREEDY_COLUMNS)
        write_table(self.path("shards"), batch.rows.assign(run=self.folder.name), SHARD_COLUMNS)
        return batch.cost

    def done(self) -> bool:
        """Whether its files are there and whole; a damaged one is named and made again."""
        for kind, each in {"shards": self.n_candidates, "baselines": 1}.items():
            try:
                if (kind == "shards" or self.task == "image") and read_table(self.path(kind))["item"].tolist() != [
                        item.id for item in self.items for _ in range(each)]:
                    return False
            except FileNotFoundError:
                return False
            except (pa.ArrowException, OSError) as error:
                print(f"{self.path(kind)} is damaged, and made again: {error}", file=sys.stderr, flush=True)
                return False
        return True


# --- a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One preset, dataset, task, K and seed, and the folder of its files. Reads from disk when asked.

    dataset: the drawn sources; n_candidates: K, perhaps fewer than the folder has (row k does not depend on K);
    weights: what identifies them, see :func:`weights_of`.
    """

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
        """All that changes a row, and nothing else. Revisions are left out of the settings: weights hold them."""
        settings = row_settings(self.preset)
        settings = {name: {key: inner for key, inner in value.items() if not key.endswith("revision")}
                    if isinstance(value, dict) else value for name, value in settings.items()}
        return {"settings": _digest(settings), "data": self.dataset.fingerprint, "weights": dict(self.weights),
                "dataset": self.dataset.name, "task": self.task, "n": len(self.dataset), "k": self.n_candidates,
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
        """What ``run.json`` says; empty before the run is begun."""
        return self._json("run.json")

    def cost(self) -> dict[str, Any]:
        """Sums over all sittings and workers: sources, captions, images, wall (s), and a dict of seconds by stage."""
        flat, mark = self._json("cost.json"), "seconds: "
        seconds = {key.removeprefix(mark): flat.pop(key) for key in list(flat) if key.startswith(mark)}
        return flat | {"seconds": seconds}

    def rows(self) -> pd.DataFrame:
        """All rows by source and candidate, ranked among this run's K; missing values are NaN or None."""
        rows = self._table("rows.parquet")
        if self.n_candidates < self.info()["n_candidates"]:
            rows = ranked(rows[rows["candidate"] < self.n_candidates].reset_index(drop=True))
        return rows

    def baselines(self) -> pd.DataFrame:
        """Greedy captions of the sources; no rows in text reconstruction."""
        return self._table("baselines.parquet")

    def image(self, name: str) -> Image.Image:
        """The generated image of a row (RGB), by the path in its column message or reconstruction."""
        try:
            return decode_image((self.folder / name).read_bytes(), name)
        except FileNotFoundError as error:
            raise UserError(f"{self.folder / name} is absent: remove rows.parquet and the folder shards beside it and "
                            "execute the run again") from error

    def _table(self, name: str) -> pd.DataFrame:
        if not self.finished:
            notebook = {"image": "01_image_reconstruction", "text": "02_text_reconstruction"}[self.task]
            raise UserError(f"run {self.name} is not finished: execute notebooks/{notebook}.ipynb with the same "
                            "parameters first, or ./run_all.sh")
        try:
            return read_table(self.folder / name)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.folder / name} is damaged, remove it and execute the run again: {error}") from error

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

    def _write_json(self, name: str, data: Mapping[str, Any]) -> None:
        write_atomic(self.folder / name, json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    # executing

    def shards(self) -> list[Shard]:
        """The sources in batches; a run keeps the size that it was begun with."""
        size, items = self.info().get("shard_size", self.shard_size), self.dataset.items
        return [Shard(i, items[start : start + size], self.folder, self.preset, self.dataset.name, self.task,
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
        with _guarded(run.folder):
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
        missing = [name for name, reason in self.info().get("missing_scores", {}).items() if reason != NO_REFERENCES]
        return bool(missing) and any(reason is None for name, reason in metrics.available().items() if name in missing)

    def _begin(self) -> None:
        """Write ``run.json`` before the first shard; the record of a begun run stays."""
        for path in self.folder.rglob(".*.tmp") if isinstance(self.folder, Path) else ():
            path.unlink(missing_ok=True)  # what killed processes left; the lock is ours
        if self.info().get("identity") == self.identity:
            return
        facts = {"name": self.dataset.name, "sources": len(self.dataset), "split_size": len(self.dataset.references),
                 "notes": list(self.dataset.notes), "absent": len(self.dataset.absent)}
        self._write_json("run.json", {
            "run": self.name, "task": self.task, "dataset": facts, "n_candidates": self.n_candidates, "seed": self.seed,
            "shard_size": self.shard_size, "identity": self.identity, "preset": self.preset.model_dump(mode="json"),
            "made_by": provenance.collect()})

    def _make(self, workers: int, engine: str, models: Any, progress: bool) -> None:
        """Make the shards that are not done, and keep what they cost."""
        waiting = [shard for shard in self.shards() if not shard.done()]
        if not waiting:
            return
        self.dataset.check_images()
        cost = Cost(self._json("cost.json"))
        begun = time.perf_counter() - cost["wall"]

        def done(spent: Cost) -> None:
            cost.update(spent)
            cost["wall"] = time.perf_counter() - begun
            self._write_json("cost.json", {name: round(value, 3) for name, value in cost.items()})

        terminal, k = sys.stderr.isatty(), self.n_candidates
        with tqdm(total=k * len(self.dataset), initial=k * (len(self.dataset) - sum(len(s.items) for s in waiting)),
                  desc=self.name, unit="row", disable=not progress, mininterval=0.5 if terminal else 10, maxinterval=10,
                  bar_format=None if terminal else "{desc}: {n_fmt} of {total_fmt}, {elapsed} < {remaining}\n") as bar:
            tick: Tick = lambda rows: bar.update(rows) if rows or not terminal else bar.refresh()  # noqa: E731
            loaded = make_shards(waiting, workers, engine, models, self.preset, done, tick)
        self._write_json("run.json", self.info() | {"loaded": loaded})

    # ranking and scoring

    def _score(self, progress: bool) -> None:
        """Rank and score all shards into the two tables, then write the counts that make the run finished."""
        if progress:
            print(f"scoring {self.name}", file=sys.stderr, flush=True)
        references = metrics.References.build(self.dataset.references) if self.dataset.references else None
        cost, missing, shards = Cost(self._json("cost.json")), {}, self.shards()
        together = max(1, SCORED_TOGETHER // len(shards[0].items))
        with cost.stage("score"):
            parts = [self._score_part(shards[start : start + together], references, missing)
                     for start in range(0, len(shards), together)]
        rows, baselines = (pd.concat(part, ignore_index=True) for part in zip(*parts, strict=True))
        write_table(self.folder / "baselines.parquet", baselines, BASELINE_COLUMNS)
        write_table(self.folder / "rows.parquet", rows, ROW_COLUMNS)
        self._write_json("cost.json", {name: round(value, 3) for name, value in cost.items()})
        flagged = rows.loc[rows["flagged"], "item"]
        counts = {"rows": len(rows), "flagged": len(flagged), "flagged_sources": flagged.nunique(),
                  "truncated_prompts": int(rows["truncated"].sum())}
        self._write_json("run.json", self.info() | {"counts": counts, "missing_scores": missing})

    def _score_part(self, shards: Sequence[Shard], references: Any, missing: dict[str, str]) -> list[pd.DataFrame]:
        """Rows and baselines of some shards with every score; adds to missing {metric: reason}."""
        rows = ranked(pd.concat([read_table(shard.path("shards")) for shard in shards], ignore_index=True))
        greedy = [read_table(shard.path("baselines")) for shard in shards if self.task == "image"]
        baselines = pd.concat(greedy or [pd.DataFrame(columns=list(GREEDY_COLUMNS))], ignore_index=True)
        said = rows["message" if self.task == "image" else "reconstruction"].where(~rows["flagged"])
        pairs = pd.concat([rows[["item"]].assign(caption=said), baselines[["item", "caption"]]], ignore_index=True)
        scores = self._score_pairs(pairs, references, missing)
        return [rows.join(scores[: len(rows)]), baselines.join(scores[len(rows):].reset_index(drop=True))]

    def _score_pairs(self, pairs: pd.DataFrame, references: Any, missing: dict[str, str]) -> pd.DataFrame:
        """Every score of (item, caption) pairs, each distinct one scored once; null where it cannot be had."""
        items = self.dataset.by_id()
        distinct = pairs.dropna().drop_duplicates().reset_index(drop=True)
        scores = distinct.reindex(columns=[*distinct, *CAPTION_SCORES, *SEMANTIC_SCORES])
        known = distinct[[bool(items[item].references) for item in distinct["item"]]]
        if references is None or known.empty:
            missing |= dict.fromkeys(CAPTION_SCORES, NO_REFERENCES)
        else:
            found = metrics.score_captions(known["item"].tolist(), known["caption"].tolist(), references)
            scores.loc[known.index, list(CAPTION_SCORES)] = found[list(CAPTION_SCORES)].to_numpy(float)
            missing |= found.attrs["missing"]
        scenes = [items[item].scene for item in distinct["item"]]
        if any(scenes):
            found = metrics.score_semantics(distinct["caption"].tolist(), scenes)
            scores[list(SEMANTIC_SCORES)] = found[list(SEMANTIC_SCORES)].to_numpy(float)
        return pairs.merge(scores, how="left", on=["item", "caption"])[[*CAPTION_SCORES, *SEMANTIC_SCORES]]


# --- finding --------------------------------------------------------------------------------------


def runs_root() -> Place:
    """Where runs lie: ``data/runs``, or the folder or URL that COMPENDIUM_RUNS names."""
    root = folder_setting("COMPENDIUM_RUNS", ROOT / "data" / "runs")
    return Path(root.path) if isinstance(root, UPath) and root.protocol in ("", "file", "local") else root


def weights_of(preset: Preset) -> dict[str, str | None]:
    """What identifies the weights of each model by part: a content hash or id@revision; None where unknown."""
    from lib.models import weights_fingerprint

    parts = ("captioner", "generator", "encoder", "second_encoder")
    return {part: weights_fingerprint(getattr(preset, part)) for part in parts if getattr(preset, part) is not None}


def plan_run(preset: Preset, dataset: Dataset, task: str, n_candidates: int, seed: int, root: Place | None = None,
             weights: Mapping[str, str | None] | None = None, shard_size: int = SHARD_SIZE) -> Run:
    """The run over the given sources, in the folder where it lies or will lie.

    A finished run with more candidates serves, and where weights are not on this machine one with the same settings
    and data.
    """
    root = runs_root() if root is None else root
    run = Run(preset, dataset, task, n_candidates, seed, root, weights or weights_of(preset), shard_size)
    identity = run.identity
    parts = (preset.name, dataset.name, task)
    stem = "--".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part)[:60].strip("-.") for part in parts)
    exact = replace(run, folder=root / f"{stem}--n{len(dataset)}k{n_candidates}s{seed}--{_digest(identity)[:8]}")
    if exact.finished or not root.is_dir():
        return exact
    others = [replace(run, folder=folder) for folder in root.glob(f"{stem}--n{len(dataset)}k*s{seed}--*")]
    serving = [other for other in others if other.finished and _serves(other.info()["identity"], identity)]
    return min(serving, key=lambda other: (other.info()["n_candidates"], other.name), default=exact)


def _serves(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a run's rows answer for another identity: equal, but for more candidates and weights unknown here."""
    same = all(found[name] == value for name, value in wanted.items() if name not in ("k", "weights"))
    return same and found["k"] >= wanted["k"] and all(
        value in (None, found["weights"].get(part)) for part, value in wanted["weights"].items())


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _guarded(folder: Place) -> Iterator[None]:
    """Hold a run's folder, where it is no store, and turn a full or forbidden disk into one line.

    A second command on the same run says so and waits. The lock is the kernel's: a killed process leaves none.
    """
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(folder, Path):
                folder.mkdir(parents=True, exist_ok=True)
                lock = FileLock(folder / ".lock")
                try:
                    stack.enter_context(lock.acquire(timeout=0))
                except Timeout:
                    print(f"another process works on {folder.name}: waiting", file=sys.stderr, flush=True)
                    stack.enter_context(lock)
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left in {folder}: make room and run again, finished rows are kept") from error
        if error.errno in (errno.EACCES, errno.EROFS):
            raise UserError(f"{error.filename or folder} cannot be written ({error.strerror}): set COMPENDIUM_RUNS to "
                            "a folder where you may write") from error
        raise
