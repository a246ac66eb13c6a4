"""Speed at paper scale with random weights (speed does not depend on them), and where it comes from.

    python -m tests.benchmarks.gpu [--out gpu.md] [--models FOLDER] [--sources 4] [--steps 50] [--size 512]

Three arms do equal work on the same sources: a loop over single images with the libraries' defaults,
as their pages show it; a strong loop written by hand, in batches and half precision; ours. Each
source gets K captions of a fixed length, each caption one picture, each picture one embedding. Then
each lever is measured by itself (``gpu_levers``). The peak is the fastest large matrix product of the
same run and number type; a share of it is (FLOP that the work needs / peak) / seconds. FLOP a row
are counted by torch; a network's rows are those of the leanest arm, so that no arm gains by waste.

On a GPU the defaults are the paper's full size; on a CPU everything is small and proves only that
the script runs.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tests.full_size import build_all

from lib.captioners import Blip
from lib.encoders import Clip
from lib.flops import Meter
from lib.generators import NETWORKS, Generator
from lib.presets import Decoding, Preset, get_preset
from lib.provenance import commit, device_name, versions
from lib.weights import pick_device

STAGES = ("captions", "pictures", "embeddings")
# Floors of the paper's networks, TFLOP a pass of one row (2 x multiply-add), by size of the picture.
FLOORS = {"denoiser": {256: 0.180, 512: 0.803}, "image decoder": {256: 0.622, 512: 2.515},
          "images": {256: 0.162, 512: 0.162}, "image encoder": {256: 0.382, 512: 0.382}}
STAGE_OF = {"image encoder": "captions", "text decoder": "captions", "text encoder": "pictures",
            "denoiser": "pictures", "image decoder": "pictures", "images": "embeddings"}


@dataclass(frozen=True)
class Work:
    """How much every arm has to do."""

    sources: int
    candidates: int
    steps: int
    size: int
    tokens: int
    batch: int
    width: int

    @classmethod
    def usual(cls, device: torch.device) -> Work:
        """The paper's size on a GPU, a small one elsewhere."""
        if device.type == "cuda":
            return cls(sources=4, candidates=10, steps=50, size=512, tokens=15, batch=8, width=1)
        return cls(sources=2, candidates=2, steps=2, size=64, tokens=4, batch=4, width=16)

    def photos(self) -> list[Image.Image]:
        """Noise in the size of COCO's pictures: what is shown does not change the time."""
        rng = np.random.default_rng(0)
        return [Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))
                for _ in range(self.sources)]

    def decoding(self) -> Decoding:
        """Nucleus sampling of captions of one fixed length."""
        return Decoding("nucleus", p=0.9, min_tokens=self.tokens, max_tokens=self.tokens)


