"""By hand: the ``paper`` preset at full size with random weights, on real photographs.

    python tests/slow/full_size.py --photos FOLDER [--keep FOLDER] [--width 16]

Builds BLIP-large, Stable Diffusion v1 and two CLIPs from their published configurations, saves them
as snapshot folders, and plays both tasks through the same functions as any run: one source, two
candidates, two denoising steps at 512 px. Proves loading, number types, memory, shapes, resizing,
prompt truncation and rows. Scores are meaningless: the weights are random.
Takes about 6 GB of disk, 15 GB of memory and, on two cores, some 15 minutes.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from tests.full_size import build_all

from lib.errors import UserError
from lib.players import load_models
from lib.presets import get_preset
from lib.roundtrip import play


@contextmanager
def stage(name: str):
    """Print what is done, how long it took and the peak memory so far."""
    start = time.perf_counter()
    print(f"{name} ...", flush=True)
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{name}: {time.perf_counter() - start:.1f} s, peak memory {peak:.1f} GB", flush=True)


def run(folder: Path, photos: Path, width: int) -> None:
    """Build, load and play; raise AssertionError where a promise is broken."""
    with stage("building snapshots"):
        preset = get_preset(build_all(folder / "models", width))
    size = sum(file.stat().st_size for file in (folder / "models").rglob("*.safetensors"))
    print(f"weights on disk: {size / 1e9:.2f} GB (half precision)")
    with stage("loading"):
        models = load_models(preset)
    for part in ("vision_model", "text_decoder"):
        count = sum(p.numel() for p in getattr(models.captioner.model, part).parameters())
        print(f"captioner {part}: {count / 1e6:.0f} M parameters")
    for part in ("unet", "vae", "text_encoder", "safety_checker"):
        count = sum(p.numel() for p in getattr(models.generator.pipeline, part).parameters())
        print(f"generator {part}: {count / 1e6:.0f} M parameters, {models.generator.dtype}")
    prompts = folder / "prompts.txt"
    prompts.write_text("a brown dog runs along the beach\n", encoding="utf-8")
    for task, dataset in (("image", f"folder:{photos}"), ("text", f"texts:{prompts}")):
        with stage(f"{task} reconstruction"):
            result = play(preset, dataset, task, 1, 2, 0, models=models,
                          root=folder / "runs", progress=False)
        rows = result.rows()
        assert len(rows) == 2 and rows["similarity"].notna().all(), "two rows with similarities"
        picture = rows["reconstruction" if task == "image" else "message"].iloc[0]
        with Image.open(result.path / picture) as image:
            assert image.size == (preset.generator.output_size,) * 2, "the preset's output size"
        print(rows[["item", "candidate", "n_words", "flagged", "similarity", "rank"]].to_string())
    print("weights are random: the numbers above mean nothing, that they exist does")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="paper preset at full size, random weights")
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--keep", type=Path, help="build here and keep it (default: a temporary folder)")
    parser.add_argument("--width", type=int, default=1, help="divide the widths (16: a quick trial)")
    options = parser.parse_args(arguments)
    try:
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            run(options.keep.resolve(), options.photos.resolve(), options.width)
        else:
            with tempfile.TemporaryDirectory() as folder:
                run(Path(folder), options.photos.resolve(), options.width)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
