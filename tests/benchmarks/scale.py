"""How a run grows: peak memory and time at 100, 300 and 1,000 sources, and what writing and resuming take.

    python -m tests.benchmarks.scale [--sources 100 300 1000]

Stand-in models make ten captions of ten words and ten images of 256 x 256 pixels a source, of the size of photographs
as PNG. No captions are scored. Each size runs in a process of its own. By hand, on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from lib.data import load_dataset
from lib.models import Caption, Images, Models
from lib.roundtrip import plan_run
from tests.standins import ColourEncoder, paint, preset

WORDS = tuple("a the red old small near under table tables boat boats street man woman dog".split())


class Talker:
    """Ten words from the seed, so that nearly every caption is another one."""

    def caption(self, images, seeds, decoding):
        return [[Caption(" ".join(np.random.default_rng(seed).choice(WORDS, 10)), -1.0, 10) for seed in row]
                for row in seeds]


class Painter:
    """Images of 256 x 256 pixels that compress to about what a photograph of this size takes."""

    def generate(self, texts, seeds):
        coarse = [np.random.default_rng([seed, len(text)]).integers(0, 256, (128, 128, 3), np.uint8)
                  for text, seed in zip(texts, seeds, strict=True)]
        pixels = np.stack(coarse).repeat(2, axis=1).repeat(2, axis=2)
        return Images(pixels, np.zeros(len(texts), bool), np.zeros(len(texts), bool))


def measure(n: int) -> None:
    """Run n sources, then look at the finished shards again; print seconds, memory and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = load_dataset(paint(Path(folder) / "images", n))
        run = plan_run(preset(), dataset, "image", 10, 0, Path(folder) / "runs")
        begun = time.perf_counter()
        run.execute(models=Models(Talker(), Painter(), ColourEncoder(), ColourEncoder(0.8)), progress=False)
        took, begun = time.perf_counter() - begun, time.perf_counter()
        assert all(shard.path("shards").is_file() for shard in run.shards())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file()) / 2**20
        resuming = time.perf_counter() - begun
        print(f"{n:7,} sources: {took:7.1f} s ({1000 * took / n:.0f} ms a source), resuming {resuming:.2f} s, "
              f"peak {peak:,.0f} MiB, {size:,.0f} MiB on disk", flush=True)


def main() -> None:
    """Measure every size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, nargs="+", default=[100, 300, 1000])
    for n in parser.parse_args().sources:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(n,))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
