"""Opening pictures of unknown origin: every pixel mode, and every kind of bad file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lib.errors import UserError
from lib.images import FORMATS, MAX_PIXELS, MAX_SIDE, open_image, png_bytes

RED = (200, 30, 20)


def close(picture: Image.Image, colour: tuple[int, int, int], tolerance: int = 3) -> bool:
    """Whether the middle pixel has about this colour."""
    pixel = picture.getpixel((picture.width // 2, picture.height // 2))
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance


def saved(tmp_path, picture: Image.Image, name: str, **options):
    path = tmp_path / name
    picture.save(path, **options)
    return path


@pytest.mark.parametrize(("mode", "value", "name", "expected"), [
    ("RGB", RED, "a.png", RED),
    ("L", 90, "a.png", (90, 90, 90)),
    ("1", 1, "a.png", (255, 255, 255)),
    ("RGBA", (0, 0, 0, 0), "a.png", (255, 255, 255)),
    ("RGBA", (0, 0, 0, 127), "a.png", (128, 128, 128)),
    ("LA", (0, 0), "a.png", (255, 255, 255)),
    ("I;16", 200 * 256, "a.png", (200, 200, 200)),
    ("I;16", 200 * 256, "a.tif", (200, 200, 200)),
    ("CMYK", (0, 255, 255, 0), "a.tif", (255, 0, 0)),
    ("CMYK", (0, 255, 255, 0), "a.jpg", (255, 0, 0)),
    ("RGB", RED, "a.webp", RED),
    ("RGB", RED, "a.bmp", RED),
])
def test_every_pixel_mode_becomes_rgb(tmp_path, mode, value, name, expected):
    path = saved(tmp_path, Image.new(mode, (24, 16), value), name)
    picture = open_image(path)
    assert picture.mode == "RGB" and picture.size == (24, 16)
    assert close(picture, expected, 8 if name.endswith((".jpg", ".webp")) else 1)


def test_palette_with_and_without_transparency(tmp_path):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, *RED])
    assert close(open_image(saved(tmp_path, picture, "plain.png")), RED)
    clear = saved(tmp_path, picture, "clear.png", transparency=1)
    assert close(open_image(clear), (255, 255, 255))


def test_transparent_colour_of_an_rgb_png(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (4, 4), RED), "a.png", transparency=RED)
    assert close(open_image(path), (255, 255, 255))


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, :15] = RED
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    path = saved(tmp_path, Image.fromarray(pixels), "a.png", exif=exif)
    picture = open_image(path)
    assert picture.size == (10, 30)
    assert picture.getpixel((5, 2)) == RED and picture.getpixel((5, 27)) == (0, 0, 0)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in (RED, (0, 0, 255))]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert close(open_image(path), RED, 10)


def test_content_decides_not_the_extension(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (5, 5), RED).save(path, format="PNG")
    assert close(open_image(path), RED)


@pytest.mark.parametrize("size", [(1, 1), (30_000, 2), (3, 9000)])
def test_extreme_sizes(tmp_path, size):
    picture = open_image(saved(tmp_path, Image.new("RGB", size, RED), "a.png"))
    assert max(picture.size) <= MAX_SIDE and min(picture.size) >= 1
    assert close(picture, RED)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size without having the pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="JPEG")
    return buffer.getvalue()


def avif_bytes() -> bytes:
    """An AVIF of which only the header is left; nothing where Pillow was built without that format."""
    if "AVIF" not in FORMATS:
        return b""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="AVIF")
    header, _, body = buffer.getvalue().partition(b"mdat")
    return header + b"mdat" + b"\xff" * len(body)


BAD = {
    "noise.avif": (avif_bytes(), "damaged or cut off|empty"),
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"this is not a picture", "not a picture"),
    "cut.jpg": (jpeg_bytes()[:900], "damaged or cut off"),
    "cut.png": (png_bytes(np.full((40, 40, 3), 7, np.uint8))[:70], "damaged or cut off"),
    "bomb.png": (png_header(30_000, 30_000), "too large"),
    "lying.png": (png_header(5000, 5000), "damaged or cut off"),
    "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_give_one_line(tmp_path, name):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        open_image(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_absent_file_folder_and_floats(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(UserError, match="not a file"):
        open_image(tmp_path)
    with pytest.raises(UserError, match="floating-point"):
        open_image(saved(tmp_path, Image.new("F", (4, 4), 0.5), "a.tif"))


def test_limits_leave_room_for_large_photographs():
    assert MAX_PIXELS > 108_000_000  # today's largest telephone cameras


def test_png_bytes_repeat_and_lose_nothing():
    pixels = np.random.default_rng(1).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    data = png_bytes(pixels)
    assert data == png_bytes(pixels.copy())
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
