"""Vector pen for the picture book: outlined flat shapes on a supersampled canvas.

Sprites are designed on a square of 32 x 32 units (x to the right, y down) and
drawn at `SUPERSAMPLE` times the final size. A shape is grown by the outline's
width to draw its border first, so that shapes of one blob share one border.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]
Point = tuple[float, float]

UNITS = 32.0
SUPERSAMPLE = 8
OUTLINE_PX = 0.8  # border width in final pixels, the same at every sprite size

COLOURS: dict[str, Rgb] = {
    "red": (222, 52, 50),
    "orange": (246, 138, 36),
    "yellow": (252, 212, 56),
    "green": (62, 160, 74),
    "blue": (52, 112, 208),
    "purple": (142, 78, 186),
    "white": (250, 250, 248),
    "black": (42, 42, 50),
}

WHITE: Rgb = (252, 252, 252)
INK: Rgb = (38, 36, 46)
BEAK: Rgb = (246, 150, 36)
GOLD: Rgb = (252, 206, 72)
WOOD: Rgb = (150, 100, 62)
LEAF: Rgb = (92, 158, 84)
GLASS: Rgb = (196, 228, 244)
TYRE: Rgb = (58, 58, 68)
HUB: Rgb = (206, 208, 214)
PINK: Rgb = (244, 160, 168)
FROST: Rgb = (206, 216, 230)


def mix(first: Rgb, second: Rgb, share: float) -> Rgb:
    """Blend `share` (0 to 1) of `second` into `first`."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))  # type: ignore[return-value]


def lightness(colour: Rgb) -> float:
    """Approximate luma of an RGB colour, 0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def border(colour: Rgb) -> Rgb:
    """Outline colour of a fill: darker, but lighter where the fill is near black."""
    if lightness(colour) < 64:
        return mix(colour, (176, 182, 206), 0.5)
    if min(colour) > 225:
        return (112, 122, 146)
    return mix(colour, (20, 16, 34), 0.5)


def shade(colour: Rgb) -> Rgb:
    """A second tone of the same colour, for wings, fins and far sides."""
    if lightness(colour) < 64:
        return mix(colour, WHITE, 0.16)
    return mix(colour, (30, 30, 60), 0.15)


def tint(colour: Rgb) -> Rgb:
    """A lighter tone that still reads as the same colour."""
    if min(colour) > 225:
        return (228, 232, 240)
    return mix(colour, WHITE, 0.16 if lightness(colour) < 64 else 0.3)


def distinct(colour: Rgb, preferred: Rgb, other: Rgb) -> Rgb:
    """`preferred`, unless it would melt into `colour`; then `other`."""
    return preferred if math.dist(colour, preferred) > 70 else other


class Shape(Protocol):
    """Anything that can be painted, grown on every side by some supersampled pixels."""

    def paint(self, draw: ImageDraw.ImageDraw, scale: float, grow: float, fill: Rgb) -> None:
        """Paint in `fill`; `scale` is supersampled pixels per unit."""


@dataclass(frozen=True)
class Oval:
    """Ellipse of radii `rx`, `ry` units about (`cx`, `cy`), turned clockwise by `turn` degrees."""

    cx: float
    cy: float
    rx: float
    ry: float
    turn: float = 0.0

    def paint(self, draw: ImageDraw.ImageDraw, scale: float, grow: float, fill: Rgb) -> None:
        """See `Shape.paint`."""
        rx, ry = self.rx * scale + grow, self.ry * scale + grow
        cx, cy = self.cx * scale, self.cy * scale
        if not self.turn:
            draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=fill)
            return
        cos, sin = math.cos(math.radians(self.turn)), math.sin(math.radians(self.turn))
        ring = [(rx * math.cos(t * math.pi / 18), ry * math.sin(t * math.pi / 18)) for t in range(36)]
        draw.polygon([(cx + x * cos - y * sin, cy + x * sin + y * cos) for x, y in ring], fill=fill)


@dataclass(frozen=True)
class Poly:
    """Polygon (or, if not `closed`, a polyline) through `points`, its edges `soft` units round."""

    points: tuple[Point, ...]
    soft: float = 0.0
    closed: bool = True

    def paint(self, draw: ImageDraw.ImageDraw, scale: float, grow: float, fill: Rgb) -> None:
        """See `Shape.paint`."""
        points = [(x * scale, y * scale) for x, y in self.points]
        radius = self.soft * scale + grow
        if self.closed:
            draw.polygon(points, fill=fill)
            points.append(points[0])
        if radius < 0.5:
            return
        draw.line(points, fill=fill, width=round(2 * radius))
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def disc(cx: float, cy: float, radius: float) -> Oval:
    """Circle."""
    return Oval(cx, cy, radius, radius)


def poly(*points: Point, soft: float = 0.0) -> Poly:
    """Closed polygon; `soft` rounds and grows it by that many units."""
    return Poly(points, soft)


def path(*points: Point, width: float) -> Poly:
    """Open stroke with round ends."""
    return Poly(points, width / 2, closed=False)


def box(x0: float, y0: float, x1: float, y1: float, soft: float = 0.0) -> Poly:
    """Axis-parallel rectangle with outer bounds as given and corners of radius `soft`."""
    a, b, c, d = x0 + soft, y0 + soft, x1 - soft, y1 - soft
    return Poly(((a, b), (c, b), (c, d), (a, d)), soft)


class Pen:
    """Draws one sprite of dominant colour `body` onto a transparent supersampled canvas."""

    def __init__(self, side: int, body: Rgb) -> None:
        pixels = side * SUPERSAMPLE
        self.body = body
        # One extra row of final pixels below keeps the border of feet and wheels whole.
        self.image = Image.new("RGBA", (pixels, pixels + SUPERSAMPLE))
        self._draw = ImageDraw.Draw(self.image)
        self._scale = pixels / UNITS

    def blob(self, fill: Rgb, *shapes: Shape) -> None:
        """Paint shapes as one outlined blob."""
        for shape in shapes:
            shape.paint(self._draw, self._scale, OUTLINE_PX * SUPERSAMPLE, border(fill))
        self.flat(fill, *shapes)

    def flat(self, fill: Rgb, *shapes: Shape) -> None:
        """Paint shapes without an outline."""
        for shape in shapes:
            shape.paint(self._draw, self._scale, 0.0, fill)

    def eye(self, x: float, y: float, radius: float = 1.3) -> None:
        """A bright eye with a dark pupil, visible on every body colour."""
        self.flat(WHITE, disc(x, y, radius * 1.5))
        self.flat(INK, disc(x + radius * 0.2, y, radius))

    def finish(self) -> Image.Image:
        """Settle the drawing on the bottom edge, centre it, and reduce to the final size.

        Box reduction runs on premultiplied alpha inside `Image.reduce`, so edges have no halo.
        """
        bounds = self.image.getbbox()
        pixels = self.image.width
        canvas = Image.new("RGBA", (pixels, pixels))
        if bounds is not None:
            left, top, right, bottom = bounds
            canvas.paste(self.image.crop(bounds), ((pixels - right + left) // 2, pixels - bottom + top))
        return canvas.reduce(SUPERSAMPLE)
