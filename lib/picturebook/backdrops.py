"""The picture book's six settings as soft 64 x 64 backdrops, three variants each.

Backdrops are paler and less saturated than sprites, so that sprites stand out.
Ground or water fills the picture from about y = 40 down; objects stand at y = 56.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]

SIDE = 64
SUPERSAMPLE = 8
VARIANTS = 3

_SUN_X = (13.0, 51.0, 33.0)
_CLOUDS = (
    ((40.0, 10.0, 1.0), (56.0, 19.0, 0.7)),
    ((14.0, 12.0, 1.0), (32.0, 20.0, 0.7)),
    ((10.0, 18.0, 0.8), (53.0, 11.0, 1.0)),
)


def _scatter(count: int, variant: int, top: float, bottom: float) -> list[tuple[float, float]]:
    """Evenly scattered pixel centres with `top` <= y < `bottom`, a different part of one sequence per variant.

    The steps are the powers of the plastic number's inverse, which spread points without lines or clumps.
    """
    places = range(1 + variant * count, 1 + (variant + 1) * count)
    return [
        (math.floor(0.7548777 * n % 1 * SIDE) + 0.5, math.floor(top + 0.5698403 * n % 1 * (bottom - top)) + 0.5)
        for n in places
    ]


class _Canvas:
    """A supersampled RGB canvas addressed in final pixels, 0 to 64."""

    def __init__(self, top: Rgb, bottom: Rgb) -> None:
        size = (SIDE * SUPERSAMPLE, SIDE * SUPERSAMPLE)
        # The sky's gradient ends near the horizon: stretch the 256-step ramp over the upper 45 pixels.
        ramp = Image.new("L", size, 255)
        ramp.paste(Image.linear_gradient("L").resize((size[0], 45 * SUPERSAMPLE)), (0, 0))
        self.image = Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), ramp)
        self._draw = ImageDraw.Draw(self.image)

    def oval(self, cx: float, cy: float, rx: float, ry: float, fill: Rgb) -> None:
        """Filled ellipse."""
        box = [value * SUPERSAMPLE for value in (cx - rx, cy - ry, cx + rx, cy + ry)]
        self._draw.ellipse(box, fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb) -> None:
        """Filled rectangle; the far edges are exclusive."""
        self._draw.rectangle([x0 * SUPERSAMPLE, y0 * SUPERSAMPLE, x1 * SUPERSAMPLE - 1, y1 * SUPERSAMPLE - 1], fill=fill)

    def stroke(self, points: list[tuple[float, float]], width: float, fill: Rgb) -> None:
        """Polyline."""
        scaled = [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points]
        self._draw.line(scaled, fill=fill, width=round(width * SUPERSAMPLE), joint="curve")

    def crescent(self, cx: float, cy: float, radius: float, fill: Rgb) -> None:
        """A moon open to the right: a circle's arc closed by the arc of a smaller circle."""
        tip = math.radians(50)
        hollow = 0.45  # centre of the inner circle, in radii to the right
        inner = math.hypot(math.cos(tip) - hollow, math.sin(tip))
        start = math.atan2(math.sin(tip), math.cos(tip) - hollow)
        arc = []
        for step in range(25):
            turn = tip + (math.tau - 2 * tip) * step / 24
            arc.append((math.cos(turn), math.sin(turn)))
        for step in range(25):
            turn = math.tau - start - (math.tau - 2 * start) * step / 24
            arc.append((hollow + inner * math.cos(turn), inner * math.sin(turn)))
        self._draw.polygon([(SUPERSAMPLE * (cx + radius * x), SUPERSAMPLE * (cy + radius * y)) for x, y in arc], fill=fill)

    def hill(self, height: float, swing: float, waves: float, phase: float, fill: Rgb) -> None:
        """Fill below a sine ridge about y = `height` with `waves` periods over the width."""
        ridge = [
            (x * SUPERSAMPLE, SUPERSAMPLE * (height - swing * math.sin(math.tau * waves * x / SIDE + phase)))
            for x in range(SIDE + 1)
        ]
        floor = SIDE * SUPERSAMPLE
        self._draw.polygon([*ridge, (floor, floor), (0, floor)], fill=fill)

    def clouds(self, variant: int, fill: Rgb = (252, 253, 255)) -> None:
        """Two puffy clouds per variant."""
        for x, y, size in _CLOUDS[variant]:
            self.oval(x, y, 7 * size, 2.4 * size, fill)
            self.oval(x - 2 * size, y - 1.6 * size, 3.2 * size, 2.8 * size, fill)
            self.oval(x + 2.4 * size, y - 1 * size, 2.8 * size, 2.4 * size, fill)

    def sun(self, variant: int, fill: Rgb = (255, 240, 176)) -> None:
        """A pale sun with a halo."""
        self.oval(_SUN_X[variant], 10, 6.6, 6.6, (250, 246, 218))
        self.oval(_SUN_X[variant], 10, 4.6, 4.6, fill)

    def finish(self) -> Image.Image:
        """Box-reduce to 64 x 64."""
        return self.image.reduce(SUPERSAMPLE)


