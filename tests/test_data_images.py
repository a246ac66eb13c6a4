"""Images of unknown origin: every pixel mode, odd but whole files, and every kind of bad file."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lib.base import UserError
from lib.data import decode_image, load_dataset
from lib.data.images import MAX_SIDE

RED = (200, 30, 20)


def middle(image: Image.Image, colour, tolerance: int = 3) -> bool:
    """Whether the middle pixel has about this colour."""
    pixel = image.getpixel((image.width // 2, image.height // 2))
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(kind: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), kind, **options)


@pytest.mark.parametrize(("mode", "value", "kind", "expected"), [
    ("RGB", RED, "PNG", RED), ("L", 90, "PNG", (90, 90, 90)), ("1", 1, "PNG", (255, 255, 255)),
    ("RGBA", (0, 0, 0, 0), "PNG", (255, 255, 255)), ("RGBA", (0, 0, 0, 127), "PNG", (128, 128, 128)),
    ("LA", (0, 0), "PNG", (255, 255, 255)), ("I;16", 200 * 256, "PNG", (200, 200, 200)),
    ("I;16", 200 * 256, "TIFF", (200, 200, 200)), ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
    ("CMYK", (0, 255, 255, 0), "JPEG", (255, 0, 0)), ("RGB", RED, "WEBP", RED), ("RGB", RED, "BMP", RED)])
def test_every_pixel_mode_becomes_rgb(mode, value, kind, expected):
    image = decode_image(saved(Image.new(mode, (24, 16), value), kind))
    assert image.mode == "RGB" and image.size == (24, 16)
    assert middle(image, expected, 8 if kind in ("JPEG", "WEBP") else 1)


def test_palettes_and_transparent_colours():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    assert middle(decode_image(saved(image, "PNG")), RED)
    assert middle(decode_image(saved(image, "PNG", transparency=1)), (255, 255, 255))
    assert middle(decode_image(saved(Image.new("RGB", (4, 4), RED), "PNG", transparency=RED)), (255, 255, 255))


@pytest.mark.filterwarnings("ignore:Image size")
def test_exif_orientation_first_frame_and_extreme_sizes():
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, :15] = RED
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    image = decode_image(saved(Image.fromarray(pixels), "PNG", exif=exif))
    assert image.size == (10, 30) and image.getpixel((5, 2)) == RED and image.getpixel((5, 27)) == (0, 0, 0)
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    assert middle(decode_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])), RED, 10)
    for size in ((1, 1), (30_000, 2), (3, 9000)):
        image = decode_image(saved(Image.new("RGB", size, RED), "PNG"))
        assert max(image.size) <= MAX_SIDE and min(image.size) >= 1 and middle(image, RED)
    image = decode_image(saved(Image.new("RGB", (6_000, 4_000), RED), "JPEG"))  # of a large camera
    assert max(image.size) <= MAX_SIDE and middle(image, RED)


def test_png_with_a_large_profile_and_large_texts():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_itxt("parameters", "ü" * 2_000_000)
    profile = np.random.default_rng(0).bytes(3_000_000)
    assert decode_image(saved(Image.new("RGB", (9, 9), RED), "PNG", pnginfo=info, icc_profile=profile)).size == (9, 9)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 99}])
def test_a_jpeg_without_its_end_marker_is_read_with_a_warning(options):
    data = noise("JPEG", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = decode_image(data)
    for cut in (1, 2):
        with pytest.warns(UserWarning, match=r"image x\.jpg lacks its JPEG end marker"):
            image = decode_image(data[:-cut], "x.jpg")
        assert image.tobytes() == whole.tobytes()
    for cut in (20, 500, len(data) // 2):
        with pytest.raises(UserError, match="damaged or cut off"):
            decode_image(data[:-cut])


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that are not there."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


BAD = {
    "absent.jpg": (None, "cannot be read .* check the path"),
    "empty.jpg": (b"", "is empty .* replace or remove it"),
    "page.jpg": (b"<!DOCTYPE html><html></html>", "not an image"),
    "cut.jpg": (noise("JPEG")[:900], "damaged or cut off .* replace it"),
    "lying.png": (png(64, 64), "damaged or cut off"),
    "large.png": (png(12_000, 12_000), "too large .* reduce it"),
    "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "float.tif": (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_give_one_line(tmp_path, name):
    content, reason = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        decode_image(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_all_bad_images_are_named_at_once_and_odd_ones_pass(tmp_path):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    (tmp_path / "1.gif").write_bytes(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    (tmp_path / "2.jpg").write_bytes(saved(frames[1], "PNG"))  # the content decides, not the name
    load_dataset(f"folder:{tmp_path}").check_images()
    for name in ("4.jpg", "5.png", "6.tif"):
        (tmp_path / name).write_text("<html>404</html>")
    dataset = load_dataset(f"folder:{tmp_path}")
    with pytest.raises(UserError, match=r"3 of 5 images cannot be read: 4\.jpg, 5\.png, 6\.tif; .*not an im") as told:
        dataset.check_images()
    assert "\n" not in str(told.value) and dataset.fingerprint
