"""The three arms of ``gpu.py``: the same game written in three ways, and how much of it there is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib.captioners import Blip
from lib.encoders import Clip
from lib.flops import Meter
from lib.generators import NETWORKS, Generator
from lib.presets import Decoding, Preset

STAGES = ("captions", "pictures", "embeddings")
# The networks that are counted, by the stage they belong to.
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
    """The half-precision type that Stable Diffusion is used in; float32 on a CPU, where halves are slow."""
    return torch.float16 if device.type == "cuda" else torch.float32


def split(things: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Batches of a sequence."""
    return [things[start:start + size] for start in range(0, len(things), size)]
