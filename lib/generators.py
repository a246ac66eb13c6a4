"""Generators: captions in, uint8 images out (paper 3.3). Any diffusers text-to-image pipeline.

The noise of an image comes from its own CPU generator, so an image depends on its text and seed
only; each distinct text is encoded once a call and the empty prompt once a bundle.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lib.errors import UserError
from lib.flops import Meter
from lib.hardware import Batches, pick_device, pick_dtype
from lib.presets import GeneratorSpec
from lib.weights import demand_safety_checker, loading, model_folder, pipeline_files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratedImages:
    """pixels uint8 (B, H, W, 3); flagged bool (B,): the safety checker blacked the image out;
    truncated bool (B,): the prompt was longer than the text encoder reads."""

    pixels: np.ndarray
    flagged: np.ndarray
    truncated: np.ndarray


# The parts of a pipeline whose cost is counted.
NETWORKS = {"text encoder": ("text_encoder", "text_encoder_2", "text_encoder_3"),
            "denoiser": ("unet", "transformer"),
            "image decoder": ("vae.decoder", "vae.post_quant_conv"),
            "safety checker": ("safety_checker",)}

# What ``encode_prompt`` returns, in order, by pipeline class: the names under which the pipeline
# takes it back. A leading "-" marks the part that belongs to the empty prompt. None: not taken back.
_PROMPT_PARTS: dict[str, tuple[str | None, ...]] = {
    "StableDiffusionPipeline": ("prompt_embeds", "-negative_prompt_embeds"),
    "LatentConsistencyModelPipeline": ("prompt_embeds", None),
    "StableDiffusionXLPipeline": ("prompt_embeds", "-negative_prompt_embeds",
                                  "pooled_prompt_embeds", "-negative_pooled_prompt_embeds"),
    "StableDiffusion3Pipeline": ("prompt_embeds", "-negative_prompt_embeds",
                                 "pooled_prompt_embeds", "-negative_pooled_prompt_embeds"),
    "PixArtAlphaPipeline": ("prompt_embeds", "prompt_attention_mask",
                            "-negative_prompt_embeds", "-negative_prompt_attention_mask"),
    "PixArtSigmaPipeline": ("prompt_embeds", "prompt_attention_mask",
                            "-negative_prompt_embeds", "-negative_prompt_attention_mask"),
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", None),
}

# Arguments of a pipeline's call that options cannot set, and what does: a field of the preset, or the game.
_GIVEN = {"num_inference_steps": "steps", "guidance_scale": "guidance", "height": "size", "width": "size",
          **dict.fromkeys(("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2",
                           "negative_prompt_3", "generator", "latents", "num_images_per_prompt",
                           "output_type", "return_dict", "use_resolution_binning"))}


class Generator:
    """A text-to-image pipeline with one verb."""

    def __init__(self, spec: GeneratorSpec, device: str | torch.device | None = None) -> None:
        self.spec = spec
        self.device = pick_device(device)
        skipped = () if spec.safety_checker else ("safety_checker/*",)
        self.folder = model_folder(spec.id, spec.revision, pipeline_files(spec.variant), skipped)
        # Pipelines around a U-Net (Stable Diffusion 1, SDXL, LCM) are used in float16 everywhere;
        # the text encoders of later ones (T5) overflow in it.
        self.dtype = pick_dtype(spec.dtype, self.device, half_on_gpu=True,
                                may_overflow=not (self.folder / "unet").is_dir())
        self._batches = Batches(spec.batch_size, f"generator {spec.id}", "image")
        with loading(spec.id):
            self.pipeline = self._load()
        self.meter = Meter.of(self.pipeline, NETWORKS)
        self._accepted = set(inspect.signature(self.pipeline.__call__).parameters)
        self._check_options()
        self._parts = _PROMPT_PARTS.get(type(self.pipeline).__name__)
        self._empty: dict[str, torch.Tensor] | None = None

    # --- loading --------------------------------------------------------------------------------

    def _load(self) -> Any:
        """Load the pipeline, its scheduler and its optional LoRA, and move it to the device."""
        from diffusers import DiffusionPipeline

        index = DiffusionPipeline.load_config(self.folder, local_files_only=True)
        pipeline = DiffusionPipeline.from_pretrained(
            self.folder, dtype=self.dtype, variant=self.spec.variant, local_files_only=True,
            use_safetensors=True, trust_remote_code=False, **self._safety(index))
        if "prompt" not in inspect.signature(pipeline.__call__).parameters:
            raise UserError(f"model {self.spec.id} is a {type(pipeline).__name__}, which takes no "
                            "prompt: choose a text-to-image pipeline")
        if self.spec.scheduler is not None:
            pipeline.scheduler = self._scheduler(pipeline.scheduler.config)
        if self.spec.lora is not None:
            _fuse_lora(pipeline, self.spec)
        pipeline.set_progress_bar_config(disable=True)
        pipeline = pipeline.to(self.device)
        self._tune(pipeline)
        return pipeline

    def _safety(self, index: dict[str, Any]) -> dict[str, Any]:
        """Arguments that switch a pipeline's safety checker off, or make sure that it is there."""
        if self.spec.safety_checker:
            demand_safety_checker(self.folder, self.spec.id)
            from transformers import CLIPImageProcessorPil

            extractor = CLIPImageProcessorPil.from_pretrained(
                self.folder / "feature_extractor", local_files_only=True)
            return {"feature_extractor": extractor}
        if "safety_checker" not in index:
            return {}
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def _scheduler(self, config: Any) -> Any:
        """Another sampler over the noise schedule that the model was trained with."""
        import diffusers

        scheduler_class = getattr(diffusers, str(self.spec.scheduler), None)
        if not (isinstance(scheduler_class, type)
                and issubclass(scheduler_class, diffusers.SchedulerMixin)):
            raise UserError(f"unknown scheduler {self.spec.scheduler!r}: give the name of a "
                            "diffusers scheduler class, such as DPMSolverMultistepScheduler")
        return scheduler_class.from_config(config)

    def _tune(self, pipeline: Any) -> None:
        """Memory layout, compilation, sampler; none changes an image beyond rounding.

        Attention is torch's fused one wherever diffusers has it, which is its own default.
        """
        for name in ("unet", "vae"):
            module = getattr(pipeline, name, None)
            if module is not None and self.device.type == "cuda":
                module.to(memory_format=torch.channels_last)
        self.compiled = self.spec.compile and _can_compile(self.device)
        if self.compiled:
            vae = getattr(pipeline, "vae", None)
            parts = (getattr(pipeline, "unet", None), getattr(pipeline, "transformer", None),
                     getattr(vae, "decoder", None))
            for part in parts:
                if part is not None:
                    part.compile(dynamic=False)
        if self.dtype == torch.float16 and hasattr(getattr(pipeline, "vae", None), "decode"):
            decode_overflows_exactly(pipeline.vae)
        tune_scheduler(pipeline.scheduler)

    def _check_options(self) -> None:
        """Options are arguments of the pipeline's call; one that it does not take, or that would be
        overruled without a word, is an error."""
        unknown = [name for name in self.spec.options if name not in self._accepted]
        if unknown:
            raise UserError(f"generator {self.spec.id}: options has {unknown[0]!r}, which is no argument of a "
                            f"{type(self.pipeline).__name__}: remove it from the preset")
        given = next((name for name in self.spec.options if name in _GIVEN), None)
        if given is not None:
            remedy = f"set {_GIVEN[given]} in its place" if _GIVEN[given] else "the game sets it, remove it"
            raise UserError(f"generator {self.spec.id}: options cannot have {given!r}: {remedy}")

    # --- the verb -------------------------------------------------------------------------------

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> GeneratedImages:
        """Return one image for each (text, seed); rows do not depend on each other.

        Seeds in [0, 2**63). Raises UserError if the pixels are not finite.
        """
        if len(texts) != len(seeds):
            raise ValueError(f"{len(texts)} texts but {len(seeds)} seeds")
        size = self.spec.output_size
        if not texts:
            return GeneratedImages(np.zeros((0, size, size, 3), np.uint8),
                                   np.zeros(0, bool), np.zeros(0, bool))
        distinct = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(distinct)}
        truncated = self._truncated(distinct)
        with torch.inference_mode():
            encoded = self._encode(distinct)
            parts = self._batches.run(len(texts), lambda rows: self._draw(
                [place[text] for text in texts[rows]], distinct, encoded, seeds[rows]))
        pixels = np.concatenate([part[0] for part in parts])
        flagged = np.concatenate([part[1] for part in parts])
        return GeneratedImages(pixels, flagged, truncated[[place[text] for text in texts]])

    def _encode(self, texts: list[str]) -> dict[str, torch.Tensor] | None:
        """Encode distinct texts; None for a pipeline whose encoder output is not known here."""
        if self._parts is None:
            return None
        if self._guided and self._empty is None:
            negative = self._encode_prompt([""], guided=True)
            self._empty = {name[1:]: part for name, part in zip(self._parts, negative, strict=False)
                           if name is not None and name.startswith("-") and part is not None}
        batches = self._batches.run(len(texts), lambda rows: self._encode_prompt(
            texts[rows], guided=False))
        return {name: torch.cat([batch[i] for batch in batches])
                for i, name in enumerate(self._parts)
                if name is not None and not name.startswith("-") and batches[0][i] is not None}

    @property
    def _guided(self) -> bool:
        """Whether classifier-free guidance runs an unconditional pass."""
        return self.spec.guidance > 1 and "negative_prompt_embeds" in self._accepted

    def _encode_prompt(self, texts: list[str], guided: bool) -> tuple[Any, ...]:
        """The pipeline's own text encoding, called with the arguments that this class takes.

        Cut prompts are told by ``_truncated`` in one line each, so the pipeline need not.
        """
        from diffusers.utils import logging as diffusers_logging

        accepted = inspect.signature(self.pipeline.encode_prompt).parameters
        arguments = {"prompt": texts, "prompt_2": None, "prompt_3": None, "device": self.device,
                     "num_images_per_prompt": 1, "do_classifier_free_guidance": guided,
                     **self.spec.options}
        verbosity = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()
        try:
            return self.pipeline.encode_prompt(
                **{name: value for name, value in arguments.items() if name in accepted})
        finally:
            diffusers_logging.set_verbosity(verbosity)

    def _draw(self, rows: list[int], texts: list[str], encoded: dict[str, torch.Tensor] | None,
              seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Draw one batch: uint8 pixels (b, H, W, 3) and safety flags (b,)."""
        spec = self.spec
        arguments: dict[str, Any] = {
            **spec.options, "num_inference_steps": spec.steps, "guidance_scale": spec.guidance,
            "height": spec.size, "width": spec.size, "output_type": "pt",
            "use_resolution_binning": False,  # PixArt: draw the size that was asked for
            "generator": [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]}
        if encoded is None:
            arguments["prompt"] = [texts[row] for row in rows]
        else:
            index = torch.tensor(rows, device=self.device)
            arguments["negative_prompt"] = None  # PixArt's default "" collides with embeddings
            arguments |= {name: part[index] for name, part in encoded.items()}
            arguments |= {name: part.expand(len(rows), *part.shape[1:])
                          for name, part in (self._empty or {}).items() if self._guided}
        output = self.pipeline(**{k: v for k, v in arguments.items() if k in self._accepted})
        flags = getattr(output, "nsfw_content_detected", None)
        flagged = np.array(flags if flags is not None else [False] * len(rows), dtype=bool)
        return self._to_uint8(output.images), flagged

    def _to_uint8(self, images: torch.Tensor) -> np.ndarray:
        """Resize to the output size and round: float (b, 3, h, w) in [0, 1] -> uint8 (b, H, W, 3)."""
        images = images.float()
        size = self.spec.output_size
        if tuple(images.shape[-2:]) != (size, size):
            images = torch.nn.functional.interpolate(
                images, size=(size, size), mode="bicubic", antialias=True)
        finite = torch.isfinite(images).all()
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        if not bool(finite):
            raise UserError(f"generator {self.spec.id} gave non-finite pixels in {self.dtype}: "
                            "set dtype = \"bfloat16\" or \"float32\" in the preset")
        return pixels.cpu().numpy()

    def _truncated(self, texts: list[str]) -> np.ndarray:
        """Which texts are longer than every text encoder of the pipeline reads; logged."""
        fits = np.zeros(len(texts), dtype=bool)
        known = False
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(self.pipeline, name, None)
            if tokenizer is not None:
                known = True
                limit = self._limit(name, tokenizer)
                encoded = tokenizer(texts, truncation=False, verbose=False)
                fits |= np.array([len(ids) for ids in encoded.input_ids]) <= limit
        cut = ~fits if known else np.zeros(len(texts), dtype=bool)
        for text, is_cut in zip(texts, cut, strict=True):
            if is_cut:
                log.warning("prompt longer than the text encoder reads, cut: %.80s ...", text)
        return cut

    def _limit(self, name: str, tokenizer: Any) -> int:
        """How many tokens a text encoder of the pipeline reads."""
        default = inspect.signature(self.pipeline.__call__).parameters.get("max_sequence_length")
        encoder = getattr(self.pipeline, name.replace("tokenizer", "text_encoder"), None)
        is_t5 = encoder is not None and "t5" in type(encoder).__name__.lower()
        if is_t5 and default is not None and isinstance(default.default, int):
            return int(self.spec.options.get("max_sequence_length", default.default))
        return int(tokenizer.model_max_length)


def _can_compile(device: torch.device) -> bool:
    """Whether torch can compile here (it needs a C++ compiler, and Triton on a GPU), tried on a trifle."""
    def trifle(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).relu() * 2

    try:
        torch.compile(trifle, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # a backend raises whatever its compiler does
        log.warning("compile = true is left out: torch cannot compile here (%s: %.150s)",
                    type(error).__name__, " ".join(str(error).split()))
        return False
    return True


def decode_overflows_exactly(vae: Any) -> None:
    """Let an autoencoder decode a batch in float32 where it overflows in its own type, in place.

    Decoders of latents have activations near float16's end (65,504): one picture in many thousands
    would else end a run.
    """
    decode = vae.decode

    @functools.wraps(decode)
    def decode_again(latents: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        outcome, kind = decode(latents, *arguments, **options), vae.dtype
        if kind == torch.float32 or torch.isfinite(outcome[0]).all():
            return outcome
        log.warning("the image decoder overflowed in %s: this batch is decoded in float32", kind)
        try:
            vae.to(torch.float32)
            return decode(latents.float(), *arguments, **options)
        finally:
            vae.to(kind)

    vae.decode = decode_again


def tune_scheduler(scheduler: Any) -> None:
    """Both changes to a diffusers scheduler, in place; in float32 neither changes a number."""
    keep_latents_exact(scheduler)
    keep_timesteps_on_host(scheduler)


def keep_latents_exact(scheduler: Any) -> None:
    """Let a diffusers scheduler compute in float32 where the networks run in half precision.

    A pipeline hands the latents from step to step in the networks' type. Multistep schedulers add
    outputs with large weights of both signs (PNDM: 55, -59, 37, -9, all over 24), which multiplies
    bfloat16's rounding, and it adds up over the steps. Here the networks see rounded latents, but
    the next step starts from the exact ones.
    """
    step = scheduler.step
    given, exact = None, None

    @functools.wraps(step)
    def exact_step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *arguments: Any,
                   **options: Any) -> Any:
        nonlocal given, exact
        kind = model_output.dtype
        if kind not in (torch.float16, torch.bfloat16):
            return step(model_output, timestep, sample, *arguments, **options)
        whole = exact if sample is given else sample.float()
        outcome = step(model_output.float(), timestep, whole, *arguments, **options)
        exact = outcome[0]
        given = exact.to(kind)
        if isinstance(outcome, tuple):
            return (given, *outcome[1:])
        outcome["prev_sample"] = given
        return outcome

    scheduler.step = exact_step


def keep_timesteps_on_host(scheduler: Any) -> None:
    """Let a diffusers scheduler read its timesteps from host memory, in place; no number changes.

    A pipeline hands each step a timestep that lies on the device. Schedulers such as PNDM index
    tables in host memory with it, so the host waits for the device at every step and cannot queue
    the next one. Here ``step`` gets the same timestep from a copy on the host instead, and the
    first step is told its place in the schedule rather than searching it on the device.
    """
    plan, step = scheduler.set_timesteps, scheduler.step
    host: list[torch.Tensor] = []

    @functools.wraps(plan)  # pipelines ask for the signatures of both
    def set_timesteps(*arguments: Any, device: Any = None, **options: Any) -> None:
        plan(*arguments, device="cpu", **options)
        host[:] = scheduler.timesteps.flip(0).unbind()
        if device is not None and torch.device(device).type != "cpu":
            plan(*arguments, device=device, **options)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    @functools.wraps(step)
    def step_from_host(model_output: torch.Tensor, timestep: Any, *arguments: Any, **options: Any) -> Any:
        return step(model_output, host.pop() if host else timestep, *arguments, **options)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step_from_host


def _fuse_lora(pipeline: Any, spec: GeneratorSpec) -> None:
    """Fold a LoRA (such as LCM-LoRA) into the pipeline's weights."""
    try:
        import peft
    except ImportError as error:
        raise UserError("a preset with a lora needs the package peft: pip install peft") from error
    log.debug("peft %s", peft.__version__)
    folder = model_folder(str(spec.lora), None, ("*.safetensors", "*.json"))
    pipeline.load_lora_weights(str(folder))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
