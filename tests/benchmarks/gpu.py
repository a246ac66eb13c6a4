"""Speed at paper scale with random weights (speed does not depend on them), and where it comes from.

    python -m tests.benchmarks.gpu [--out gpu.md] [--models FOLDER] [--sources 4] [--steps 50] [--size 512]

Three arms do equal work on the same sources: a loop over single images with the libraries' defaults,
as their pages show it; a strong loop written by hand, in batches and half precision; ours. Each
source gets K captions of a fixed length, each caption one picture, each picture one embedding. Then
each lever is measured by itself (``gpu_levers``); the arms' tables are written before that. The peak
is the fastest large matrix product of the same run and number type; a share of it is (FLOP that the
work needs / peak) / seconds. FLOP a row are counted by torch; a network's rows are those of the
leanest arm, so that no arm gains by waste. Out of memory: a smaller ``--batch``.

On a GPU the defaults are the paper's full size; on a CPU everything is small and proves only that
the script runs.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib.hardware import pick_device
from lib.presets import Preset, get_preset
from lib.provenance import commit, device_name, versions
from tests.benchmarks import gpu_levers
from tests.benchmarks.gpu_arms import STAGE_OF, STAGES, Arm, Batched, Clock, Documented, Ours, Work
from tests.full_size import build_all

# Floors of the paper's networks, TFLOP a pass of one row (2 x multiply-add), by size of the picture.
FLOORS = {"denoiser": {256: 0.180, 512: 0.803}, "image decoder": {256: 0.622, 512: 2.515},
          "images": {256: 0.162, 512: 0.162}, "image encoder": {256: 0.382, 512: 0.382}}

# --- measuring ---------------------------------------------------------------------------------

def peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second of the fastest of several large matrix products."""
    n, repeats = (8192, 20) if device.type == "cuda" else (384, 5)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    clock, best = Clock(device), 0.0
    for _ in range(repeats):
        start = clock.now()
        a @ b
        best = max(best, 2 * n**3 / (clock.now() - start))
    return best


@dataclass(frozen=True)
class Result:
    """One arm: median seconds by stage and in all, rows by network of one round, number types."""

    name: str
    seconds: dict[str, float]
    total: float
    rows: dict[str, int]
    dtypes: dict[str, torch.dtype]

    def share(self, stage: str) -> float:
        """Part of the whole time; "rest" is what no stage took."""
        return (self.total - sum(self.seconds.values()) if stage == "rest"
                else self.seconds[stage]) / self.total


@dataclass(frozen=True)
class Report:
    """All that was measured."""

    work: Work
    device: str
    results: tuple[Result, ...]
    flop_a_row: dict[str, float]
    peaks: dict[torch.dtype, float]
    levers: tuple[Any, ...] = ()
    profile: str = ""

    def needed(self, stage: str) -> float:
        """FLOP that a stage needs for all sources: the leanest arm's rows of each network."""
        return sum(per_row * min(result.rows[name] for result in self.results)
                   for name, per_row in self.flop_a_row.items() if STAGE_OF[name] == stage)

    def fraction(self, result: Result, stages: Sequence[str] = STAGES) -> float:
        """Seconds at the peak of the arm's own number types / seconds measured, one stage or all."""
        ideal = sum(self.needed(stage) / self.peaks[result.dtypes[stage]] for stage in stages)
        return ideal / (result.total if len(stages) > 1 else result.seconds[stages[0]])


def release() -> None:
    """Give back the memory of models that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def play_round(arm: Arm, photos: Sequence[Image.Image]) -> tuple[Clock, float]:
    """One game by one arm: seconds by stage and in all."""
    clock = Clock(arm.device)
    start = clock.now()
    vectors = arm.play(photos, clock)
    total = clock.now() - start
    if vectors.shape[0] != len(photos) * arm.work.candidates or not np.isfinite(vectors).all():
        raise RuntimeError(f"{arm.name}: {vectors.shape} embeddings, or some are not finite")
    return clock, total


def race(kinds: Sequence[type[Arm]], preset: Preset, work: Work, device: torch.device,
         rounds: int) -> tuple[list[Result], Arm]:
    """Let the arms play one after the other, each alone on the device, so that a small card holds it.

    Returns their results, and the last arm with its models.
    """
    photos, results = work.photos(), []
    for kind in kinds:
        arm = None  # the one before gives its memory back before the next is loaded
        release()
        arm = kind(preset, work, device)
        play_round(arm, photos)  # warm up: libraries choose their algorithms by trial
        before = arm.rows()
        timed = [play_round(arm, photos) for _ in range(rounds)]
        clock, total = sorted(timed, key=lambda one: one[1])[rounds // 2]  # the median round, whole
        rows = {name: (n - before[name]) // rounds for name, n in arm.rows().items()}
        results.append(Result(arm.name, dict(clock.seconds), total, rows, arm.dtypes))
        print(f"{arm.name}: {total:.1f} s a round", file=sys.stderr, flush=True)
    return results, arm


def prepare(folder: Path, work: Work) -> Preset:
    """Build the models (or take those of an earlier call) and a preset that asks for this work."""
    file = folder / "full-size-random.toml"
    preset = get_preset(file if file.is_file() else build_all(folder, work.width))
    side = min(preset.generator.output_size, work.size)
    return replace(
        preset, captioner=replace(preset.captioner, sender=work.decoding()),
        generator=replace(preset.generator, steps=work.steps, size=work.size, output_size=side,
                          batch_size=work.batch, safety_checker=False))


def measure(work: Work, device: torch.device, folder: Path, rounds: int, levers: bool,
            compiling: bool, tell: Callable[[Report], None]) -> Report:
    """Everything, as one report; ``tell`` is given the arms' part as soon as it is there."""
    preset = prepare(folder, work)
    results, ours = race((Documented, Batched, Ours), preset, work, device, rounds)
    # A row of each network as ours counts it: all arms run the same networks.
    flop_a_row = {name: ours.flop()[name] / n for name, n in ours.rows().items() if n}
    types = {dtype for result in results for dtype in result.dtypes.values()}
    report = Report(work, device_name() if device.type == "cuda" else str(device), tuple(results),
                    flop_a_row, {dtype: peak(dtype, device) for dtype in types})
    tell(report)
    if levers:
        report = replace(report, levers=tuple(gpu_levers.measure_levers(ours, rounds, compiling)),
                         profile=gpu_levers.profile(ours))
        tell(report)
    return report


