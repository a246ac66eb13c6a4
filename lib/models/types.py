"""What passes between models: captions and images. Free of torch, so that reading rows stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Caption:
    """A caption without its prompt.

    logprob: sum of the natural-log probabilities of its tokens, the end token included, under the
    model's full distribution (never of the filtered one). n_tokens: new tokens without the end.
    """

    text: str
    logprob: float
    n_tokens: int


@dataclass(frozen=True, eq=False)
class Images:
    """pixels uint8 (B, H, W, 3); flagged bool (B,): the safety checker blacked the image out;
    truncated bool (B,): the prompt was longer than the text encoder reads."""

    pixels: np.ndarray
    flagged: np.ndarray
    truncated: np.ndarray

    @classmethod
    def of(cls, output: Any) -> Images:
        """Return Images of what a generator gave: Images, or plain uint8 pixels (B, H, W, 3)."""
        if hasattr(output, "pixels"):
            return output
        pixels = np.asarray(output)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise TypeError(f"a generator gives uint8 (B, H, W, 3), not {pixels.dtype} {pixels.shape}")
        nothing = np.zeros(len(pixels), dtype=bool)
        return cls(pixels, nothing, nothing)


def as_pil(image: Image.Image | np.ndarray) -> Image.Image:
    """Return an RGB image from a PIL image or a uint8 array (H, W, 3)."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    return image if image.mode == "RGB" else image.convert("RGB")
