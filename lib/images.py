"""Opening pictures of unknown origin, and turning our own into PNG bytes.

Every picture from outside passes through :func:`open_image`. Its rules:

- the content decides the format, never the file name's extension;
- of an animated or many-paged file the first frame counts;
- the EXIF orientation is applied, as every viewer does;
- transparency is laid over white, 16-bit grey is scaled to 8 bit, CMYK goes to RGB without its
  colour profile;
- more than :data:`MAX_PIXELS` pixels are refused by the header, before anything is decoded;
- a side longer than :data:`MAX_SIDE` is reduced to it: the models look at 224 to 512 pixels, and a
  shard of sources must fit into memory.
"""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lib.errors import UserError

MAX_PIXELS = 128_000_000
MAX_SIDE = 2048
# A closed list: readers that start other programs (EPS) or open documents (PDF) stay out.
Image.init()  # registers the readers, of which some depend on how Pillow was built
FORMATS = tuple(
    name
    for name in ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
    if name in Image.OPEN
)
EXTENSIONS = frozenset(
    [".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2"]
)
# What Pillow's readers raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError,
           OverflowError, TypeError, KeyError, MemoryError, RuntimeError)


def open_image(path: str | Path) -> Image.Image:
    """Open a picture file by the rules above.

    Returns an RGB picture, loaded, both sides 1..MAX_SIDE pixels.
    Raises UserError naming the file if it is absent, empty, not a picture, damaged or too large.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"image {path} does not exist or is not a file: check the path")
        if path.stat().st_size == 0:
            raise UserError(f"image {path} is empty (0 bytes): replace or remove it")
        with path.open("rb") as stream:
            return decode_image(stream, str(path))
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {error.strerror or error}") from error


def decode_image(stream: io.BufferedIOBase, name: str) -> Image.Image:
    """Decode an opened picture file; ``name`` is what messages call it. See :func:`open_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own, stricter limit follows
            picture = Image.open(stream, formats=FORMATS)
            _check_size(picture, name)
            picture.draft(None, (MAX_SIDE, MAX_SIDE))  # JPEG only: decode at a reduced scale
            picture.seek(0)
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture), name)
    except Image.UnidentifiedImageError as error:
        raise UserError(
            f"image {name} is not a picture that can be read ({', '.join(FORMATS)}): "
            "convert it to JPEG or PNG"
        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} is too large ({error}): reduce it") from error
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"image {name} is damaged or cut off ({error}): replace it") from error


def _check_size(picture: Image.Image, name: str) -> None:
    """Refuse a picture whose header promises more pixels than we are ready to decode."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"image {name} is too large ({width} x {height} pixels, at most "
            f"{MAX_PIXELS // 1_000_000} million): reduce it"
        )


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """Bring any pixel mode to 8-bit RGB and any size to at most MAX_SIDE."""
    if picture.mode == "F":
        raise UserError(f"image {name} has floating-point pixels: save it with 8 bits a channel")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = _grey_16_to_8(picture)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = _over_white(picture)
    picture = picture.convert("RGB")
    if max(picture.size) > MAX_SIDE:
        scale = MAX_SIDE / max(picture.size)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def _grey_16_to_8(picture: Image.Image) -> Image.Image:
    """16-bit grey to 8 bit by the high byte; Pillow's own conversion would clip at 255."""
    values = np.asarray(picture).astype(np.int64)  # (H, W)
    return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))


def _over_white(picture: Image.Image) -> Image.Image:
    """Lay a transparent picture over white."""
    layer = picture.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer)


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels (H, W, 3) as PNG; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def data_uri(picture: Image.Image | np.ndarray, small: int, largest: int) -> tuple[str, bool]:
    """A picture as a data URI for a page, and whether to enlarge it without smoothing.

    Up to ``small`` pixels a side it is kept as it is (PNG); a larger one is reduced to ``largest``
    and travels as JPEG.
    """
    shown = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture.convert("RGB")
    crisp = max(shown.size) <= small
    if crisp:
        kind, data = "png", png_bytes(np.asarray(shown))
    else:
        shown.thumbnail((largest, largest))  # of the copy that convert has made
        buffer = io.BytesIO()
        shown.save(buffer, format="JPEG", quality=90)
        kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", crisp
