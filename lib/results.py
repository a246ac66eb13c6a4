"""Rows on disk: their schema, atomic files, run folders, and finding a finished run again.

A run's folder is ``data/runs/<preset>--<dataset>--<task>--n<N>k<K>s<seed>--<hash8>/``. The hash is
over everything that changes a row, so a run with other parameters never mixes with it::

    run.json                what was played, with what, from which commit; counts when finished
    shards/00000.parquet    rows as played, one file for each batch of sources
    baselines/00000.parquet greedy captions of the same sources
    images/<item>/<k>.png   what the generator drew
    rows.parquet            all rows, ranked and scored: what figures and tables read
    baselines.parquet       the baselines, scored
    cost.json               seconds a stage and model passes (differs from time to time)

Files appear under their name only when complete (temporary name, fsync, ``os.replace``), and a
Parquet file's bytes depend on nothing but its rows and the run's hash. All this may also lie in an
object store or wherever else fsspec reaches: what differs there is in ``lib/stores.py``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lib import stores
from lib.errors import UserError, writing_failed
from lib.images import decode_image, open_image
from lib.presets import REPO_ROOT, Preset, canonical_json, preset_hash
from lib.stores import Place, StorePath

SCHEMA = "1"

CAPTION_SCORES = ("bleu1", "bleu2", "bleu3", "bleu4", "cider", "cider_d", "meteor", "rouge_l",
                  "spice_spacy", "spice")
EMBEDDING_SCORES = ("clipscore", "ref_clipscore", "clip_score", "clip_score_judge")
SEMANTIC_SCORES = tuple(f"sem_{kind}_{part}" for kind in ("object", "colour", "relation", "setting")
                        for part in "prf") + ("sem_f",)
SCORES = (*CAPTION_SCORES, *EMBEDDING_SCORES, *SEMANTIC_SCORES)


def _fields(*names: str, kind: pa.DataType) -> list[pa.Field]:
    return [pa.field(name, kind) for name in names]


_TEXT, _REAL = pa.string(), pa.float64()
_IDENTITY = [
    *_fields("run", "task", "dataset", "item", "domain", kind=_TEXT),
    pa.field("candidate", pa.int32()),
    pa.field("seed", pa.int64()),
    *_fields("message", "reconstruction", "source_text", kind=_TEXT),
    pa.field("logprob", _REAL),
    pa.field("n_words", pa.int32()),
    pa.field("flagged", pa.bool_()),
    *_fields("similarity", "similarity_euclidean", "similarity_judge", kind=_REAL),
]
_TRUNCATED = pa.field("truncated", pa.bool_())
_BASELINE = [
    *_fields("run", "task", "dataset", "item", "domain", "kind", "caption", kind=_TEXT),
    pa.field("logprob", _REAL),
    pa.field("n_words", pa.int32()),
]
# As played (shards) and as finished. `truncated`: the prompt did not fit the generator's text
# encoder. Baselines have no reconstruction, hence no similarity.
PLAYED = pa.schema([*_IDENTITY, *_fields(*EMBEDDING_SCORES, kind=_REAL), _TRUNCATED])
ROWS = pa.schema([*_IDENTITY, pa.field("rank", pa.int32()), pa.field("selected", pa.bool_()),
                  *_fields(*SCORES, kind=_REAL), _TRUNCATED])
PLAYED_BASELINES = pa.schema([*_BASELINE, *_fields("clipscore", "ref_clipscore", kind=_REAL)])
BASELINES = pa.schema([*_BASELINE, *_fields(*CAPTION_SCORES, "clipscore", "ref_clipscore",
                                            *SEMANTIC_SCORES, kind=_REAL)])


class DamagedTable(Exception):
    """A Parquet file that cannot be read whole; what it held can be made again."""


# --- atomic files ------------------------------------------------------------------------------


def write_atomic(path: Place, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, force it to disk and rename it.

    Whoever looks sees the old file, the new file or none, never half of one. For a store the
    temporary file lies in this machine's folder for such files. Raises UserError if the disk is
    full or the folder may not be written to.
    """
    if isinstance(path, StorePath):
        _upload(path, write)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            _force_to_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise writing_failed(path, error) from error


