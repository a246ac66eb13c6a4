"""The picture book's sprites: 26 categories in eight colours, flat and softly outlined.

`sprite` is the only entry point; the drawings live in `sprites_animals` and
`sprites_things`, the vector pen and the palette in `sprites_pen`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from PIL import Image, ImageOps

from lib.picturebook import sprites_animals as animals
from lib.picturebook import sprites_things as things
from lib.picturebook.sprites_pen import COLOURS, WHITE, Pen, box, distinct, path

__all__ = ["ACCESSORIES", "CATEGORIES", "COLOURS", "sprite"]

_DRAWINGS: dict[str, Callable[[Pen], None]] = {
    "owl": animals.owl,
    "parrot": animals.parrot,
    "penguin": animals.penguin,
    "duck": animals.duck,
    "pine": things.pine,
    "palm": things.palm,
    "sailboat": things.sailboat,
    "canoe": things.canoe,
    "car": things.car,
    "bus": things.bus,
    "truck": things.truck,
    "cat": animals.cat,
    "dog": animals.dog,
    "rabbit": animals.rabbit,
    "tulip": things.tulip,
    "daisy": things.daisy,
    "house": things.house,
    "tower": things.tower,
    "tent": things.tent,
    "ball": things.ball,
    "kite": things.kite,
    "balloon": things.balloon,
    "fish": animals.fish,
    "crab": animals.crab,
    "snowman": animals.snowman,
    "butterfly": animals.butterfly,
}
CATEGORIES: tuple[str, ...] = tuple(_DRAWINGS)

_SCARF = (236, 26, 44)
_SCARF_ON_RED = (194, 14, 44)
_FLAG = (232, 34, 60)

# Where an accessory sits, in sprite units: the middle of the neck and half its width.
_NECKS: dict[str, tuple[float, float, float]] = {
    "snowman": (16, 18, 6.2),
    "cat": (15, 20, 6.8),
    "dog": (18.4, 16.4, 4.6),
    "penguin": (16, 16.8, 7.2),
    "owl": (16, 20, 8.6),
}
# The foot of the flag pole, in sprite units.
_POLES: dict[str, tuple[float, float]] = {
    "tower": (16, 7.4),
    "house": (16, 7.4),
    "tent": (16, 8.6),
    "sailboat": (15, 7.6),
}
ACCESSORIES: dict[str, tuple[str, ...]] = {"scarf": tuple(_NECKS), "flag": tuple(_POLES)}


def _scarf(pen: Pen, category: str) -> None:
    """A bright red scarf with a hanging, white-striped end."""
    x, y, half = _NECKS[category]
    wool = distinct(pen.body, _SCARF, _SCARF_ON_RED)
    pen.blob(wool, box(x + 0.6, y, x + 4.8, y + 8.6, 0.6))
    pen.flat(WHITE, box(x + 0.6, y + 5.8, x + 4.8, y + 7.2))
    pen.blob(wool, box(x - half, y - 1.9, x + half, y + 1.9, 1.7))


def _flag(pen: Pen, category: str) -> None:
    """A small pole with a flag, red at the pole and white at the free end."""
    x, y = _POLES[category]
    pen.blob((110, 84, 66), path((x, y), (x, 1.6), width=0.8))
    pen.blob(_FLAG, box(x + 1, 1.4, x + 10, 6.4))
    pen.flat(WHITE, box(x + 6.2, 1.4, x + 10, 6.4))


def _check(category: str, colour: str, side: int, accessory: str | None) -> None:
    """Raise ValueError that names the unknown part of a sprite request."""
    if category not in _DRAWINGS:
        raise ValueError(f"unknown sprite category {category!r}: use one of {', '.join(CATEGORIES)}")
    if colour not in COLOURS:
        raise ValueError(f"unknown sprite colour {colour!r}: use one of {', '.join(COLOURS)}")
    if side < 8:
        raise ValueError(f"sprite side {side} is too small: use at least 8 pixels")
    if accessory is not None and category not in ACCESSORIES.get(accessory, ()):
        raise ValueError(f"accessory {accessory!r} does not fit {category!r}: know {ACCESSORIES}")


@lru_cache(maxsize=4096)
def sprite(category: str, colour: str, side: int, accessory: str | None = None, flip: bool = False) -> Image.Image:
    """Draw one object on a transparent square, standing on its bottom edge.

    `side` is in pixels (24, 32 and 40 are the sizes in use); `flip` mirrors the
    drawing. The result is an RGBA image of shape (side, side), shared by the
    cache: copy it before changing it. Raises ValueError for unknown names.
    """
    _check(category, colour, side, accessory)
    pen = Pen(side, COLOURS[colour])
    _DRAWINGS[category](pen)
    if accessory == "scarf":
        _scarf(pen, category)
    elif accessory == "flag":
        _flag(pen, category)
    drawn = pen.finish()
    return ImageOps.mirror(drawn) if flip else drawn
