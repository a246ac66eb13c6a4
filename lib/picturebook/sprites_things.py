"""Plants, vehicles, buildings and toys of the picture book, drawn on 32 x 32 units."""

from __future__ import annotations

import math

from lib.picturebook.sprites_pen import (
    FROST,
    GLASS,
    GOLD,
    HUB,
    INK,
    LEAF,
    TYRE,
    WHITE,
    WOOD,
    Oval,
    Pen,
    border,
    box,
    disc,
    distinct,
    path,
    poly,
    shade,
    tint,
)


def _wheels(pen: Pen, radius: float, *centres: float) -> None:
    """Wheels on the ground line at the given x."""
    for x in centres:
        pen.blob(TYRE, disc(x, 30.8 - radius, radius))
        pen.flat(HUB, disc(x, 30.8 - radius, radius * 0.45))


def pine(pen: Pen) -> None:
    """Three stacked skirts on a short trunk."""
    pen.blob(WOOD, box(13.8, 25, 18.2, 31))
    pen.blob(pen.body, poly((16, 13.4), (27.2, 26.4), (4.8, 26.4), soft=0.8))
    pen.blob(pen.body, poly((16, 7.4), (25.2, 19.4), (6.8, 19.4), soft=0.8))
    pen.blob(pen.body, poly((16, 2.4), (22.8, 12), (9.2, 12), soft=0.8))


def palm(pen: Pen) -> None:
    """A bent ringed trunk under a crown of broad drooping fronds."""
    pen.blob(WOOD, path((14, 30), (14.4, 24), (15.4, 18), (16.6, 11), width=2.6))
    pen.flat(border(WOOD), path((13.4, 25.5), (15.2, 25.5), width=0.7), path((14.2, 20.5), (16, 20.5), width=0.7))
    pen.blob(
        pen.body,
        poly((16, 9), (10, 8.6), (4.6, 12.6), (3.2, 20.4), (6.6, 17), (10.4, 15.2), soft=0.8),
        poly((16, 9), (22, 8.6), (27.4, 12.6), (28.8, 20.4), (25.4, 17), (21.6, 15.2), soft=0.8),
    )
    pen.blob(
        pen.body,
        poly((16, 10.6), (13, 4.2), (7.6, 2.6), (3, 6), (8, 7.4), (11, 11.4), soft=0.8),
        poly((16, 10.6), (19, 4.2), (24.4, 2.6), (29, 6), (24, 7.4), (21, 11.4), soft=0.8),
    )
    pen.blob((120, 76, 48), disc(14, 12.6, 1.8), disc(18.4, 12.8, 1.8))


def tulip(pen: Pen) -> None:
    """A closed three-pointed cup on a stem with two long leaves."""
    pen.blob(LEAF, path((16, 18), (16, 30.4), width=1.6))
    pen.blob(LEAF, poly((15.4, 30), (9.6, 27), (7.8, 22.6), (13, 25), soft=0.5))
    pen.blob(LEAF, poly((16.6, 30), (22.4, 27), (24.2, 22.6), (19, 25), soft=0.5))
    pen.blob(
        pen.body,
        poly(
            (6.6, 3.8), (11.6, 8), (16, 3), (20.4, 8), (25.4, 3.8),
            (25, 13), (21.6, 18.6), (16, 20.4), (10.4, 18.6), (7, 13), soft=0.9,
        ),
    )
    pen.blob(tint(pen.body), poly((16, 5), (20, 11), (19, 17.4), (16, 19.4), (13, 17.4), (12, 11), soft=0.6))


def daisy(pen: Pen) -> None:
    """A wheel of petals about a round heart."""
    pen.blob(LEAF, path((16, 18), (16, 30.4), width=1.6), Oval(19.4, 27.6, 3, 1.2, -28), Oval(12.6, 28, 3, 1.2, 28))
    for step in range(8):
        angle = math.tau * (step + 0.5) / 8
        pen.blob(pen.body, Oval(16 + 7.2 * math.cos(angle), 12.6 + 7.2 * math.sin(angle), 4.2, 3, math.degrees(angle)))
    pen.blob(distinct(pen.body, (252, 198, 52), (156, 92, 40)), disc(16, 12.6, 3.4))


