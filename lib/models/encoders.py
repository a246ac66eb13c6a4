"""Encoders: images or texts in, raw float32 embeddings out. ``lib.ranking`` normalises."""

import json
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from lib.base import UserError
from lib.models import as_pil
from lib.models.local import LocalModel, check_text_tower


class Encoder(LocalModel):
    """What every encoder shares: batches, and the check that numbers are finite.

    A subclass embeds one batch, (b, d), in ``_images`` and ``_texts``, or says that it does not read these.
    """

    reads_images: ClassVar[bool] = True
    reads_texts: ClassVar[bool] = True

    def _load(self) -> None:
        self.model = self._network(AutoModel)
        if self.reads_images:
            self._preprocess = self._processor(AutoImageProcessor)
        if self.reads_texts:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
            config = self.model.config.get_text_config()
            # Texts longer than the position table are cut, whatever the tokenizer's files say.
            self._longest = min(self.tokenizer.model_max_length, config.max_position_embeddings)
            check_text_tower(config, self.tokenizer, self.settings.id)

    def embed_images(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """Return raw embeddings, float32 (B, d). images: PIL, or uint8 arrays (H, W, 3)."""
        if not self.reads_images:
            raise UserError(f"encoder {self.settings.id} embeds texts only: choose another for image reconstruction")
        return self._embed(len(images), lambda rows: self._images([as_pil(image) for image in images[rows]]))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return raw embeddings, float32 (B, d)."""
        if not self.reads_texts:
            raise UserError(f"encoder {self.settings.id} embeds images only: choose another for text reconstruction")
        return self._embed(len(texts), lambda rows: self._texts(list(texts[rows])))

    def _embed(self, n: int, work: Callable[[slice], torch.Tensor]) -> np.ndarray:
        """Run ``work`` in batches and check the numbers."""
        if n == 0:
            return np.zeros((0, 0), np.float32)
        with torch.inference_mode():
            result = np.concatenate(self._run(n, lambda rows: work(rows).float().cpu().numpy()))
        self._check_finite(result)
        return result


class Clip(Encoder):
    """CLIP (Radford et al. 2021): one space for images and texts (paper 4.1).

    ``projected = false`` gives each tower's pooled features before its projection.
    """

    model_types = ("clip",)
    masked: ClassVar[bool] = True

    def _images(self, images: list[Image.Image]) -> torch.Tensor:
        inputs = self._preprocess(images, return_tensors="pt").to(self.device, self.dtype)
        tower = self.model.get_image_features if self.settings.projected else self.model.vision_model
        return tower(**inputs).pooler_output

    def _texts(self, texts: list[str]) -> torch.Tensor:
        # A fixed length, so that a row's numbers do not depend on its neighbours' lengths.
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=self._longest,
                                return_attention_mask=self.masked, return_token_type_ids=False, return_tensors="pt")
        tower = self.model.get_text_features if self.settings.projected else self.model.text_model
        return tower(**tokens.to(self.device)).pooler_output


class Siglip(Clip):
    """SigLIP (Zhai et al. 2023) and SigLIP 2: CLIP's towers under a sigmoid loss."""

    model_types = ("siglip", "siglip2")
    masked = False  # trained on full-length padding without one


class Dino(Encoder):
    """DINOv2 (Oquab et al. 2023) and its kin: images only, the normalised class token."""

    model_types = ("dinov2", "dinov2_with_registers", "dinov3_vit")
    reads_texts = False

    def _images(self, images: list[Image.Image]) -> torch.Tensor:
        inputs = self._preprocess(images, return_tensors="pt").to(self.device, self.dtype)
        return self.model(**inputs).pooler_output


class Sentence(Encoder):
    """Sentence encoders (Reimers and Gurevych 2019): texts only, pooled as the model's files say."""

    reads_images = False

    def _load(self) -> None:
        super()._load()
        pooling = self.folder / "1_Pooling" / "config.json"
        settings = json.loads(pooling.read_text(encoding="utf-8")) if pooling.is_file() else {}
        self._class_token = bool(settings.get("pooling_mode_cls_token", False))

    def _texts(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self._longest,
                                return_tensors="pt").to(self.device)
        hidden = self.model(**tokens).last_hidden_state  # (b, L, d)
        if self._class_token:
            return hidden[:, 0]
        mask = tokens.attention_mask[:, :, None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)
