"""By hand: the ``paper`` preset at full size with random weights, on a real photograph.

    python -m tests.slow.full_size PHOTO [--keep FOLDER] [--width 16] [--steps 2]

Builds BLIP-large, Stable Diffusion v1, CLIP ViT-L/14 and CLIP ViT-B/32 from their published
configurations, saves them in half precision, compares their parameter counts with the published ones and
takes one photograph through caption, image and embeddings. Takes about 5 GB of disk, 12 GB of memory
and, on one idle core, ten minutes; with --keep a second call builds nothing again. A run of the notebooks
with the same models: ./run_all.sh --preset FOLDER/full-size-random.toml --dataset folder:PHOTOS --n 1
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from lib.models import describe, load_captioner, load_encoder, load_generator
from lib.presets import load_preset
from tests.full_size import build_all

# Parameters of the published checkpoints' parts, where their makers or many users have counted them.
PUBLISHED = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480,
             "CLIP ViT-L/14": 427_616_513, "CLIP ViT-B/32": 151_277_313}
LONG = "a brown dog runs along the beach beside a blue boat while two birds fly over it and " * 2


def timed(what: str, work: Callable[[], Any]) -> Any:
    """Do some work; print its seconds and the peak memory so far."""
    start = time.perf_counter()
    result = work()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what}: {time.perf_counter() - start:.0f} s, peak memory {memory:.1f} GB", flush=True)
    return result


def count(name: str, module: Any, width: int) -> None:
    """Print a module's parameters; at full size they must be the published number."""
    n = sum(p.numel() for p in module.parameters())
    assert width > 1 or n == PUBLISHED.get(name, n), f"{name}: {n:,} parameters, published {PUBLISHED[name]:,}"
    print(f"  {name}: {n:,} parameters")


def prove(folder: Path, photo: Image.Image, width: int, steps: int) -> None:
    """Build, load, caption, draw and embed; AssertionError where a promise is broken."""
    file = folder / "full-size-random.toml"
    if not file.is_file():
        timed("built", lambda: build_all(folder, width, steps))
    preset = load_preset(file)
    captioner = timed("captioner", lambda: load_captioner(preset.captioner))
    count("captioner", captioner.model, width)
    captions = timed("2 captions", lambda: captioner.caption([photo], [[1, 2]]))[0]
    sender = preset.captioner.sender
    assert all(sender.min_tokens <= caption.n_tokens <= sender.max_tokens for caption in captions)
    generator = timed("generator", lambda: load_generator(preset.generator))
    for name in ("unet", "vae", "text_encoder", "safety_checker"):
        count(name, getattr(generator.pipeline, name), width)
    made = timed("2 images", lambda: generator.generate([captions[0].text, LONG], [3, 4]))
    side = preset.generator.output_size
    assert made.pixels.shape == (2, side, side, 3) and not made.flagged.any() and made.truncated[1]
    for name, settings in (("CLIP ViT-L/14", preset.encoder), ("CLIP ViT-B/32", preset.second_encoder)):
        encoder = timed(name, lambda settings=settings: load_encoder(settings))
        count(name, encoder.model, width)
        images, texts = encoder.embed_images([photo, *made.pixels]), encoder.embed_texts([LONG])
        assert images.shape[1] == texts.shape[1] == encoder.model.config.projection_dim
        print(f"  {describe(encoder)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="paper preset at full size, random weights")
    parser.add_argument("photo", type=Path)
    parser.add_argument("--keep", type=Path, help="build here and keep it (default: a temporary folder)")
    parser.add_argument("--width", type=int, default=1, help="divide the widths (16: a quick trial)")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, Image.open(flags.photo) as photo:
        folder = flags.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prove(folder.resolve(), photo.convert("RGB"), flags.width, flags.steps)


if __name__ == "__main__":
    main()