def sailboat(pen: Pen) -> None:
    """Two sails on a mast over a hull of the same colour."""
    pen.blob(WOOD, path((15, 6.4), (15, 25), width=1))
    pen.blob(pen.body, poly((17, 8), (27, 21.4), (17, 21.4), soft=0.6))
    pen.blob(tint(pen.body), poly((13, 10.4), (13, 21.4), (5.4, 21.4), soft=0.6))
    pen.blob(pen.body, poly((3.2, 25), (28.8, 25), (25, 30.4), (8, 30.4), soft=0.8))
    pen.flat(distinct(pen.body, WHITE, FROST), box(3.6, 25, 28.4, 26.6))


def canoe(pen: Pen) -> None:
    """A long hull with raised ends, a bench and an upright paddle."""
    pen.blob(WOOD, path((11, 27), (19.4, 11.6), width=1.3), Oval(20.8, 9, 2.3, 4.2, 28))
    pen.blob(
        pen.body,
        poly((3.2, 17.6), (6.8, 21.6), (25.2, 21.6), (28.8, 17.6), (28.2, 25), (24.4, 30), (7.6, 30), (3.4, 25), soft=0.8),
    )
    pen.flat(distinct(pen.body, (252, 240, 214), (196, 170, 130)), box(4.2, 24, 27.8, 26))


def car(pen: Pen) -> None:
    """Low body, domed cabin with two windows."""
    pen.blob(pen.body, poly((7, 19), (10, 11), (20.4, 11), (25.4, 19), soft=1.4))
    pen.blob(pen.body, box(2, 18.2, 30, 28.2, 2.8))
    pen.flat(pen.body, box(8.6, 17, 24, 20))
    pen.flat(GLASS, poly((9.6, 17.4), (11.6, 12.4), (14.6, 12.4), (14.6, 17.4)))
    pen.flat(GLASS, poly((16.8, 12.4), (19.4, 12.4), (22.6, 17.4), (16.8, 17.4)))
    pen.flat(distinct(pen.body, GOLD, WHITE), disc(28.6, 21.4, 1.5))
    _wheels(pen, 3.6, 8.4, 23.6)


def bus(pen: Pen) -> None:
    """One long tall box with a row of windows and a door."""
    pen.blob(pen.body, box(1.9, 7.6, 30.1, 28, 2.4))
    pen.flat(GLASS, *(box(x, 10.4, x + 4.4, 16, 0.6) for x in (4, 9.8, 15.6)))
    pen.flat(GLASS, box(22, 10.4, 26, 25.6, 0.6), box(27.4, 10.4, 30.1, 17.4))
    pen.flat(border(GLASS), path((24, 10.6), (24, 25.4), width=0.7))
    pen.flat(distinct(pen.body, WHITE, FROST), box(1.9, 19.4, 20.6, 20.9))
    _wheels(pen, 3.1, 8, 18.4)


def truck(pen: Pen) -> None:
    """A windowless load box behind a lower cab."""
    pen.blob(TYRE, box(4, 24.6, 29, 27.4))
    pen.blob(pen.body, box(1.9, 5.4, 19.4, 25.4, 0.8))
    pen.flat(shade(pen.body), *(box(x, 7.6, x + 1.2, 23.4) for x in (6, 10, 14)))
    pen.blob(pen.body, poly((22, 13), (26.4, 13), (29.4, 18.6), (29.4, 25.6), (22, 25.6), soft=0.7))
    pen.flat(GLASS, poly((23, 14.2), (26, 14.2), (28.2, 18.8), (23, 18.8)))
    pen.flat(distinct(pen.body, GOLD, WHITE), box(28.2, 21, 30, 23))
    _wheels(pen, 3.2, 6.4, 13.2, 25.6)