# --- telling -----------------------------------------------------------------------------------

def short(dtype: torch.dtype) -> str:
    """A number type's name."""
    return str(dtype).removeprefix("torch.")


def arm_lines(report: Report) -> list[str]:
    """The table of the arms; shares of an arm add up to 100 %."""
    n = report.work.sources
    lines = ["| arm | stage | number type | s a source | share | sources/s | TFLOP a source | of peak |",
             "|---|---|---|---|---|---|---|---|"]
    for result in report.results:
        for stage in STAGES:
            seconds, needed = result.seconds[stage], report.needed(stage) / n / 1e12
            lines.append(f"| {result.name} | {stage} | {short(result.dtypes[stage])} | {seconds / n:.4f} | "
                         f"{100 * result.share(stage):.1f} % | {n / seconds:.3f} | {needed:.3g} | "
                         f"{100 * report.fraction(result, [stage]):.1f} % |")
        lines.append(f"| {result.name} | rest | | {result.share('rest') * result.total / n:.4f} | "
                     f"{100 * result.share('rest'):.1f} % | | | |")
        needed = sum(report.needed(stage) for stage in STAGES) / n / 1e12
        lines.append(f"| {result.name} | **whole game** | | {result.total / n:.4f} | 100.0 % | "
                     f"{n / result.total:.3f} | {needed:.3g} | {100 * report.fraction(result):.1f} % |")
    return lines


def work_lines(report: Report) -> list[str]:
    """What a row costs and how many rows each arm put through each network."""
    names = [name for name in STAGE_OF if name in report.flop_a_row]
    arms = " | ".join(f"rows, {result.name}" for result in report.results)
    lines = [f"| network | TFLOP a row | floor given | {arms} |",
             "|---|---|---|" + "---|" * len(report.results)]
    for name in names:
        floor = FLOORS.get(name, {}).get(report.work.size) if report.work.width == 1 else None
        lines.append(f"| {name} | {report.flop_a_row[name] / 1e12:.3g} | {floor or ''} | "
                     + " | ".join(str(result.rows[name]) for result in report.results) + " |")
    return lines


def lever_lines(report: Report) -> list[str]:
    """Each lever by itself."""
    lines = ["| lever | stage | without | with | gain |", "|---|---|---|---|---|"]
    for lever in report.levers:
        lines.append(f"| {lever.name} | {lever.stage} | {1000 * lever.without:.2f} ms | "
                     f"{1000 * lever.with_it:.2f} ms | {lever.gain:.2f} times |")
    return lines


def markdown(report: Report) -> str:
    """The report as a page."""
    work, made = report.work, versions()
    peaks = ", ".join(f"{short(dtype)} {value / 1e12:.3g} TFLOP/s" for dtype, value in report.peaks.items())
    size = "full size" if work.width == 1 else f"{work.width} times narrower than the paper's"
    parts = [
        f"# Speed on {report.device}", "",
        f"Random weights, {size}; {work.sources} sources, {work.candidates} candidates of {work.tokens} "
        f"tokens, {work.steps} steps at {work.size} px, batches of {work.batch}. torch {made['torch']}, "
        f"diffusers {made['diffusers']}, transformers {made['transformers']}, Python "
        f"{platform.python_version()}, commit {(commit()['commit'] or 'unknown')[:7]}.", "",
        f"Peak of large matrix products in this run: {peaks}. *Of peak*: FLOP that the work needs at that "
        "peak, over the measured time, each stage against the peak of its own number type.", "",
        "## Three arms on equal work", "", *arm_lines(report), "", "## The work", "", *work_lines(report), ""]
    if report.levers:
        parts += ["## Levers, each by itself, on ours", "", *lever_lines(report), ""]
    if report.profile:
        parts += ["## Profile of one batch of pictures, ours", "", "```", report.profile, "```", ""]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> Report:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = pick_device()
    usual = Work.usual(device)
    for name, value in vars(usual).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default here: {value}")
    parser.add_argument("--rounds", type=int, default=3, help="games of each arm")
    parser.add_argument("--models", type=Path, help="folder of models built before, or to be built")
    parser.add_argument("--out", type=Path, help="write the tables there too, as markdown")
    parser.add_argument("--no-levers", action="store_true", help="the three arms only")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=device.type == "cuda",
                        help="measure compilation too, which takes minutes")
    flags = parser.parse_args(arguments)
    work = Work(**{name: getattr(flags, name) for name in vars(usual)})

    def tell(report: Report) -> None:
        if flags.out is not None:
            flags.out.write_text(markdown(report), encoding="utf-8")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(flags.models or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        report = measure(work, device, folder, flags.rounds, not flags.no_levers, flags.compile, tell)
    print(markdown(report))
    return report


if __name__ == "__main__":
    main()