def _meadow(variant: int) -> Image.Image:
    canvas = _Canvas((190, 224, 246), (232, 245, 250))
    canvas.sun(variant)
    canvas.clouds(variant)
    phase = (0.4, 2.3, 4.2)[variant]
    canvas.hill(37, 4.5, 1.1, phase, (190, 222, 172))
    canvas.hill(42, 2.4, 0.8, phase + 2.2, (172, 212, 150))
    for x, y in _scatter(9, variant, 47, 63):
        for lean in (-1.7, 1.7):
            canvas.stroke([(x, y), (x + lean, y - 2.4)], 0.7, (138, 186, 118))
    return canvas.finish()


def _beach(variant: int) -> Image.Image:
    canvas = _Canvas((186, 226, 246), (234, 246, 250))
    canvas.sun(variant)
    canvas.clouds(variant)
    canvas.box(0, 32, 64, 64, (150, 206, 226))
    for step in range(4):
        x = (step * 17 + variant * 6) % 58
        canvas.stroke([(x, 34.6 + step % 2 * 2), (x + 6, 34.6 + step % 2 * 2)], 0.6, (204, 234, 242))
    phase = (0.2, 2.2, 4.4)[variant]
    canvas.hill(40.2, 1.2, 1.3, phase, (240, 248, 248))
    canvas.hill(41.6, 1.2, 1.3, phase, (244, 226, 180))
    for x, y in _scatter(14, variant, 45, 63):
        canvas.oval(x, y, 0.7, 0.5, (224, 202, 152))
    return canvas.finish()


def _sea(variant: int) -> Image.Image:
    canvas = _Canvas((206, 230, 246), (240, 247, 250))
    canvas.sun(variant)
    canvas.clouds(variant)
    canvas.box(0, 36, 64, 64, (150, 200, 228))
    canvas.box(0, 45, 64, 64, (132, 186, 220))
    canvas.box(0, 55, 64, 64, (116, 172, 212))
    for row, y in enumerate((39.5, 44.5, 49.5, 55, 60.5)):
        for column in range(-1, 4):
            x = column * 18 + row * 7 + variant * 5
            wave = [(x + t, y - 1.6 * abs(math.sin(math.pi * t / 5))) for t in range(11)]
            canvas.stroke(wave, 0.8, (186, 220, 240))
    return canvas.finish()


def _snow(variant: int) -> Image.Image:
    canvas = _Canvas((176, 204, 230), (214, 230, 243))
    phase = (0.8, 2.9, 5.0)[variant]
    canvas.hill(36, 5, 1.0, phase, (206, 221, 238))
    canvas.hill(39.5, 3, 0.7, phase + 1.8, (224, 234, 245))
    canvas.hill(44, 1.6, 0.9, phase + 3.6, (236, 242, 249))
    for x, y in _scatter(24, variant, 0, 42):
        canvas.oval(x, y, 0.9, 0.9, (253, 254, 255))
    for x, y in _scatter(6, variant, 48, 63):
        canvas.stroke([(x, y), (x + 5, y)], 0.6, (212, 224, 240))
    return canvas.finish()