def _upload(path: StorePath, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a local file and put it into a store."""
    local = Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / path.name
            write(local)
            path.upload(local)
    except OSError as error:
        raise writing_failed(local, error) from error


def write_bytes(path: Place, data: bytes) -> None:
    """Write bytes atomically."""
    if isinstance(path, StorePath):
        path.write_bytes(data)
        return
    write_atomic(path, lambda temporary: temporary.write_bytes(data) and None)


def write_many(files: Mapping[Any, bytes], scratch: Place) -> None:
    """Write several files, each atomically, by way of the folder ``scratch`` on the same disk.

    Forcing them to disk side by side takes a fraction of the time of one after the other.
    """
    if isinstance(scratch, StorePath):
        stores.write_many(files)
        return
    # Process numbers would not do: two machines that share the folder may have the same.
    temporary = {path: scratch / f"{secrets.token_hex(8)}.tmp" for path in files}
    path = scratch
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        for path, data in files.items():
            temporary[path].write_bytes(data)
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(_force_to_disk, temporary.values()))
        for folder in {path.parent for path in files}:
            folder.mkdir(parents=True, exist_ok=True)
        for path, written in temporary.items():
            os.replace(written, path)
    except OSError as error:
        raise writing_failed(path, error) from error


def _force_to_disk(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def remove_leftovers(run: Place) -> None:
    """Remove temporary files that killed processes left; only for who holds the run's lock."""
    for pattern in (".scratch/*.tmp", ".*.tmp", "shards/.*.tmp", "baselines/.*.tmp"):
        for path in run.glob(pattern):
            path.unlink(missing_ok=True)


def write_json(path: Place, data: Mapping[str, Any]) -> None:
    """Write JSON atomically, with a stable layout."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode("utf-8"))


def read_json(path: Place) -> dict[str, Any] | None:
    """Read a JSON object that we wrote; None if it is absent or damaged.

    Raises UserError if a store does not answer: the file may well be there.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


# --- tables ------------------------------------------------------------------------------------


def to_table(columns: Mapping[str, Any] | pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """Columns (arrays or lists) as an Arrow table of exactly this schema.

    NaN becomes null, for both mean "no value", and readers should find one of them only.
    """
    arrays = [_array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    """One column. A table's column goes over whole: value by value takes ten times as long."""
    if not isinstance(values, pd.Series):
        values = np.asarray(values) if kind == _REAL and not _has_none(values) else list(values)
    array = pa.array(values, type=kind, from_pandas=True)
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _has_none(values: Any) -> bool:
    return any(value is None for value in values)


def table_writer(path: Path, schema: pa.Schema, run_hash: str, **facts: str) -> pq.ParquetWriter:
    """A Parquet writer whose bytes depend only on the rows, the run and ``facts``."""
    metadata = {"run": run_hash, "schema": SCHEMA, **facts}
    return pq.ParquetWriter(path, schema.with_metadata(metadata), compression="zstd",
                            compression_level=3, write_page_checksum=True)


def write_table(path: Place, table: pa.Table, run_hash: str) -> None:
    """Write one table atomically, marked with the hash of its run."""

    def write(temporary: Path) -> None:
        with table_writer(temporary, table.schema, run_hash) as writer:
            writer.write_table(table)

    write_atomic(path, write)


def read_table(path: Place, schema: pa.Schema, run_hash: str | None) -> pa.Table:
    """Read a table and check that it is whole, ours and of this run (None: of any run).

    Raises DamagedTable if it is cut off or its checksums are wrong, UserError if it has another
    schema or belongs to another run.
    """
    try:
        source = pa.BufferReader(path.read_bytes()) if isinstance(path, StorePath) else path
        file = pq.ParquetFile(source, page_checksum_verification=True)
        metadata = file.schema_arrow.metadata or {}
        found = file.schema_arrow.remove_metadata()
        table = file.read() if found.equals(schema) else None
    except UserError:  # a store that does not answer: nothing is known of the table
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        raise DamagedTable(f"{path}: {str(error).splitlines()[0]}") from error
    if table is None or metadata.get(b"schema") != SCHEMA.encode():
        raise UserError(f"{path} has another schema than this program writes: "
                        "move the run's folder away and run again")
    owner = metadata.get(b"run", b"").decode(errors="replace")
    if run_hash is not None and owner != run_hash:
        raise UserError(f"{path} belongs to another run ({owner[:8] or 'unknown'}, not "
                        f"{run_hash[:8]}): move it out of the folder and run again")
    return table.replace_schema_metadata(None)


def marks(path: Place) -> dict[str, str]:
    """The marks that :func:`table_writer` left in a table; none if it is absent or damaged."""
    try:
        with path.open("rb") as stream:
            metadata = pq.read_schema(stream).metadata or {}
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return {}
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in metadata.items()}


# --- runs --------------------------------------------------------------------------------------


def runs_root() -> Place:
    """Where runs lie: ``data/runs``, or the folder or URL that the variable COMPENDIUM_RUNS names.

    Raises UserError for a URL that cannot be used, see :func:`lib.stores.at`.
    """
    return stores.at(os.environ.get("COMPENDIUM_RUNS", REPO_ROOT / "data" / "runs"))


def safe_part(text: str) -> str:
    """A text as one part of a file name: letters, digits, ``._-``; a short hash where that loses
    something, so that two texts never share a name (not even where case is ignored)."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60]
    if slug and slug == text and slug == slug.lower():
        return slug
    return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".lstrip("-")


@dataclass(frozen=True)
class RunKey:
    """Everything that changes a row of a run, and nothing else.

    data: fingerprint of the dataset's subset; models: fingerprints of the weights by part.
    """

    preset: Preset
    dataset: str
    task: str
    n_sources: int
    n_candidates: int
    seed: int
    data: str
    models: Mapping[str, str | None]

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the key; preset_hash leaves out batch sizes and the like."""
        parts = {"schema": SCHEMA, "preset": preset_hash(self.preset), "name": self.preset.name,
                 "dataset": self.dataset, "task": self.task, "n": self.n_sources,
                 "k": self.n_candidates, "seed": self.seed, "data": self.data,
                 "models": dict(self.models)}
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    @property
    def prefix(self) -> str:
        """The readable part of the folder's name."""
        dataset = re.sub(r"[^A-Za-z0-9._-]+", "-", self.dataset)[:60]
        preset = re.sub(r"[^A-Za-z0-9._-]+", "-", self.preset.name)[:40]
        sizes = f"n{self.n_sources}k{self.n_candidates}s{self.seed}"
        return f"{preset}--{dataset}--{self.task}--{sizes}--"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.prefix + self.hash[:8]


@dataclass(frozen=True)
class Run:
    """A run's folder. Cheap to make; reads from disk when asked."""

    path: Place

    @property
    def name(self) -> str:
        """The folder's name, which is also the ``run`` column of its rows."""
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether the rows are all there and scored."""
        return (self.path / "rows.parquet").is_file()

    def info(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        found = read_json(self.path / "run.json")
        if found is None:
            raise UserError(f"{self.path / 'run.json'} is absent or damaged: play the run again")
        return found

    def cost(self) -> dict[str, Any]:
        """Seconds a stage and model passes; empty if they were not kept."""
        return read_json(self.path / "cost.json") or {}

    def rows(self) -> pd.DataFrame:
        """All rows, by source and candidate; missing values are NaN or None."""
        return self._frame("rows.parquet", ROWS)

    def baselines(self) -> pd.DataFrame:
        """Greedy captions of the sources; no rows for text reconstruction."""
        return self._frame("baselines.parquet", BASELINES)

    def _frame(self, name: str, schema: pa.Schema) -> pd.DataFrame:
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{path} is absent: the run is not finished, play it to the end")
        try:
            return read_table(path, schema, None).to_pandas()
        except DamagedTable as error:
            raise UserError(f"{error}: damaged, remove it and play the run again") from error

    def image(self, relative: str) -> Any:
        """Open a picture of this run by the path that a row gives (PIL, RGB)."""
        path = self.path / relative
        if isinstance(path, StorePath):
            inside = path.is_relative_to(self.path) and ".." not in PurePosixPath(relative).parts
        else:
            inside = path.resolve().is_relative_to(self.path.resolve())
        if not inside:
            raise UserError(f"image {relative!r} is not inside the run's folder {self.name}")
        if not path.is_file():
            raise UserError(f"image {path} does not exist: remove rows.parquet and the folder shards of its "
                            "run and play it again")
        if isinstance(path, Path):
            return open_image(path)
        return decode_image(io.BytesIO(path.read_bytes()), str(path))


def find(key: RunKey, weights_known: bool, root: Place) -> Run:
    """The finished run with this key, or UserError that says which notebook makes it.

    Where the weights are not on this machine their fingerprint is unknown, and the newest finished
    run of the same name counts: results can be read where the models cannot run.
    """
    run = Run(root / key.name)
    if run.finished:
        return run
    others = [p for p in root.glob(f"{key.prefix}*") if (p / "rows.parquet").is_file()]
    if others and not weights_known:
        return Run(max(others, key=lambda p: (p / "rows.parquet").stat().st_mtime))
    notebook = {"image": "01_image_reconstruction", "text": "02_text_reconstruction"}[key.task]
    begun = "is not finished" if run.path.is_dir() else "does not exist"
    hint = " (one with other weights, data or settings does)" if others else ""
    raise UserError(f"run {key.name} {begun}{hint}: run notebooks/{notebook}.ipynb with the same "
                    "parameters first, or ./run_all.sh")
