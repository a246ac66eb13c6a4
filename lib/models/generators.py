"""Generators: captions in, uint8 images out (paper 3.3). Any diffusers text-to-image pipeline."""

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import diffusers
import diffusers.utils.logging as of_diffusers
import numpy as np
import torch
from transformers import CLIPImageProcessorPil

from lib.base import UserError
from lib.models import Images
from lib.models.hub import folder_of, wanted
from lib.models.local import LocalModel, check_text_tower
from lib.presets import GeneratorSettings

log = logging.getLogger(__name__)
of_diffusers.set_verbosity_error()
of_diffusers.disable_progress_bar()

# Arguments of a pipeline's call that options cannot set: they come from the preset's fields, or with each image.
_GIVEN = {"num_inference_steps", "guidance_scale", "height", "width", "prompt", "generator", "latents",
          "num_images_per_prompt", "output_type", "return_dict"}


class Diffusers(LocalModel):
    """A diffusers pipeline, called with prompts and one noise generator for each image."""

    half_on_gpu = True

    def _load(self) -> None:
        """Load the pipeline and check that it takes what the preset says."""
        self.pipeline = self._load_pipeline()
        self._accepted = inspect.signature(self.pipeline.__call__).parameters
        self._check_settings()
        self.tokenizer = getattr(self.pipeline, "tokenizer", None)
        pairs = [(getattr(self.pipeline, f"tokenizer{end}", None), getattr(self.pipeline, f"text_encoder{end}", None))
                 for end in ("", "_2", "_3")]
        # (tokenizer, how many tokens its text encoder reads); a copy, since each call may change a tokenizer's padding
        self._readers = [(copy.deepcopy(tokenizer), self._longest(tokenizer, encoder.config))
                         for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]

    def _load_pipeline(self) -> Any:
        """Load the pipeline, its scheduler and its LoRA, and move it to the device."""
        settings = self.settings
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            self.folder, dtype=self.dtype, variant=settings.variant, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, **self._safety_checker())
        if settings.scheduler is not None:  # another sampler over the noise schedule of the training
            pipeline.scheduler = getattr(diffusers, settings.scheduler).from_config(pipeline.scheduler.config)
        if settings.lora is not None:
            _fuse_lora(pipeline, settings)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(self.device)
        for network in (getattr(pipeline, name, None) for name in ("unet", "transformer", "vae")):
            if network is not None and settings.compile:
                getattr(network, "decoder", network).compile(dynamic=False)
        if self.device.type == "cpu":  # a tenth (U-Net) to a quarter (decoder) faster there; on a GPU it is slower
            for network in filter(None, (getattr(pipeline, name, None) for name in ("unet", "vae"))):
                network.to(memory_format=torch.channels_last)
        if self.dtype == torch.float16 and hasattr(pipeline, "vae"):
            _decode_again_in_float32(pipeline.vae)
        return pipeline

    def _safety_checker(self) -> dict[str, Any]:
        """Arguments that switch a pipeline's safety checker off, or make sure that it is there."""
        index = diffusers.DiffusionPipeline.load_config(self.folder, local_files_only=True)
        if not self.settings.safety_checker:
            absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return absent if "safety_checker" in index else {}
        if not any(index.get("safety_checker") or [None]):
            raise UserError(f"generator {self.settings.id} has no safety checker: set safety_checker = false")
        return {"feature_extractor": CLIPImageProcessorPil.from_pretrained(
            self.folder / "feature_extractor", local_files_only=True)}

    def _check_settings(self) -> None:
        """Raise UserError for what this pipeline cannot take, before anything is drawn."""
        settings, pipeline = self.settings, self.pipeline
        kind = type(pipeline).__name__
        if "prompt" not in self._accepted:
            raise UserError(f"model {settings.id} is a {kind}, which takes no prompt: choose a text-to-image pipeline")
        if wrong := settings.options.keys() - (self._accepted.keys() - _GIVEN):
            raise UserError(f"generator {settings.id}: options has {', '.join(sorted(wrong))}, which a {kind} does not "
                            "take or the preset sets by its own fields (steps, guidance, size): remove it")
        # Diffusion transformers read patches of 2 x 2 latents.
        factor = pipeline.vae_scale_factor * (2 if getattr(pipeline, "transformer", None) is not None else 1)
        if settings.size % factor:
            raise UserError(f"generator {settings.id}: size = {settings.size} is no multiple of {factor}, as {kind} needs")
        schedule = pipeline.scheduler.config
        most = schedule.get("original_inference_steps") or schedule.get("num_train_timesteps") or settings.steps
        if settings.steps > most:
            raise UserError(f"generator {settings.id}: steps = {settings.steps}, its schedule has {most}: use fewer")

    def _longest(self, tokenizer: Any, config: Any) -> int:
        """How many tokens a text encoder reads; UserError where its tokenizer does not fit it."""
        config = config.get_text_config()
        check_text_tower(config, tokenizer, self.settings.id)
        if config.model_type.startswith("clip"):
            # The pipeline pads to this; some tokenizers' files do not state it.
            tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
            return tokenizer.model_max_length
        usual = self._accepted.get("max_sequence_length")
        return self.settings.options.get("max_sequence_length", usual.default if usual else tokenizer.model_max_length)

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> Images:
        """Return one image for each (text, seed), seeds in [0, 2**63); none depends on another.

        The noise comes from the CPU, so that it is the same on every device.
        """
        truncated = self._truncated(texts)
        with torch.inference_mode():
            parts = self._run(len(texts), lambda rows: self._draw(list(texts[rows]), seeds[rows]))
        pixels, flagged = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Images(pixels, flagged, truncated)

    def _draw(self, texts: list[str], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Draw one batch: uint8 pixels (b, H, W, 3) and safety flags (b,)."""
        settings = self.settings
        arguments: dict[str, Any] = {
            **settings.options, "prompt": texts, "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance, "height": settings.size, "width": settings.size, "output_type": "pt",
            "use_resolution_binning": False, "clean_caption": False,  # PixArt: size and text as they were asked for
            "generator": [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]}
        pipeline = copy.copy(self.pipeline)  # a scheduler counts its steps: each thread needs its own
        pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
        output = pipeline(**{k: v for k, v in arguments.items() if k in self._accepted})
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(texts)
        return self._to_uint8(output.images), np.array(flags, dtype=bool)

    def _to_uint8(self, images: torch.Tensor) -> np.ndarray:
        """Resize to the output size and round: float (b, 3, h, w) in [0, 1] -> uint8 (b, H, W, 3)."""
        images, size = images.float(), self.settings.output_size
        if tuple(images.shape[-2:]) != (size, size):
            images = torch.nn.functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
        self._check_finite(images)
        return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _truncated(self, texts: Sequence[str]) -> np.ndarray:
        """Which texts are longer than every text encoder reads, bool (B,); each is logged once."""
        cut = np.full(len(texts), bool(self._readers))
        for tokenizer, longest in self._readers:
            tokens = tokenizer(list(texts), truncation=False, verbose=False).input_ids
            cut &= np.array([len(ids) for ids in tokens]) > longest
        for text in dict.fromkeys(text for text, is_cut in zip(texts, cut, strict=True) if is_cut):
            log.warning("prompt longer than the text encoder reads, cut: %.80s ...", text)
        return cut


def _decode_again_in_float32(vae: Any) -> None:
    """Let an autoencoder decode a batch in float32 where it overflows in float16: one image in many thousands."""
    decode = vae.decode

    def decode_again(latents: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        outcome = decode(latents, *arguments, **options)
        if torch.isfinite(outcome[0]).all():
            return outcome
        log.warning("the image decoder overflowed in float16: this batch is decoded in float32")
        vae.float()
        try:
            return decode(latents.float(), *arguments, **options)
        finally:
            vae.half()

    vae.decode = decode_again


def _fuse_lora(pipeline: Any, settings: GeneratorSettings) -> None:
    """Fold a LoRA (such as LCM-LoRA) into the pipeline's weights; UserError where none of it fits."""
    folder = folder_of(wanted(settings)[1])
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"lora {settings.lora} holds {len(files)} weight files ({', '.join(files) or 'none'}): name a "
                        "folder that holds one")
    pipeline.load_lora_weights(str(folder), weight_name=files[0])
    changes = [weight for part in pipeline.components.values() if isinstance(part, torch.nn.Module)
               for name, weight in part.named_parameters() if "lora_B" in name]
    if not any(bool(weight.any()) for weight in changes):
        raise UserError(f"lora {settings.lora} changes nothing in {settings.id}: none of its weights fits that model")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
