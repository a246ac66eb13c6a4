"""How the game grows: memory, time, bookkeeping, and what writing costs.

    python -m tests.benchmarks.scale memory      # peak memory and time at 100, 300, 1,000 sources
    python -m tests.benchmarks.scale million     # a simulated run of a million sources
    python -m tests.benchmarks.scale overhead    # writing and hashing beside generation (mini)
    python -m tests.benchmarks.scale workers     # one and two workers, the same work (mini)

``memory`` and ``million`` play with stand-in models. Run by hand on a machine with nothing else to
do; small versions that count instead of timing are in tests/test_scale.py.

What the million assumes: the paper's own run, 4 h of captions and 102 h of pictures for 4,500 images
on a T4, is 84.8 s a source of ten candidates; a card 50 times as fast takes 1.7 s. Rows, shards,
listing, resuming and merging are real. No captions are scored and no pictures written: what a
picture takes is measured on a few shards and multiplied.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from lib import results, roundtrip
from lib.cost import PAPER_HOURS, PAPER_SOURCES
from lib.crew import play_in_processes
from lib.datasets import Dataset, load_dataset
from lib.jobs import Job
from lib.players import Models, load_models
from lib.presets import Preset, get_preset
from lib.results import PLAYED, PLAYED_BASELINES
from lib.roundtrip import Plan
from tests.standins import Caption, Drawn, without_weights

CANDIDATES = 10
SECONDS_A_SOURCE = sum(PAPER_HOURS.values()) * 3600 / PAPER_SOURCES / 50
SPAWN = multiprocessing.get_context("spawn")
WORDS = tuple(dict.fromkeys(word for name in ("table", "boat", "street") for word in (
    "a", "the", "red", "old", "small", "near", "under", f"{name}", f"{name}s", f"{name}man")))


# --- stand-ins that make things of real size -----------------------------------------------------


class Talker:
    """Ten words from the seed, so that nearly every caption is another one."""

    def caption(self, images: Sequence[Any], seeds: Sequence[Sequence[int]], decoding: Any) -> list:
        return [[self._one(seed) for seed in row] for row in seeds]

    def _one(self, seed: int) -> Caption:
        words = np.random.default_rng(seed).choice(WORDS, 10)
        return Caption(" ".join(words), -float(seed % 97) / 10, 10)


class Painter:
    """Pictures of 256 x 256 pixels that compress to about what a photograph of this size takes."""

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        pixels = np.stack([self._one(text, seed) for text, seed in zip(texts, seeds, strict=True)])
        return Drawn(pixels, np.zeros(len(texts), bool), np.zeros(len(texts), bool))

    def _one(self, text: str, seed: int) -> np.ndarray:
        rng = np.random.default_rng([seed, len(text), ord(text[0])])
        blocks = rng.integers(0, 248, (64, 64, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        return blocks + rng.integers(0, 8, (256, 256, 3), dtype=np.uint8)


class Looker:
    """768 numbers from a picture's pixels or a text's letters."""

    def embed_images(self, images: Sequence[Any]) -> np.ndarray:
        small = [np.asarray(Image.fromarray(np.asarray(image)).resize((16, 16))) for image in images]
        return np.stack(small).reshape(len(small), 768).astype(np.float32) + 1

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        letters = [np.frombuffer(text.encode()[:768].ljust(768), np.uint8) for text in texts]
        return np.stack(letters).astype(np.float32)


def players() -> Models:
    """A full set of stand-ins."""
    return Models(Talker(), Painter(), Looker(), Looker())


def picture_folder(folder: Path, n: int) -> Path:
    """A folder of n photographs' worth of files: 40 of 640 x 480 pixels under many names."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        name = folder / f"{i:012d}.jpg"
        if i < 40:
            Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize((640, 480)).save(name)
        else:  # a file system allows some 65,000 names for a file
            os.link(folder / f"{i % 40:012d}.jpg", name)
    return folder


def with_captions(dataset: Dataset) -> Dataset:
    """The dataset with five captions for each picture."""
    rng = np.random.default_rng(1)
    items = tuple(dataclasses.replace(item, references=tuple(
        " ".join(rng.choice(WORDS, 10)) for _ in range(5))) for item in dataset.items)
    return dataclasses.replace(dataset, items=items, references={i.id: i.references for i in items})