def _night(variant: int) -> Image.Image:
    canvas = _Canvas((58, 72, 128), (108, 122, 172))
    for index, (x, y) in enumerate(_scatter(18, variant, 2, 33)):
        if math.hypot(x - _SUN_X[variant], y - 11) < 10:  # no star within the moon's round
            continue
        canvas.oval(x, y, 0.7, 0.7, (246, 240, 200))
        if index % 4 == 0:
            canvas.oval(x, y, 1.5, 0.4, (222, 220, 206))
            canvas.oval(x, y, 0.4, 1.5, (222, 220, 206))
    canvas.crescent(_SUN_X[variant], 11, 6, (250, 242, 206))
    phase = (0.5, 2.6, 4.6)[variant]
    canvas.hill(37, 4, 1.0, phase, (92, 126, 150))
    canvas.hill(42, 2, 0.8, phase + 2.4, (80, 114, 130))
    for x, y in _scatter(8, variant, 47, 63):
        canvas.stroke([(x, y), (x + 0.8, y - 2.2)], 0.6, (104, 140, 150))
    return canvas.finish()


_SKYLINES = (
    ((0, 11, 24), (11, 9, 16), (20, 12, 27), (32, 10, 19), (42, 9, 13), (51, 13, 25)),
    ((0, 9, 15), (9, 12, 25), (21, 10, 20), (31, 13, 29), (44, 10, 17), (54, 10, 22)),
    ((0, 13, 27), (13, 10, 20), (23, 9, 14), (32, 12, 23), (44, 9, 18), (53, 11, 28)),
)


def _city(variant: int) -> Image.Image:
    canvas = _Canvas((206, 222, 238), (242, 240, 234))
    canvas.clouds(variant)
    for index, (left, width, top) in enumerate(_SKYLINES[variant]):
        wall = ((178, 190, 208), (190, 201, 216), (168, 182, 203))[index % 3]
        canvas.box(left, top, left + width, 44, wall)
        for y in range(top + 3, 39, 4):
            for x in range(left + 2, left + width - 2, 3):
                canvas.box(x, y, x + 1.4, y + 2, (238, 232, 204) if (x * 7 + y * 3) % 5 else (206, 216, 228))
    canvas.box(0, 41, 64, 46, (214, 214, 216))
    canvas.box(0, 45.4, 64, 46.2, (184, 186, 192))
    canvas.box(0, 46.2, 64, 64, (172, 174, 182))
    for step in range(-1, 5):
        x = step * 15 + variant * 5
        canvas.box(x, 59.4, x + 8, 60.8, (232, 230, 220))
    return canvas.finish()


_DRAWINGS: dict[str, Callable[[int], Image.Image]] = {
    "meadow": _meadow,
    "beach": _beach,
    "sea": _sea,
    "snow": _snow,
    "night": _night,
    "city": _city,
}
SETTINGS: tuple[str, ...] = tuple(_DRAWINGS)


@cache
def backdrop(setting: str, variant: int) -> Image.Image:
    """Draw the backdrop of a setting; `variant` is 0, 1 or 2.

    Returns an RGB image of 64 x 64 pixels that is shared by the cache: copy it
    before drawing on it. Raises ValueError for an unknown setting or variant.
    """
    if setting not in _DRAWINGS:
        raise ValueError(f"unknown setting {setting!r}: use one of {', '.join(SETTINGS)}")
    if variant not in range(VARIANTS):
        raise ValueError(f"unknown backdrop variant {variant!r}: use 0 to {VARIANTS - 1}")
    return _DRAWINGS[setting](variant)
