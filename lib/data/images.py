"""Reading images of unknown origin. The rules:

- the content decides the format, never the file name;
- of an animated or many-paged file the first frame counts;
- the EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bit, CMYK goes to
  RGB without its colour profile;
- more than MAX_PIXELS pixels are refused by the header, before anything is decoded;
- a side longer than MAX_SIDE is reduced to it: the models look at 224 to 512 pixels.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from lib.base import UserError

MAX_PIXELS = 128_000_000
MAX_SIDE = 2048
# A closed list: readers that start other programs (EPS) or open documents (PDF) stay out.
_EXTENSIONS = Image.registered_extensions()  # also registers the readers, some of which Pillow may lack
FORMATS = tuple(name for name in ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
                if name in Image.OPEN)
EXTENSIONS = frozenset(extension for extension, name in _EXTENSIONS.items() if name in FORMATS)
# What Pillow's readers raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, OverflowError,
           TypeError, KeyError, MemoryError, RuntimeError)
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # profiles of scanners and workflows of image tools exceed Pillow's 1 MB
PngImagePlugin.MAX_TEXT_MEMORY = 256 << 20
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is stricter


def decode_image(source: bytes | Path, name: str = "") -> Image.Image:
    """Return the image in RGB, both sides 1..MAX_SIDE pixels, read by the rules above.

    source: the file's content or path; name: what messages call it. UserError, in one line that names it, if it is
    absent, empty, no image, damaged or too large. A JPEG that lacks only its end marker is read with a warning.
    """
    name = name or ("given" if isinstance(source, bytes) else str(source))
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise UserError(f"image {name} cannot be read ({error.strerror}): check the path") from error
    if not data:
        raise UserError(f"image {name} is empty (0 bytes): replace or remove it")
    try:
        return _to_rgb(ImageOps.exif_transpose(_load(data, name)), name)
    except Image.UnidentifiedImageError as error:
        raise UserError(f"image {name} is not an image that can be read ({', '.join(FORMATS)}): "
                        "convert it to JPEG or PNG") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} is too large ({error}): reduce it") from error
    except _DAMAGE as error:
        raise UserError(f"image {name} is damaged or cut off ({error}): replace it") from error


def png_bytes(pixels: np.ndarray) -> bytes:
    """Return uint8 pixels (H, W, 3) as PNG; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _load(data: bytes, name: str) -> Image.Image:
    """The decoded first frame. Data after a complete JPEG change nothing, data within a cut one do."""
    try:
        return _decode(data, name)
    except OSError:
        if not data.startswith(b"\xff\xd8"):
            raise
        body = data.rstrip(b"\xff")
        image, other = (_decode(body + filler + b"\xff\xd9", name) for filler in (b"", b"\x55" * 999))
        if image.tobytes() != other.tobytes():
            raise
    warnings.warn(f"image {name} lacks its JPEG end marker; nothing else is missing and it is used", stacklevel=3)
    return image


def _decode(data: bytes, name: str) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"image {name} is too large ({width} x {height} pixels, at most "
                        f"{MAX_PIXELS // 1_000_000} million): reduce it")
    image.draft(None, (MAX_SIDE, MAX_SIDE))  # JPEG only: decode at a reduced scale
    image.seek(0)
    image.load()
    return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any pixel mode as 8-bit RGB, any size as at most MAX_SIDE."""
    if image.mode == "F":
        raise UserError(f"image {name} has floating-point pixels: save it with 8 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)  # (H, W)
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    image = image.convert("RGB")
    if max(image.size) > MAX_SIDE:
        scale = MAX_SIDE / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image
