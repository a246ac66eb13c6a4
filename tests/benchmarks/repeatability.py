"""Do rows depend on the batch, the order, the shards or the workers? The real models tell.

    python -m tests.benchmarks.repeatability [--preset mini] [--n 12] [--candidates 5]

The same sources are run again and again, each time with one thing changed, and every row is compared with the first
run: captions (all tokens), the selected candidate, pixels, similarities. Status 1 if a tolerance of
``lib.roundtrip.check`` is left. By hand; a small version is in tests/test_roundtrip_runs.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
from pathlib import Path

import numpy as np

from lib.presets import Preset, load_preset
from lib.roundtrip import Batch, Run, check, open_runs, plan_run

VARIANTS = {  # batch: of every model; shard: sources made together
    "the same again": {}, "batches of 1": {"batch": 1}, "batches of 7": {"batch": 7}, "shards of 1": {"shard": 1},
    "shards of 5": {"shard": 5}, "another order": {"shuffled": True}, "two workers": {"shard": 3, "workers": 2}}


def batched(preset: Preset, size: int | None) -> Preset:
    """The preset with another batch size of every model."""
    parts = {part: getattr(preset, part) for part in ("captioner", "generator", "encoder", "second_encoder")}
    return preset.model_copy(update={part: model.model_copy(update={"batch_size": size})
                                     for part, model in parts.items() if model and size})


def execute(run: Run, root: Path, batch: int | None = None, shard: int = 32, shuffled: bool = False,
            workers: int = 1) -> Run:
    """Run the same sources in a folder of their own, with one thing changed."""
    items = list(run.dataset.items)
    if shuffled:
        random.Random(1).shuffle(items)
    own = plan_run(batched(run.preset, batch), dataclasses.replace(run.dataset, items=tuple(items)), run.task,
                   run.n_candidates, run.seed, root, shard_size=shard)
    return own.execute(workers, progress=False)


def main() -> int:
    """Print every variant's largest differences; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--n", type=int, default=12)
    parser.add_argument("--candidates", type=int, default=5)
    flags, holds = parser.parse_args(), True
    for run in open_runs(flags.preset, load_preset(flags.preset).datasets[0], flags.n, flags.candidates).runs.values():
        with tempfile.TemporaryDirectory() as folder:
            first = execute(run, Path(folder) / "first")
            for name, changes in VARIANTS.items():
                again = execute(run, Path(folder) / name, **changes)
                rows = again.rows()
                shown = rows["reconstruction" if run.task == "image" else "message"].unique()
                images = {path: np.asarray(again.image(path)) for path in shown}
                table = check.compare(first, Batch(rows, again.baselines(), images))
                print(f"\n{run.task}, {name}\n{table.to_string(index=False)}", flush=True)
                holds &= bool(table["holds"].all())
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
