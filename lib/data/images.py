"""Reading images of unknown origin: the content decides the format, of an animated file the first frame counts, the
EXIF orientation is applied, transparency is laid over white, 16-bit grey becomes 8-bit, CMYK becomes RGB without its
profile, and sides are reduced to MAX_SIDE (models look at 224 to 512 pixels)."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from lib.base import UserError

MAX_SIDE = 2048
# A closed list: readers that start other programs (EPS) or open documents (PDF) stay out.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
EXTENSIONS = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in {*FORMATS, "MPO"})
Image.MAX_IMAGE_PIXELS = 64_000_000  # Pillow refuses more than twice this by the header, and warns from it on
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # profiles of scanners and workflows of image tools exceed Pillow's 1 MB
PngImagePlugin.MAX_TEXT_MEMORY = 256 << 20


def decode_image(source: bytes | Path, name: str = "") -> Image.Image:
    """Return the image (content or path) in RGB, both sides 1..MAX_SIDE pixels; UserError if it is absent, empty, no
    image, damaged or above 128 million pixels. A JPEG that lacks only its end marker is read with a warning."""
    name = name or ("given" if isinstance(source, bytes) else str(source))
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise UserError(f"image {name} cannot be read ({error.strerror}): check the path") from error
    if not data:
        raise UserError(f"image {name} is empty (0 bytes): replace or remove it")
    try:
        return _to_rgb(ImageOps.exif_transpose(_decode_whole(data, name)))
    except Image.UnidentifiedImageError:
        reason = f"is not an image that can be read ({', '.join(FORMATS)}): convert it to JPEG or PNG"
    except Image.DecompressionBombError as error:
        reason = f"is too large ({error}): reduce it"
    except Exception as error:  # on damaged files Pillow's readers raise almost anything
        reason = f"is damaged or cut off ({error}): replace it"
    raise UserError(f"image {name} {reason}")


def _decode_whole(data: bytes, name: str) -> Image.Image:
    """The decoded image. What follows a complete JPEG does not change it, what follows a cut one does."""
    try:
        return _decode(data)
    except OSError:
        body = data.rstrip(b"\xff")
        ends = [_decode(body + filler + b"\xff\xd9") for filler in (b"", b"\x55" * 999) if data[:2] == b"\xff\xd8"]
        if not ends or ends[0].tobytes() != ends[1].tobytes():
            raise
    warnings.warn(f"image {name} lacks its JPEG end marker; nothing else is missing and it is used", stacklevel=3)
    return ends[0]


def _decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.draft(None, (MAX_SIDE, MAX_SIDE))  # JPEG only: decode at a reduced scale
    image.seek(0)
    image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any pixel mode as 8-bit RGB, any size as at most MAX_SIDE."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, save it with 8 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)  # (H, W)
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    image = image.convert("RGB")
    if max(image.size) > MAX_SIDE:
        width, height = (max(1, round(side * MAX_SIDE / max(image.size))) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image
