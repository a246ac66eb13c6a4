"""Draw a scene of the picture book as a 64 x 64 picture."""

from __future__ import annotations

from PIL import Image

from lib.picturebook.backdrops import backdrop
from lib.picturebook.scenes import Scene, place
from lib.picturebook.sprites import sprite

SIDE = 64


def render(scene: Scene) -> Image.Image:
    """Draw `scene` anti-aliased: an RGB image of 64 x 64 pixels, the same for equal scenes."""
    variant, placements = place(scene)
    picture = backdrop(scene.setting, variant).convert("RGBA")
    for spot in placements:
        entity = spot.entity
        figure = sprite(entity.category, entity.colour, spot.side, entity.accessory, spot.flip)
        picture.paste(figure, (spot.left, spot.top), figure)
    return picture.convert("RGB")
