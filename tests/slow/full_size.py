"""By hand: the ``paper`` preset at full size with random weights, on real photographs.

    python -m tests.slow.full_size --photos FOLDER --captions FILE [--keep FOLDER] [--width 16]

Builds BLIP-large, Stable Diffusion v1, CLIP ViT-L/14 and CLIP ViT-B/32 from their published
configurations, saves them as local snapshot folders in half precision, runs the committed notebooks
on the photographs through a preset whose ``base`` is ``paper`` and whose paths point there (one
source, two candidates, few denoising steps, on the CPU), and then looks at each model by itself.
Scores are meaningless, because the weights are random.

FILE: captions of the photographs in the COCO captions format. Every model and every notebook has a
process of its own, so that the peak memory told is its own. Takes about 5 GB of disk, 12 GB of
memory and, on one idle core, half an hour; with --keep a second call builds nothing again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from lib.errors import UserError
from lib.notebooks import read_manifest
from lib.presets import REPO_ROOT, Preset, get_preset

PARTS = ("captioner", "generator", "encoder", "judge")
DATASET = "coco-val2014"  # the loader of the paper's own dataset, pointed at the given photographs
CANDIDATES = 2
# Parameters of the published checkpoints' parts, where their makers or many users have counted them.
PUBLISHED = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480,
             "CLIP ViT-L/14": 427_616_513, "CLIP ViT-B/32": 151_277_313}
NOISE = ("requires torchvision", "Writing model shards", "Token indices sequence")  # of libraries
LONG = "a brown dog runs along the beach beside a blue boat while two birds fly over it and " * 2


def say(text: str = "") -> None:
    """Print a line at once: the log is read while it grows."""
    print(text, flush=True)


# --- one model, in a process of its own --------------------------------------------------------

@contextmanager
def shapes(modules: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Collect the shape of the first tensor that each module gives."""
    seen: dict[str, str] = {}

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def note(module: Any, inputs: Any, output: Any) -> None:
            tensor = output if hasattr(output, "shape") else output[0]
            seen.setdefault(name, f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    yield seen
    for handle in handles:
        handle.remove()


def count(name: str, module: Any, width: int, published: str | None = None) -> None:
    """Print a module's parameters; at full size they must be the published number."""
    n = sum(p.numel() for p in module.parameters())
    expected = PUBLISHED.get(published or name) if width == 1 else None
    if expected is not None and n != expected:
        raise AssertionError(f"{name} has {n:,} parameters, published are {expected:,}")
    say(f"  {name}: {n:,} parameters" + (", as published" if expected else ""))


def look_at_captioner(bundle: Any, preset: Preset, photo: Image.Image, width: int) -> None:
    """Two captions of a photograph: shapes, lengths, prompt taken off."""
    model = bundle.model
    for name in ("vision_model", "text_decoder"):
        count(name, getattr(model, name), width)
    count("all", model, width)
    with shapes({"picture features": model.vision_model, "logits": model.text_decoder}) as seen:
        captions = bundle.caption([photo], [[1, 2]])[0]
    pixels = bundle.processor.image_processor([photo], return_tensors="pt").pixel_values
    say(f"  photograph {photo.size[0]} x {photo.size[1]} -> pixels {tuple(pixels.shape)}"
        f" -> picture features {seen['picture features']}; first logits {seen['logits']}")
    sender = preset.captioner.sender
    for caption in captions:
        if not sender.min_tokens <= caption.n_tokens <= sender.max_tokens:
            raise AssertionError(f"{caption.n_tokens} tokens")
        say(f"  caption of {caption.n_tokens} tokens ({sender.min_tokens} to {sender.max_tokens} are "
            f"allowed), log-probability {caption.logprob:.1f}: {caption.text[:60]} ...")


def look_at_generator(bundle: Any, preset: Preset, photo: Image.Image, width: int) -> None:
    """One picture in one step from a prompt that is too long: shapes, resize, truncation."""
    pipeline = bundle.pipeline
    for name in ("unet", "vae", "text_encoder", "safety_checker"):
        count(name, getattr(pipeline, name), width)
    bundle.spec = quick = preset.generator.__class__(**{**vars(preset.generator), "steps": 1})
    modules = {"text": pipeline.text_encoder, "U-Net": pipeline.unet, "decoder": pipeline.vae.decoder}
    with shapes(modules) as seen:
        made = bundle.generate([LONG], [3])
    say(f"  one step: text {seen['text']}, U-Net {seen['U-Net']} (with and without the prompt), "
        f"VAE decoder {seen['decoder']} -> pixels {made.pixels.shape} {made.pixels.dtype}")
    side = quick.output_size
    if made.pixels.shape != (1, side, side, 3) or made.flagged.any():
        raise AssertionError("one unflagged picture of the output size")
    limit = pipeline.tokenizer.model_max_length
    n_tokens = len(pipeline.tokenizer(LONG, verbose=False).input_ids)
    if not made.truncated.all() or n_tokens <= limit or bundle._truncated(["a brown dog"]).any():
        raise AssertionError("the long prompt is cut, a short one is not")
    say(f"  a prompt of {n_tokens} tokens is cut to {limit} and marked; 'a brown dog' is not; "
        f"drawn at {quick.size} px, resized to {side} px; scheduler {type(pipeline.scheduler).__name__}")


def look_at_encoder(bundle: Any, preset: Preset, photo: Image.Image, width: int) -> None:
    """Embeddings of a photograph and of a text."""
    large = bundle.spec == preset.encoder
    count("all", bundle.model, width, "CLIP ViT-L/14" if large else "CLIP ViT-B/32")
    pixels = bundle.processor.image_processor([photo], return_tensors="pt").pixel_values
    image, text = bundle.embed_images([photo]), bundle.embed_texts([LONG])
    say(f"  photograph {photo.size[0]} x {photo.size[1]} -> pixels {tuple(pixels.shape)}"
        f" -> {image.shape} {image.dtype}; text -> {text.shape} {text.dtype}")
    if image.shape != text.shape:
        raise AssertionError("pictures and texts share a space")


def look_at(part: str, file: Path, photo: Path, width: int) -> None:
    """Load one model of a preset as a run would, and look at what it is and gives."""
    from lib import models

    preset = get_preset(file)
    spec, load, look = {
        "captioner": (preset.captioner, models.load_captioner, look_at_captioner),
        "generator": (preset.generator, models.load_generator, look_at_generator),
        "encoder": (preset.encoder, models.load_encoder, look_at_encoder),
        "judge": (preset.judge, models.load_encoder, look_at_encoder)}[part]
    start = time.perf_counter()
    bundle = load(spec)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    record = models.describe(bundle)
    say(f"  loaded in {time.perf_counter() - start:.0f} s as {record['dtype']} on {record['device']} "
        f"(asked: {spec.dtype}; the files are float16), peak memory {loaded:.1f} GB")
    with Image.open(photo) as picture:
        look(bundle, preset, picture.convert("RGB"), width)


# --- processes ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    seconds: float
    peak_gb: float
    output: str


def call(module: str, *arguments: str, echo: bool = True, **variables: str) -> Done:
    """Run ``python -m module`` in the repository; its peak memory includes its own children's."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], cwd=REPO_ROOT, text=True,
        env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines: list[str] = []
    for line in process.stdout:
        if line.strip() and not any(noise in line for noise in NOISE):
            lines.append(line.rstrip())
            if echo:
                say(lines[-1])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Done(process.returncode, time.perf_counter() - start, usage.ru_maxrss / 1e6, "\n".join(lines))


def stage(name: str, *arguments: str) -> None:
    """Run one stage of this file in a process of its own; stop everything if it fails."""
    say(f"\n{name}")
    done = call("tests.slow.full_size", *arguments)
    say(f"  {done.seconds:.0f} s, peak memory of the process {done.peak_gb:.1f} GB")
    if done.status != 0:
        raise UserError(f"{name}: failed")


def lay_out(folder: Path, photos: Path, captions: Path) -> Path:
    """A COCO folder as users have it, whose pictures are the given photographs."""
    root = folder / "coco"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(captions, root / "annotations" / "captions_val2014.json")
    if not (root / "val2014").exists():
        (root / "val2014").symlink_to(photos)
    return root


# --- the whole proof ---------------------------------------------------------------------------

def head(width: int, steps: int) -> None:
    """What is proved, with what."""
    say("the paper preset at full size with random weights" if width == 1
        else f"the paper preset, {width} times narrower, with random weights")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "diffusers"))
    commit = subprocess.run(["git", "-C", str(REPO_ROOT), "rev-parse", "--short", "HEAD"],
                            capture_output=True, text=True, check=False).stdout.strip()
    say(f"commit {commit}; Python {platform.python_version()}, {packages}; {os.cpu_count()} cores, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}")
    say(f"one source, {CANDIDATES} candidates, {steps} denoising steps; load of the machine at the start "
        f"{os.getloadavg()[0]:.0f}, so that seconds are upper bounds")


def play_notebooks(file: Path, folder: Path, coco: Path) -> None:
    """Run every notebook of the manifest, each by the command that users give."""
    say("\nnotebooks (as ./run_all.sh runs them, one at a time)")
    places = {"COMPENDIUM_RUNS": str(folder / "runs"), "COMPENDIUM_FIGURES": str(folder / "figures"),
              "COCO_DIR": str(coco)}
    for notebook in read_manifest():
        done = call("lib.pipeline", "--preset", str(file), "--dataset", DATASET, "--n", "1",
                    "--candidates", str(CANDIDATES), "--only", notebook.stem, "--force",
                    echo=False, **places)
        if done.status == 0:
            say(f"  {notebook.stem}: ran in {done.seconds:.0f} s, peak memory {done.peak_gb:.1f} GB")
        else:
            said = [line for line in done.output.splitlines() if line.startswith("error: ")]
            say(f"  {notebook.stem}: not with one source: {(said or done.output.splitlines())[-1]}")


def tell_rows(folder: Path, preset: Preset) -> None:
    """Check and print what the runs have left."""
    found = sorted((folder / "runs").glob("*/rows.parquet"))
    if len(found) != 2:
        raise AssertionError(f"{len(found)} runs, not one of each task")
    for path in found:
        rows = pd.read_parquet(path)
        task = rows["task"].iloc[0]
        record = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
        cost = json.loads((path.parent / "cost.json").read_text(encoding="utf-8"))
        say(f"\nrows of {path.parent.name}")
        if len(rows) != CANDIDATES or not rows["similarity"].notna().all():
            raise AssertionError("a row and a similarity for each candidate")
        for name in sorted(set(rows["reconstruction" if task == "image" else "message"])):
            with Image.open(path.parent / name) as picture:
                if picture.size != (preset.generator.output_size,) * 2:
                    raise AssertionError(f"{name} has {picture.size} pixels")
                say(f"  {name}: {picture.size[0]} x {picture.size[1]} {picture.mode}")
        empty = [name for name in rows.columns if rows[name].isna().all()]
        say(f"  {len(rows)} rows, {len(rows.columns)} columns, all null: {', '.join(empty)}")
        say(f"  counts {record['counts']}; null with a reason: {record['missing_scores']}")
        say("  loaded " + "; ".join(f"{part} {info['dtype']} on {info['device']}"
                                    for part, info in record["loaded"].items()))
        say(f"  seconds {cost['seconds']}; passes {cost['passes']}")
        shown = ["item", "candidate", "n_words", "truncated", "flagged", "similarity",
                 "similarity_judge", "cider", "rank", "selected"]
        say(rows[shown].round(3).to_string(index=False))


def tell_figures(folder: Path) -> None:
    """List the figures and tables."""
    files = sorted(p for p in (folder / "figures").rglob("*") if p.is_file() and "notebooks" not in p.parts)
    kinds = pd.Series([path.suffix for path in files]).value_counts().to_dict()
    say("\nfigures and tables: " + ", ".join(sorted({p.name.split(".")[0] for p in files})))
    say("  files by kind: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    executed = sorted((folder / "figures").rglob("notebooks/*.ipynb"))
    say(f"  executed notebooks: {', '.join(path.stem[:2] for path in executed)}")


def prove(folder: Path, options: argparse.Namespace) -> None:
    """Build, look, play, tell; AssertionError or UserError where a promise is broken."""
    head(options.width, options.steps)
    coco = lay_out(folder, options.photos.resolve(), options.captions.resolve())
    photo = sorted(options.photos.glob("*.jpg"))[0].resolve()
    file, size = folder / "models" / "full-size-random.toml", ("--width", str(options.width))
    if file.is_file():
        say("\nsnapshots of an earlier call")
    else:
        stage("building snapshots", "--build", str(folder), "--steps", str(options.steps), *size)
    weights = sorted((folder / "models").rglob("*.safetensors"))
    say(f"  {len(weights)} safetensors files, {sum(p.stat().st_size for p in weights) / 1e9:.2f} GB")
    play_notebooks(file, folder, coco)
    tell_rows(folder, get_preset(file))
    tell_figures(folder)
    for part in PARTS:
        stage(f"the {part} by itself", "--part", part, "--preset", str(file), "--photo", str(photo), *size)
    say("\nThe weights are random: all scores above are meaningless. That they exist, in the right "
        "shapes, types and places, is the result.")


def read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; the flags without help are for the stages that this file calls itself."""
    parser = argparse.ArgumentParser(description="paper preset at full size, random weights")
    parser.add_argument("--photos", type=Path, help="a folder of photographs (jpg)")
    parser.add_argument("--captions", type=Path, help="their captions, COCO captions format")
    parser.add_argument("--keep", type=Path, help="build here and keep it (default: a temporary folder)")
    parser.add_argument("--width", type=int, default=1, help="divide the widths (16: a quick trial)")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps")
    for name in ("--build", "--part", "--preset", "--photo"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not (options.build or options.part) and (options.photos is None or options.captions is None):
        parser.error("give --photos and --captions")
    for path in (options.photos, options.captions):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist: give a folder of photographs and their captions file")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 0, or 2 if a stage failed."""
    options = read_flags(arguments)
    try:
        if options.build:
            from tests.full_size import build_all

            build_all(Path(options.build) / "models", options.width, options.steps)
        elif options.part:
            look_at(options.part, Path(options.preset), Path(options.photo), options.width)
        elif options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            prove(options.keep.resolve(), options)
        else:
            with tempfile.TemporaryDirectory() as folder:
                prove(Path(folder), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
