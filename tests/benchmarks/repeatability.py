"""Do rows depend on the batch, the order, the shards, the workers or a resume? The real models tell.

    python -m tests.benchmarks.repeatability [--preset mini] [--n 12] [--candidates 5]

The same sources are played again and again, each time with one thing changed, and every row is
compared with the first play: captions (all tokens), the selected candidate, pixels, similarities.
Flips are counted. Embeddings are compared by themselves, as parts of vectors of length 1. The exit
status is 1 if anything leaves its tolerance (lib.verify.TOLERANCES). Run by hand; a small version
is in tests/test_verify.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lib import results, roundtrip, verify
from lib.crew import play_in_processes
from lib.datasets import Dataset, load_dataset
from lib.errors import UserError
from lib.players import Models, load_models, reads
from lib.presets import Preset, get_preset
from lib.verify import Check

EMBEDDING_ALLOWED = 1e-5  # a part of a vector of length 1 in float32: sums in another order
loaded = lru_cache(maxsize=3)(load_models)  # one set for each batch size
PARTS = ("captioner", "generator", "encoder", "judge")


@dataclass(frozen=True)
class Variant:
    """One way to play the same sources. batch: of every model, None for the preset's own."""

    name: str
    batch: int | None = None
    shard: int = 32
    shuffled: bool = False
    workers: int = 1
    cut: bool = False


FIRST = Variant("preset's batches, one shard, one worker")
VARIANTS = (
    Variant("the same again"),
    Variant("batches of 1", batch=1),
    Variant("batches of 7", batch=7),
    Variant("batches of 64", batch=64),
    Variant("shards of 1", shard=1),
    Variant("shards of 5", shard=5),
    Variant("shuffled", shuffled=True),
    Variant("shuffled, shards of 5, batches of 7", batch=7, shard=5, shuffled=True),
    Variant("cut off and resumed, shards of 2", shard=2, cut=True),
    Variant("2 workers, shards of 2", shard=2, workers=2),
    Variant("4 workers, shards of 2, shuffled", shard=2, workers=4, shuffled=True),
)


def with_batches(preset: Preset, size: int | None) -> Preset:
    """The preset with another batch size for every model; rows and names stay the same."""
    if size is None:
        return preset
    parts = {name: getattr(preset, name) for name in PARTS if getattr(preset, name) is not None}
    return dataclasses.replace(preset, **{
        name: dataclasses.replace(spec, batch_size=size) for name, spec in parts.items()})


def play(variant: Variant, preset: Preset, dataset: Dataset, task: str, candidates: int,
         root: Path) -> tuple[pd.DataFrame, Callable[[str], Any]]:
    """Rows as played (not scored: scores come from them alone) and what opens their pictures."""
    chosen = with_batches(preset, variant.batch)
    items = list(dataset.items)
    if variant.shuffled:
        random.Random(1).shuffle(items)
    plan = roundtrip.plan_run(chosen, dataclasses.replace(dataset, items=tuple(items)), task, len(items),
                              candidates, preset.seed, root, variant.shard)
    roundtrip.begin(plan)
    if variant.cut:
        roundtrip.play_pending(plan, plan.jobs[:: 2], loaded(chosen), progress=False)
    waiting = roundtrip.pending(plan)
    if variant.workers > 1:
        crew = partial(play_in_processes, workers=variant.workers, load=None)
        roundtrip.play_with_crew(plan, waiting, crew, progress=False)
    else:
        roundtrip.play_pending(plan, waiting, loaded(chosen), progress=False)
    shards = [results.read_table(job.rows_path, results.PLAYED, job.owner) for job in plan.jobs]
    return pa.concat_tables(shards).to_pandas(), plan.run.image


def repeat(variants: Sequence[Variant], preset: Preset, dataset: Dataset, task: str, candidates: int,
           root: Path) -> dict[str, list[Check]]:
    """Play FIRST, then every variant, and compare: variant's name -> checks."""
    kept = play(FIRST, preset, dataset, task, candidates, root / task / "first")
    found = {}
    for number, variant in enumerate(variants):
        began = time.perf_counter()
        again = play(variant, preset, dataset, task, candidates, root / task / str(number))
        found[variant.name] = verify.differences(*kept, *again)
        print(f"  {task}, {variant.name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return found


def embeddings(preset: Preset, dataset: Dataset, sizes: Sequence[int] = (1, 7, 64)) -> list[Check]:
    """The largest difference of a part of an embedding between batch sizes, by encoder and kind."""
    pictures = [item.image() for item in dataset.items]
    texts = [text for item in dataset.items for text in item.references]
    found: dict[str, list[np.ndarray]] = {}
    for size in (None, *sizes):
        models: Models = loaded(with_batches(preset, size))
        for name in ("encoder", "judge"):
            encoder = getattr(models, name)
            for kind, content in (("images", pictures), ("texts", texts)):
                if encoder is not None and content and reads(encoder, kind):
                    vectors = getattr(encoder, f"embed_{kind}")(content)
                    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
                    found.setdefault(f"{name}, {kind}", []).append(vectors)
    return [Check(name, max(float(np.abs(other - first).max()) for other in others),
                  EMBEDDING_ALLOWED, "batches of " + ", ".join(map(str, sizes)))
            for name, (first, *others) in found.items()]


def table(found: dict[str, list[Check]], task: str) -> str:
    """The checks of a task as a Markdown table: a line a variant, a column a check."""
    columns = next(iter(found.values()))
    lines = [f"| {task} reconstruction | " + " | ".join(check.name for check in columns) + " |",
             "|---" * (len(columns) + 1) + "|",
             "| allowed | " + " | ".join(f"{check.allowed:.3g}" for check in columns) + " |"]
    for name, checks in found.items():
        cells = [f"{check.found:.3g}" if check.holds else f"**{check.found:.3g}**" for check in checks]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.repeatability")
    parser.add_argument("--preset", default="mini", help="a name or a .toml file")
    parser.add_argument("--dataset", default="picturebook-coco")
    parser.add_argument("--n", type=int, default=12, help="sources")
    parser.add_argument("--candidates", type=int, default=5)
    flags = parser.parse_args(arguments)
    try:
        preset = get_preset(flags.preset)
        dataset = load_dataset(flags.dataset, flags.n)
        checks = []
        print(f"preset {preset.name}, {len(dataset)} sources of {flags.dataset}, {flags.candidates} "
              f"candidates, {os.cpu_count()} cores\n", flush=True)
        with tempfile.TemporaryDirectory(prefix="repeatability-") as root:
            for task in ("image", "text"):
                found = repeat(VARIANTS, preset, dataset, task, flags.candidates, Path(root))
                checks += [check for some in found.values() for check in some]
                print(table(found, task), end="\n\n", flush=True)
        vectors = embeddings(preset, dataset)
        print("| embeddings | largest difference | allowed |", "|---|---|---|", sep="\n")
        for check in vectors:
            print(f"| {check.name} | {check.found:.3g} | {check.allowed:.3g} |")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wrong = sum(not check.holds for check in [*checks, *vectors])
    print(f"\n{len(checks) + len(vectors)} comparisons, {wrong} outside their tolerance")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