def house(pen: Pen) -> None:
    """A pitched roof on a wall of a lighter tone, with a door and a window."""
    pen.blob((172, 108, 92), box(21.4, 9.6, 25, 17))
    pen.blob(tint(pen.body), box(5, 17, 27, 30.8))
    pen.blob(pen.body, poly((16, 7.4), (29.2, 18.4), (2.8, 18.4), soft=0.8))
    pen.blob(WOOD, box(8.4, 22.6, 13.2, 30.8))
    pen.flat(GOLD, disc(12, 27, 0.7))
    pen.blob((255, 238, 170), box(17.6, 21.8, 23.8, 26.8))
    pen.flat(border(WOOD), path((20.7, 21.8), (20.7, 26.8), width=0.7))


def tower(pen: Pen) -> None:
    """Tall and slim under a wide battlement."""
    pen.blob(pen.body, box(9.4, 14, 22.6, 30.8))
    pen.blob(
        pen.body, box(7, 11, 25, 16.4), box(7, 7.4, 11, 12), box(14, 7.4, 18, 12), box(21, 7.4, 25, 12),
    )
    pen.flat(shade(pen.body), box(10.4, 21.6, 13.4, 23), box(18.6, 24, 21.6, 25.4), box(18.4, 18.6, 21.4, 20))
    pen.flat(border(pen.body), Oval(16, 20, 1.3, 2.2))
    pen.blob(WOOD, box(13.6, 26, 18.4, 30.8), disc(16, 26.2, 2.4))


def tent(pen: Pen) -> None:
    """A triangle with an open dark flap."""
    pen.blob(WOOD, path((17.4, 6.6), (14, 11), width=0.9), path((14.6, 6.6), (18, 11), width=0.9))
    pen.blob(pen.body, poly((16, 9.4), (29.2, 30), (2.8, 30), soft=0.8))
    pen.flat(shade(pen.body), poly((16, 9.4), (29.2, 30.6), (21.4, 30.6)))
    pen.blob((96, 78, 70), poly((16, 17), (20.4, 30.8), (11.6, 30.8)))
    pen.blob(tint(pen.body), poly((15.6, 17), (11.6, 30.4), (9, 27), soft=0.4))


def ball(pen: Pen) -> None:
    """A round toy ball with a pale curved band and a star."""
    pen.blob(pen.body, disc(16, 17.4, 13.2))
    band = distinct(pen.body, WHITE, (182, 196, 220))
    pen.flat(band, path((4.4, 21.4), (9, 23.6), (16, 24.4), (23, 23.6), (27.6, 21.4), width=3))
    star = [
        (16 + radius * math.sin(math.tau * k / 10), 13.4 - radius * math.cos(math.tau * k / 10))
        for k, radius in enumerate((5.2, 2.2) * 5)
    ]
    pen.flat(band, poly(*star))


def kite(pen: Pen) -> None:
    """A diamond with crossed spars and a tail of bows."""
    pen.flat(INK, path((16, 22), (14, 25), (17, 27.6), (15, 30.6), width=0.8))
    bow = distinct(pen.body, GOLD, (232, 96, 84))
    for x, y in ((14.4, 25.6), (16.6, 29.6)):
        left = poly((x, y), (x - 2.6, y - 1.3), (x - 2.6, y + 1.3))
        pen.blob(bow, left, poly((x, y), (x + 2.6, y - 1.3), (x + 2.6, y + 1.3)))
    pen.blob(pen.body, poly((16, 2.4), (27, 10.6), (16, 23), (5, 10.6), soft=0.6))
    pen.flat(tint(pen.body), poly((16, 2.4), (16, 10.6), (5, 10.6)), poly((16, 10.6), (27, 10.6), (16, 23)))
    pen.flat(border(pen.body), path((16, 2.4), (16, 23), width=0.9), path((5, 10.6), (27, 10.6), width=0.9))


def balloon(pen: Pen) -> None:
    """An egg with a knot, a highlight and a wavy string."""
    pen.flat((132, 132, 150), path((16, 23), (14.4, 25.6), (17.4, 28.2), (16, 31), width=0.9))
    pen.blob(pen.body, poly((16, 20.6), (18, 23.6), (14, 23.6), soft=0.4))
    pen.blob(pen.body, Oval(16, 11.8, 9, 9.8))
    pen.flat(distinct(pen.body, WHITE, FROST), Oval(12, 8, 1.5, 2.8, 28))