@dataclass
class Clock:
    """Seconds by stage; waits for the device before every reading."""

    device: torch.device
    seconds: Counter[str] = field(default_factory=Counter)

    def now(self) -> float:
        """The time, once the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = self.now()
        yield
        self.seconds[name] += self.now() - start


# --- the arms ----------------------------------------------------------------------------------

class Arm:
    """The game by one way of writing it: ``play`` gives an embedding for each candidate."""

    name = ""

    def __init__(self, preset: Preset, work: Work, device: torch.device) -> None:
        self.preset, self.work, self.device = preset, work, device
        self.meters: dict[str, Meter] = {}  # by stage
        self.dtypes: dict[str, torch.dtype] = {}

    def play(self, photos: Sequence[Image.Image], clock: Clock) -> np.ndarray:
        """Embeddings (S * K, d)."""
        raise NotImplementedError

    def rows(self) -> Counter[str]:
        """Rows that went through each network so far."""
        return Counter({name: n for meter in self.meters.values() for name, n in meter.passes.items()
                        if name in STAGE_OF})

    def flop(self) -> Counter[str]:
        """FLOP of each network so far."""
        return Counter({name: n for meter in self.meters.values() for name, n in meter.flop.items()
                        if name in STAGE_OF})


class Documented(Arm):
    """The libraries' pages: one picture, one caption, one call, the number type of the published files."""

    name = "documented defaults, single images"
    dtype = torch.float32

    def __init__(self, preset: Preset, work: Work, device: torch.device) -> None:
        super().__init__(preset, work, device)
        from diffusers import StableDiffusionPipeline
        from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPModel, CLIPProcessor

        local: dict[str, Any] = {"local_files_only": True}
        typed = {**local, "dtype": self.dtype}
        ids = preset.captioner.id, preset.generator.id, preset.encoder.id
        self.blip = BlipForConditionalGeneration.from_pretrained(ids[0], **typed).to(device)
        self.pipeline = StableDiffusionPipeline.from_pretrained(
            ids[1], safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            **typed).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.clip = CLIPModel.from_pretrained(ids[2], **typed).to(device)
        self.blip_processor = BlipProcessor.from_pretrained(ids[0], backend="pil", **local)
        self.clip_processor = CLIPProcessor.from_pretrained(ids[2], backend="pil", **local)
        self.meters = {"captions": Meter.of(self.blip, Blip.networks), "pictures": Meter.of(
            self.pipeline, NETWORKS), "embeddings": Meter.of(self.clip, Clip.networks)}
        self.dtypes = {"captions": self.blip.dtype, "pictures": self.pipeline.unet.dtype,
                       "embeddings": self.clip.dtype}

    def captions(self, photos: Sequence[Image.Image], each: int) -> list[str]:
        """``each`` captions of every photo, in one call."""
        work, inputs = self.work, self.blip_processor(images=list(photos), return_tensors="pt")
        tokens = self.blip.generate(
            pixel_values=inputs.pixel_values.to(self.device, self.blip.dtype), do_sample=True, top_p=0.9,
            top_k=0, num_return_sequences=each, min_new_tokens=work.tokens, max_new_tokens=work.tokens)
        return self.blip_processor.batch_decode(tokens, skip_special_tokens=True)

    def pictures(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One picture a text, in one call, resized to the preset's output."""
        spec, side = self.preset.generator, self.preset.generator.output_size
        drawn = self.pipeline(
            list(texts), num_inference_steps=spec.steps, guidance_scale=spec.guidance, height=spec.size,
            width=spec.size, generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images
        return [picture.resize((side, side)) for picture in drawn]

    def embeddings(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """One embedding a picture, (b, d), in one call."""
        pixels = self.clip_processor(images=list(pictures), return_tensors="pt").pixel_values
        features = self.clip.get_image_features(pixel_values=pixels.to(self.device, self.clip.dtype))
        return features.pooler_output.float().cpu().numpy()

    @torch.no_grad()
    def play(self, photos: Sequence[Image.Image], clock: Clock) -> np.ndarray:
        vectors = []
        for photo in photos:
            with clock.stage("embeddings"):
                self.embeddings([photo])
            for k in range(self.work.candidates):
                with clock.stage("captions"):
                    caption = self.captions([photo], 1)
                with clock.stage("pictures"):
                    picture = self.pictures(caption, [k])
                with clock.stage("embeddings"):
                    vectors.append(self.embeddings(picture))
        return np.concatenate(vectors)


class Batched(Documented):
    """What a good engineer writes by hand: half precision, batches, channels last, K in one call."""

    name = "hand-written batches, half precision"

    def __init__(self, preset: Preset, work: Work, device: torch.device) -> None:
        self.dtype = half_type(device)
        super().__init__(preset, work, device)
        if device.type == "cuda":
            for module in (self.pipeline.unet, self.pipeline.vae):
                module.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def play(self, photos: Sequence[Image.Image], clock: Clock) -> np.ndarray:
        k, batch = self.work.candidates, self.work.batch
        with clock.stage("captions"):
            captions = [text for part in split(photos, max(1, batch // k))
                        for text in self.captions(part, k)]
        with clock.stage("pictures"):
            seeds = list(range(len(captions)))
            drawn = [picture for part, some in zip(split(captions, batch), split(seeds, batch), strict=True)
                     for picture in self.pictures(part, some)]
        with clock.stage("embeddings"):
            everything = np.concatenate([self.embeddings(part) for part in split([*photos, *drawn], 64)])
        return everything[len(photos):]


class Ours(Arm):
    """This project's bundles, as a run uses them."""

    name = "ours"

    def __init__(self, preset: Preset, work: Work, device: torch.device) -> None:
        super().__init__(preset, work, device)
        self.captioner = Blip(preset.captioner, device)
        self.generator = Generator(preset.generator, device)
        self.encoder = Clip(preset.encoder, device)
        self.bundles = {"captions": self.captioner, "pictures": self.generator, "embeddings": self.encoder}
        self.meters = {stage: bundle.meter for stage, bundle in self.bundles.items()}
        self.dtypes = {stage: bundle.dtype for stage, bundle in self.bundles.items()}

    def play(self, photos: Sequence[Image.Image], clock: Clock) -> np.ndarray:
        k, n = self.work.candidates, len(photos) * self.work.candidates
        with clock.stage("captions"):
            rows = self.captioner.caption(photos, [list(range(i, i + k)) for i in range(0, n, k)])
        with clock.stage("pictures"):
            made = self.generator.generate([c.text for row in rows for c in row], range(n))
        with clock.stage("embeddings"):
            return self.encoder.embed_images([*photos, *made.pixels])[len(photos):]


def half_type(device: torch.device) -> torch.dtype:
    """The half-precision type of a GPU; float32 elsewhere, where halves are slow."""
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def split(things: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Batches of a sequence."""
    return [things[start:start + size] for start in range(0, len(things), size)]


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


def play_round(arm: Arm, photos: Sequence[Image.Image]) -> tuple[Clock, float]:
    """One game by one arm: seconds by stage and in all."""
    clock = Clock(arm.device)
    start = clock.now()
    vectors = arm.play(photos, clock)
    total = clock.now() - start
    if vectors.shape[0] != len(photos) * arm.work.candidates or not np.isfinite(vectors).all():
        raise RuntimeError(f"{arm.name}: {vectors.shape} embeddings, or some are not finite")
    return clock, total


def race(arms: Sequence[Arm], work: Work, rounds: int) -> tuple[list[Result], dict[str, float]]:
    """Let the arms take turns on the same sources; results, and FLOP of a row of each network."""
    photos = work.photos()
    for arm in arms:
        play_round(arm, photos)  # warm up: libraries choose their algorithms by trial
    # A row of each network by the arm that is last, ours; all arms run the same networks.
    flop_a_row = {name: arms[-1].flop()[name] / n for name, n in arms[-1].rows().items() if n}
    before, played = [arm.rows() for arm in arms], [[] for _ in arms]
    for number in range(rounds):
        order = range(len(arms)) if number % 2 == 0 else reversed(range(len(arms)))
        for i in order:
            played[i].append(play_round(arms[i], photos))
    results = []
    for arm, earlier, timed in zip(arms, before, played, strict=True):
        clock, total = sorted(timed, key=lambda one: one[1])[len(timed) // 2]  # the median round, whole
        rows = {name: (n - earlier[name]) // rounds for name, n in arm.rows().items()}
        results.append(Result(arm.name, dict(clock.seconds), total, rows, arm.dtypes))
    return results, flop_a_row


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
            compiling: bool) -> Report:
    """Everything, as one report."""
    from tests.benchmarks import gpu_levers

    preset = prepare(folder, work)
    arms = [kind(preset, work, device) for kind in (Documented, Batched, Ours)]
    results, flop_a_row = race(arms, work, rounds)
    types = {dtype for result in results for dtype in result.dtypes.values()}
    report = Report(work, device_name() if device.type == "cuda" else str(device), tuple(results),
                    flop_a_row, {dtype: peak(dtype, device) for dtype in types})
    if not levers:
        return report
    ours = arms[-1]
    del arms  # the other arms' memory is free for larger batches
    return replace(report, levers=tuple(gpu_levers.measure_levers(ours, rounds, compiling)),
                   profile=gpu_levers.profile(ours))


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
            lines.append(
                f"| {result.name} | {stage} | {short(result.dtypes[stage])} | "
                f"{result.seconds[stage] / n:.4f} | {100 * result.share(stage):.1f} % | {n / result.seconds[stage]:.3f} | "
                f"{report.needed(stage) / n / 1e12:.4f} | {100 * report.fraction(result, [stage]):.1f} % |")
        lines.append(f"| {result.name} | rest | | {result.share('rest') * result.total / n:.4f} | "
                     f"{100 * result.share('rest'):.1f} % | | | |")
        needed = sum(report.needed(stage) for stage in STAGES) / n / 1e12
        lines.append(f"| {result.name} | **whole game** | | {result.total / n:.4f} | 100.0 % | "
                     f"{n / result.total:.3f} | {needed:.4f} | {100 * report.fraction(result):.1f} % |")
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
        f"tokens, {work.steps} steps at {work.size} px, batches of {work.batch}. torch {made['torch']}, diffusers "
        f"{made['diffusers']}, transformers {made['transformers']}, Python {platform.python_version()}, "
        f"commit {(commit()['commit'] or 'unknown')[:7]}.", "",
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
    run: Callable[[Path], Report] = lambda folder: measure(  # noqa: E731
        work, device, folder, flags.rounds, not flags.no_levers, flags.compile)
    if flags.models is not None:
        flags.models.mkdir(parents=True, exist_ok=True)
        report = run(flags.models.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = run(Path(folder))
    page = markdown(report)
    print(page)
    if flags.out is not None:
        flags.out.write_text(page, encoding="utf-8")
    return report




if __name__ == "__main__":
    main()