# --- measuring -----------------------------------------------------------------------------------


def peak_memory() -> float:
    """The most memory (MiB) that this process has held."""
    try:  # ru_maxrss would count the parent's memory at the fork
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """Seconds by the clock and of this process's processors, for a block."""

    wall = cpu = 0.0

    def __enter__(self) -> Clock:
        self.wall, self.cpu = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def in_child(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns, called in a process of its own, so that its memory is its own."""
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_answer, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{work.__name__} failed in its process") from None
    finally:
        process.join()


def _answer(sender: Any, work: Callable[..., Any], arguments: tuple) -> None:
    sender.send(work(*arguments))


def size_of(*patterns: Iterator[Path]) -> int:
    """Bytes of files."""
    return sum(path.stat().st_size for pattern in patterns for path in pattern)


def mega(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


# --- memory and time -----------------------------------------------------------------------------


def play_and_weigh(folder: Path, n: int, captions: bool) -> dict[str, Any]:
    """Play and score n sources; times, peak memory before and after scoring, bytes of pictures."""
    dataset = load_dataset(f"folder:{folder}", n)
    if captions:
        dataset = with_captions(dataset)
    preset = without_weights(get_preset("mini"))
    with tempfile.TemporaryDirectory(prefix="scale-") as root:
        plan = roundtrip.plan_run(preset, dataset, "image", n, CANDIDATES, 0, Path(root))
        roundtrip.begin(plan)
        play, score = Clock(), Clock()
        with play:
            roundtrip.play_pending(plan, roundtrip.pending(plan), players(), progress=False)
        held = peak_memory()
        with score:
            roundtrip.finish(plan)
        return {"play": play, "score": score, "held": held, "peak": peak_memory(),
                "rows": plan.run.info()["counts"]["rows"],
                "bytes": size_of(plan.run.path.glob("images/*/*.png"))}


def memory(sizes: Sequence[int], captions: bool) -> None:
    """Print peak memory and time for each number of sources."""
    print("| sources | rows | playing: s | CPU ms a source | peak MiB | scoring: s | CPU ms a source "
          "| peak MiB | pictures |", "|---" * 9 + "|", sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="scale-") as place:
        folder = picture_folder(Path(place) / "pictures", max(sizes))
        for n in sizes:
            found = in_child(play_and_weigh, folder, n, captions)
            play, score = found["play"], found["score"]
            print(f"| {n:,} | {found['rows']:,} | {play.wall:.1f} | {play.cpu / n * 1000:.1f} "
                  f"| {found['held']:.0f} | {score.wall:.1f} | {score.cpu / n * 1000:.1f} "
                  f"| {found['peak']:.0f} | {mega(found['bytes'])} |", flush=True)


# --- a million -----------------------------------------------------------------------------------


class Ledger:
    """Seconds by stage, printed as they come; those of the simulation itself are kept apart."""

    def __init__(self, sources: int) -> None:
        self.sources, self.seconds = sources, dict[str, float]()

    @contextmanager
    def stage(self, name: str, counts: bool = True) -> Iterator[None]:
        with Clock() as clock:
            yield
        if counts:
            self.seconds[name] = clock.wall
        share = f"{clock.wall / (self.sources * SECONDS_A_SOURCE):.4%}" if counts else "not counted"
        print(f"| {name} | {clock.wall:.1f} | {clock.cpu:.1f} | {share} |", flush=True)


def played_shard(job: Job, rows: pa.Table, baselines: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows as a game leaves them: played ones of another shard under this shard's names."""
    ids = [item.id for item in job.shard.items]
    grid = [item for item in ids for _ in range(CANDIDATES)]
    rng, texts = np.random.default_rng(job.index), rows["message"].to_pylist()
    columns = {"item": grid, "seed": job.shard.seeds("caption"), "similarity": rng.random(len(grid)),
               "message": [f"{i} {text}" for i, text in zip(grid, texts, strict=False)]}
    rows = rows.slice(0, len(grid))
    for name, values in columns.items():
        place = PLAYED.get_field_index(name)
        rows = rows.set_column(place, PLAYED.field(place), pa.array(values, PLAYED.field(place).type))
    place = PLAYED_BASELINES.get_field_index("item")
    baselines = baselines.slice(0, len(ids)).set_column(
        place, PLAYED_BASELINES.field(place), pa.array(ids))
    return rows, baselines


def simulate(jobs: Sequence[Job], rows: pa.Table, baselines: pa.Table) -> None:
    """Put the shards on disk with the true layout and bytes, but without forcing them to disk."""
    for job in jobs:
        tables = zip((job.rows_path, job.baselines_path), played_shard(job, rows, baselines), strict=True)
        for path, table in tables:
            with results.table_writer(path, table.schema, job.owner) as writer:
                writer.write_table(table)


def bookkeeping(plan: Plan, ledger: Ledger, workers: int = 2) -> int:
    """Everything around the game for a plan: begin, resume at the half, resume, merge, open again.

    Returns the rows of the finished table; pictures are left out.
    """
    with ledger.stage("shards: listing"):
        jobs = plan.jobs
    with ledger.stage("run.json"):
        roundtrip.begin(plan)
    sample = jobs[0].play(players())
    for folder in ("shards", "baselines"):
        (plan.run.path / folder).mkdir()
    half = len(jobs) // 2
    with ledger.stage("the simulated game: writing half of the shards", counts=False):
        shares = [jobs[:half][i::workers] for i in range(workers)]
        processes = [SPAWN.Process(target=simulate, args=(share, sample.rows, sample.baselines))
                     for share in shares]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    with ledger.stage("resuming after half of it: reading and checking every shard"):
        waiting = roundtrip.pending(plan)
    assert len(waiting) == len(jobs) - half
    with ledger.stage("the simulated game: the other half", counts=False):
        simulate(waiting, sample.rows, sample.baselines)
    with ledger.stage("merging: reading, ranking, writing rows.parquet and baselines.parquet"):
        roundtrip.finish(plan)
    with ledger.stage("opening a finished run"):
        assert roundtrip.play(plan.key.preset, plan.dataset, "image", len(plan.dataset), CANDIDATES, 0,
                              root=plan.run.path.parent, progress=False) == plan.run
    return plan.run.info()["counts"]["rows"]


def writing(plan: Plan, ledger: Ledger, shards: int = 2) -> None:
    """What the true writing of shards with their pictures takes, from a few of them."""
    jobs = plan.jobs[:shards]
    played = [job.play(players()) for job in jobs]
    with tempfile.TemporaryDirectory(prefix="scale-", dir=plan.run.path.parent) as place:
        moved = [dataclasses.replace(job, folder=Path(place)) for job in jobs]
        began = time.perf_counter()
        for job, rows in zip(moved, played, strict=True):
            job.publish(rows)
        seconds = (time.perf_counter() - began) / sum(len(job.shard.items) for job in jobs)
        pictures = list(Path(place).glob("images/*/*.png"))
        each = size_of(iter(pictures)) / len(pictures)
    print(f"| writing shards with pictures, from {shards} shards, beside the game | "
          f"{seconds * ledger.sources:.0f} | | {seconds / SECONDS_A_SOURCE:.4%} |")
    files = ledger.sources * CANDIDATES
    print(f"\npictures, not written: {files:,} files of {each / 1000:.0f} kB, {mega(files * each)}")


def million(sources: int) -> None:
    """Simulate a run of so many sources in a temporary folder and print where the time goes."""
    ledger = Ledger(sources)
    whole = sources * SECONDS_A_SOURCE
    print(f"{sources:,} sources, {CANDIDATES} candidates each; assumed {SECONDS_A_SOURCE:.2f} s a source, "
          f"{whole / 86400:.1f} days of one card\n\n| stage | s | of processors | share |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="scale-") as place:
        with ledger.stage("a folder of pictures", counts=False):
            folder = picture_folder(Path(place) / "pictures", sources)
        with ledger.stage("listing the sources of the folder"):
            dataset = load_dataset(f"folder:{folder}")
        with ledger.stage("drawing the subset, hashing what changes rows"):
            plan = roundtrip.plan_run(without_weights(get_preset("mini")), dataset, "image", sources,
                                      CANDIDATES, 0, Path(place) / "runs")
        rows = bookkeeping(plan, ledger)
        total = sum(ledger.seconds.values())
        print(f"| **all bookkeeping** | **{total:.1f}** | | **{total / whole:.4%}** |")
        writing(plan, ledger)
        print(f"rows: {rows:,} in {len(plan.jobs):,} shards: "
              f"{mega(size_of(plan.run.path.glob('shards/*')))} of shards, "
              f"{mega(size_of(plan.run.path.glob('baselines/*')))} of baselines, "
              f"{mega(size_of(plan.run.path.glob('*.parquet')))} of finished tables")
        print(f"peak memory {peak_memory():.0f} MiB; bookkeeping is 1 % of the time of "
              f"{whole / 100 / total:.0f} cards at work together")


# --- the mini models -----------------------------------------------------------------------------


def overhead(preset: Preset, n: int) -> None:
    """Print what writing and hashing take beside the game of real models, one after the other."""
    print("| task | generation s | all models s | planning, hashing s | writing s | of generation | of all |",
          "|---" * 7 + "|", sep="\n", flush=True)
    models = load_models(preset)
    for task in ("image", "text"):
        with tempfile.TemporaryDirectory(prefix="scale-") as root:
            began = time.perf_counter()
            plan = roundtrip.plan_run(preset, "picturebook-coco", task, n, CANDIDATES, 0, Path(root))
            roundtrip.begin(plan)
            waiting = roundtrip.pending(plan)
            planning = time.perf_counter() - began
            generation = models_time = written = 0.0
            for job in waiting:
                began = time.perf_counter()
                played = job.play(models)
                models_time += time.perf_counter() - began
                generation += played.cost.seconds["generate"]
                began = time.perf_counter()
                job.publish(played)
                results.write_json(plan.run.path / "cost.json", played.cost.as_dict())
                written += time.perf_counter() - began
            extra = planning + written
            print(f"| {task} | {generation:.2f} | {models_time:.2f} | {planning:.2f} | {written:.2f} "
                  f"| {extra / generation:.1%} | {extra / models_time:.1%} |", flush=True)
    print(f"\n{n} sources; planning is once a run; while one process plays, a thread writes beside it")


def play_with(preset: Preset, n: int, workers: int, root: Path) -> tuple[float, int]:
    """Play (not score) n sources; seconds with the loading of the models, and rows."""
    plan = roundtrip.plan_run(preset, "picturebook-coco", "image", n, CANDIDATES, 0, root, shard_size=4)
    roundtrip.begin(plan)
    began = time.perf_counter()
    if workers == 1:
        roundtrip.play_pending(plan, plan.jobs, load_models(preset), progress=False)
    else:
        crew = partial(play_in_processes, workers=workers, load=None)
        roundtrip.play_with_crew(plan, plan.jobs, crew, progress=False)
    seconds = time.perf_counter() - began
    rows = [results.read_table(job.rows_path, PLAYED, job.owner) for job in plan.jobs]
    return seconds, pa.concat_tables(rows).num_rows


def workers(preset: Preset, n: int, counts: Sequence[int]) -> None:
    """Print how long the same work takes so many workers."""
    print("| workers | threads each | s, loading included | s a source | rows |", "|---" * 5 + "|", sep="\n")
    cores = os.cpu_count() or 1
    ways = [(1, cores), (1, 1), *((count, max(1, cores // count)) for count in counts if count > 1)]
    for count, threads in ways:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        with tempfile.TemporaryDirectory(prefix="scale-") as root:
            seconds, rows = in_child(play_with, preset, n, count, Path(root))
        print(f"| {count} | {threads} | {seconds:.1f} | {seconds / n:.2f} | {rows} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale")
    parser.add_argument("what", choices=("memory", "million", "overhead", "workers"))
    parser.add_argument("--sources", help="how many; for memory a list such as 100,1000")
    parser.add_argument("--captions", action="store_true", help="memory: five captions a source, scored")
    parser.add_argument("--preset", default="mini", help="overhead, workers: a name or a .toml file")
    flags = parser.parse_args(arguments)
    if flags.what == "memory":
        memory([int(n) for n in (flags.sources or "100,300,1000").split(",")], flags.captions)
    elif flags.what == "million":
        million(int(flags.sources or 1_000_000))
    elif flags.what == "overhead":
        overhead(get_preset(flags.preset), int(flags.sources or 40))
    else:
        workers(get_preset(flags.preset), int(flags.sources or 40), (1, 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
