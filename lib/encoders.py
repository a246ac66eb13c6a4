"""Encoders: images or texts in, raw float32 embeddings out. Normalising is ranking's business."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from lib.errors import UserError
from lib.flops import Meter
from lib.hardware import Batches, pick_device, pick_dtype
from lib.presets import EncoderSpec
from lib.weights import load_transformer, loading, model_folder


class Encoder:
    """What every encoder shares: batching, distinct texts once, the finite check."""

    model_types: ClassVar[tuple[str, ...]] = ()
    half_on_gpu: ClassVar[bool] = False  # similarities are compared closely; float32 is cheap here
    networks: ClassVar[Mapping[str, tuple[str, ...]]] = {"model": ("",)}  # whose cost is counted

    def __init__(self, spec: EncoderSpec, device: str | torch.device | None = None) -> None:
        self.spec = spec
        self.device = pick_device(device)
        self.dtype = pick_dtype(spec.dtype, self.device, self.half_on_gpu)
        self.folder = model_folder(spec.id, spec.revision)
        self._batches = Batches(spec.batch_size, f"encoder {spec.id}", "input")
        with loading(spec.id):
            self._load()
        self.meter = Meter.of(getattr(self, "model", None), self.networks)

    def _load(self) -> None:
        """Set ``self.model`` and whatever prepares its inputs."""
        raise NotImplementedError

    def _load_model(self, model_class: Any) -> Any:
        """Load the weights as the given transformers class."""
        return load_transformer(model_class, self.folder, self.spec.id, self.dtype, self.device,
                                self.spec.attention, self.model_types)

    def embed_images(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """Return raw embeddings, float32 (B, d). Images: PIL, or uint8 arrays (H, W, 3)."""
        pictures = [rgb_picture(image) for image in images]
        return self._embed(len(pictures), lambda rows: self._images(pictures[rows]))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return raw embeddings, float32 (B, d); each distinct text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(distinct)}
        embedded = self._embed(len(distinct), lambda rows: self._texts(distinct[rows]))
        return embedded[[place[text] for text in texts]]

    def _embed(self, n: int, work: Callable[[slice], torch.Tensor]) -> np.ndarray:
        """Run ``work`` in batches and check the numbers."""
        if n == 0:
            return np.zeros((0, 0), dtype=np.float32)
        with torch.inference_mode():
            parts = self._batches.run(n, lambda rows: work(rows).float().cpu().numpy())
        result = np.concatenate(parts)
        if not np.isfinite(result).all():
            raise UserError(f"encoder {self.spec.id} gave non-finite embeddings in {self.dtype}: "
                            "set dtype = \"float32\" in the preset")
        return result

    def _images(self, images: list[Image.Image]) -> torch.Tensor:
        """Embed one batch of pictures, (b, d)."""
        raise UserError(f"encoder {self.spec.id} (adapter {self.spec.adapter}) embeds texts only: "
                        "choose another encoder for image reconstruction")

    def _texts(self, texts: list[str]) -> torch.Tensor:
        """Embed one batch of texts, (b, d)."""
        raise UserError(f"encoder {self.spec.id} (adapter {self.spec.adapter}) embeds images only: "
                        "choose another encoder for text reconstruction")


def rgb_picture(image: Image.Image | np.ndarray) -> Image.Image:
    """An RGB picture from a picture or a uint8 array (H, W, 3), without a file in between."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    return image if image.mode == "RGB" else image.convert("RGB")


class Clip(Encoder):
    """CLIP (Radford et al. 2021): one space for images and texts (paper 4.1).

    ``projected`` false gives each tower's pooled features before its projection.
    """

    model_types = ("clip",)
    networks: ClassVar = {"images": ("vision_model", "visual_projection"),
                          "texts": ("text_model", "text_projection")}

    def _load(self) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.model = self._load_model(CLIPModel)
        self.processor = CLIPProcessor.from_pretrained(
            self.folder, backend="pil", local_files_only=True, trust_remote_code=False)
        # Texts longer than the position table are cut, whatever the tokenizer's files say.
        self._longest = self.model.config.text_config.max_position_embeddings

    def _images(self, images: list[Image.Image]) -> torch.Tensor:
        pixels = self.processor.image_processor(images, return_tensors="pt").pixel_values
        pixels = pixels.to(self.device, self.dtype)
        if self.spec.projected:
            return self.model.get_image_features(pixel_values=pixels).pooler_output
        return self.model.vision_model(pixel_values=pixels).pooler_output

    def _texts(self, texts: list[str]) -> torch.Tensor:
        # A fixed length, so that a row's numbers do not depend on its neighbours' lengths.
        tokens = self.processor.tokenizer(texts, padding="max_length", truncation=True,
                                          max_length=self._longest, return_tensors="pt")
        inputs = {"input_ids": tokens.input_ids.to(self.device),
                  "attention_mask": tokens.attention_mask.to(self.device)}
        if self.spec.projected:
            return self.model.get_text_features(**inputs).pooler_output
        return self.model.text_model(**inputs).pooler_output


class Siglip(Encoder):
    """SigLIP (Zhai et al. 2023) and SigLIP 2: CLIP's towers under a sigmoid loss, no projection."""

    model_types = ("siglip", "siglip2")
    networks: ClassVar = {"images": ("vision_model",), "texts": ("text_model",)}

    def _load(self) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model = self._load_model(AutoModel)
        self._preprocess = AutoImageProcessor.from_pretrained(
            self.folder, backend="pil", local_files_only=True, trust_remote_code=False)
        self._tokenizer = AutoTokenizer.from_pretrained(
            self.folder, local_files_only=True, trust_remote_code=False)
        self._longest = self.model.config.text_config.max_position_embeddings

    def _images(self, images: list[Image.Image]) -> torch.Tensor:
        inputs = self._preprocess(images, return_tensors="pt").to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        return self.model.get_image_features(**inputs).pooler_output

    def _texts(self, texts: list[str]) -> torch.Tensor:
        # Trained on full-length padding without a mask.
        tokens = self._tokenizer(texts, padding="max_length", truncation=True,
                                 max_length=self._longest, return_tensors="pt")
        return self.model.get_text_features(input_ids=tokens.input_ids.to(self.device)).pooler_output


class Dino(Encoder):
    """DINOv2 (Oquab et al. 2023) and its kin: images only, the normalised class token."""

    model_types = ("dinov2", "dinov2_with_registers", "dinov3_vit")

    def _load(self) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.model = self._load_model(AutoModel)
        self._preprocess = AutoImageProcessor.from_pretrained(
            self.folder, backend="pil", local_files_only=True, trust_remote_code=False)

    def _images(self, images: list[Image.Image]) -> torch.Tensor:
        pixels = self._preprocess(images, return_tensors="pt").pixel_values
        return self.model(pixel_values=pixels.to(self.device, self.dtype)).pooler_output


class Sentence(Encoder):
    """Sentence encoders (Reimers and Gurevych 2019): texts only, pooled as the model's files say."""

    def _load(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.model = self._load_model(AutoModel)
        self._tokenizer = AutoTokenizer.from_pretrained(
            self.folder, local_files_only=True, trust_remote_code=False)
        self._longest = min(self._tokenizer.model_max_length,
                            self.model.config.max_position_embeddings)
        pooling = self.folder / "1_Pooling" / "config.json"
        settings = json.loads(pooling.read_text(encoding="utf-8")) if pooling.is_file() else {}
        self._class_token = bool(settings.get("pooling_mode_cls_token", False))

    def _texts(self, texts: list[str]) -> torch.Tensor:
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self._longest,
                                 return_tensors="pt").to(self.device)
        hidden = self.model(**tokens).last_hidden_state  # (b, L, d)
        if self._class_token:
            return hidden[:, 0]
        mask = tokens.attention_mask[:, :, None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)
