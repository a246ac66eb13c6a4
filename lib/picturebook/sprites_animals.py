"""Animals of the picture book, drawn on 32 x 32 units; profiles look to the right."""

from __future__ import annotations

from lib.picturebook.sprites_pen import (
    BEAK,
    FROST,
    GOLD,
    INK,
    PINK,
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


def owl(pen: Pen) -> None:
    """Round, with ear tufts, wings at the sides and very big eyes."""
    beak = distinct(pen.body, BEAK, GOLD)
    pen.blob(beak, Oval(12, 30, 2.2, 1.2), Oval(20, 30, 2.2, 1.2))
    pen.blob(
        pen.body, Oval(16, 18.5, 10.5, 11),
        poly((6.8, 3.6), (14, 8), (7.5, 13), soft=0.6), poly((25.2, 3.6), (18, 8), (24.5, 13), soft=0.6),
    )
    pen.blob(shade(pen.body), Oval(6.6, 20, 2.6, 7, 8), Oval(25.4, 20, 2.6, 7, -8))
    pen.flat(tint(pen.body), Oval(16, 23.5, 5.5, 5.2))
    for x in (10.9, 21.1):
        pen.blob(WHITE, disc(x, 12.6, 4.2))
        pen.flat(INK, disc(x + (16 - x) * 0.16, 12.8, 2.3))
        pen.flat(WHITE, disc(x + 0.4, 11.9, 0.8))
    pen.blob(beak, poly((14.7, 15), (17.3, 15), (16, 18.4)))


def parrot(pen: Pen) -> None:
    """On a perch, with a hooked beak, a pale face and a long hanging tail."""
    beak = distinct(pen.body, GOLD, BEAK)
    pen.blob(shade(pen.body), poly((9.5, 17), (14.5, 20.5), (6.5, 30.2), (3.4, 30.2), soft=0.8))
    pen.blob(WOOD, path((9, 25.5), (27.5, 25.5), width=2))
    pen.blob(pen.body, Oval(15.6, 15.8, 6.4, 9.2, 28), disc(19, 8.6, 6.2))
    pen.blob(shade(pen.body), Oval(12.4, 17, 3.6, 7.4, 30))
    pen.blob(beak, poly((23.4, 5.2), (27.6, 6.2), (29, 10), (27.6, 13.6), (26, 10.8), (23.4, 11.2), soft=0.5))
    pen.flat(distinct(pen.body, WHITE, FROST), Oval(21, 8, 3, 3))
    pen.flat(INK, disc(21.2, 7.8, 1.5))
    pen.flat(beak, Oval(16.5, 25, 1, 1.6), Oval(20, 25, 1, 1.6))


def penguin(pen: Pen) -> None:
    """Upright, with a pale belly, flippers held out and a small beak."""
    beak = distinct(pen.body, BEAK, GOLD)
    belly = distinct(pen.body, WHITE, FROST)
    pen.blob(beak, Oval(12, 30.2, 3, 1.3), Oval(20, 30.2, 3, 1.3))
    pen.blob(pen.body, Oval(6.4, 18.2, 2.1, 6.6, 24), Oval(25.6, 18.2, 2.1, 6.6, -24))
    pen.blob(pen.body, Oval(16, 19.4, 8.8, 10.4), Oval(16, 10, 7, 7.4))
    pen.flat(belly, Oval(16, 22, 5.4, 7), disc(13.2, 10, 2.7), disc(18.8, 10, 2.7))
    pen.flat(INK, disc(13.4, 9.6, 1.3), disc(18.6, 9.6, 1.3))
    pen.blob(beak, poly((14.4, 11.8), (17.6, 11.8), (16, 14.4)))


def duck(pen: Pen) -> None:
    """Swimming profile: flat water line, raised tail, wide bill."""
    beak = distinct(pen.body, BEAK, GOLD)
    beak = (222, 92, 28) if pen.body[0] > 240 and pen.body[2] < 100 else beak
    pen.blob(beak, poly((25.6, 10.6), (29.8, 11.4), (29.4, 13.4), (25, 14), soft=0.6))
    pen.blob(
        pen.body,
        poly((3.2, 16.6), (8, 19.6), (16, 19.4), (19, 15), (25, 16), (26, 23), (22.5, 28.6), (8.5, 28.6), (4.2, 24), soft=1),
        disc(21.4, 11, 5.8),
    )
    pen.blob(shade(pen.body), Oval(12.2, 23, 6, 3.4, -6))
    pen.eye(23, 9.8)


def cat(pen: Pen) -> None:
    """Sitting frontally: pointed ears, whiskers, tail curled up at the side."""
    pen.blob(pen.body, path((22, 28.6), (27, 27.4), (28.4, 22.6), (26.4, 19.4), width=2.8))
    pen.blob(pen.body, Oval(15, 23.8, 8, 6.8), box(8.5, 24, 21.5, 30.6, 2.4))
    pen.blob(
        pen.body, Oval(15, 12.8, 9, 7.2),
        poly((6.4, 3.6), (13, 7), (6.6, 12), soft=0.7), poly((23.6, 3.6), (17, 7), (23.4, 12), soft=0.7),
    )
    pen.flat(PINK, poly((7.6, 5.4), (11.2, 7.2), (8, 9.2)), poly((22.4, 5.4), (18.8, 7.2), (22, 9.2)))
    pen.eye(11.4, 12, 1.4)
    pen.eye(18.4, 12, 1.4)
    pen.flat(PINK, poly((13.8, 14.6), (16.2, 14.6), (15, 16.2), soft=0.3))
    line = border(pen.body)
    pen.flat(line, path((3.4, 14), (8.6, 15), width=0.7), path((3.6, 17.4), (8.6, 16.8), width=0.7))
    pen.flat(line, path((26.6, 14), (21.4, 15), width=0.7), path((26.4, 17.4), (21.4, 16.8), width=0.7))
    pen.flat(line, path((15, 25.5), (15, 30.6), width=0.8))


def dog(pen: Pen) -> None:
    """Standing profile: long snout, hanging ear, four legs, tail up."""
    pen.blob(shade(pen.body), box(9.4, 23, 12.6, 30.4, 1.2), box(18.4, 23, 21.6, 30.4, 1.2))
    pen.blob(
        pen.body, path((5.6, 19), (3.6, 15.6), (3.4, 12.2), width=2.4), box(4, 16.6, 22, 25.4, 3.4),
        box(4.8, 22, 8.4, 30.8, 1.2), box(14.6, 22, 18.2, 30.8, 1.2),
        poly((15.4, 19), (16, 11), (22, 11), (21.6, 21), soft=0.8),
    )
    pen.blob(pen.body, disc(19.6, 9.2, 5.8), box(19, 8.6, 29.6, 14.6, 2.6))
    pen.blob(shade(pen.body), Oval(15.6, 10.4, 2.5, 5.4, 12))
    pen.flat(distinct(pen.body, INK, (112, 112, 130)), Oval(28.4, 9.6, 1.8, 1.5))
    pen.eye(21.6, 7.8)


def rabbit(pen: Pen) -> None:
    """Sitting frontally, with tall ears and two teeth."""
    pen.blob(WHITE, disc(23.8, 26.6, 2.9))
    pen.blob(pen.body, Oval(11.8, 8.4, 2.8, 6.6, -8), Oval(20.2, 8.4, 2.8, 6.6, 8))
    pen.flat(PINK, Oval(11.8, 8.6, 1.2, 4.6, -8), Oval(20.2, 8.6, 1.2, 4.6, 8))
    pen.blob(pen.body, Oval(16, 25, 7.6, 5.8), Oval(11, 29.4, 3.6, 1.7), Oval(21, 29.4, 3.6, 1.7))
    pen.blob(pen.body, Oval(16, 17, 7.4, 6.4))
    pen.eye(13, 16, 1.3)
    pen.eye(18.8, 16, 1.3)
    pen.flat(PINK, Oval(16, 18.8, 1.3, 0.9))
    pen.flat(WHITE, box(15, 20, 17, 22.4))
    pen.flat(tint(pen.body), Oval(16, 27, 3.6, 3))


def fish(pen: Pen) -> None:
    """Profile with a forked tail, fins and scales."""
    fin = shade(pen.body)
    pen.blob(fin, poly((8.6, 16.4), (3.2, 9.8), (4.6, 16.6), (3.2, 23.4), soft=0.9))
    pen.blob(fin, poly((12, 11), (15, 5.6), (22, 8.6), (22, 12), soft=0.8), poly((14, 22), (15, 27), (20, 23), soft=0.8))
    pen.blob(pen.body, Oval(18.6, 16.6, 11, 8))
    pen.flat(tint(pen.body), Oval(18, 21.6, 6.6, 2.2))
    for x, y in ((10.8, 15), (14, 12.2), (14, 17.6), (17.4, 15)):
        pen.flat(fin, Oval(x, y, 1.1, 1.5))
    pen.flat(border(pen.body), path((21.4, 11.4), (20.4, 16.4), (21.4, 21.4), width=0.9))
    pen.eye(25, 14.4, 1.5)
    pen.flat(border(pen.body), path((26.4, 19.6), (28.4, 18.8), width=0.9))


def crab(pen: Pen) -> None:
    """Wide shell, raised claws, eyes on stalks, bent legs."""
    limb = shade(pen.body)
    for sign in (-1, 1):
        for reach, foot in ((11.4, 29.2), (9, 30.4), (6, 30.8)):
            knee = (16 + sign * (reach - 0.4), 25.6)
            pen.blob(limb, path((16 + sign * 5, 23), knee, (16 + sign * reach, foot), width=1.4))
        pen.blob(limb, path((16 + sign * 8, 20), (16 + sign * 12, 16.6), width=2.4))
        claw = 16 + sign * 10.3
        pen.blob(
            pen.body, Oval(claw, 13.8, 3.2, 2.9),
            poly((claw - 1.6, 13.4), (claw - 3, 9.4), (claw - 2.3, 5.8), (claw - 1.6, 10.8), soft=0.7),
            poly((claw + 1.6, 13.4), (claw + 3, 9.4), (claw + 2.3, 5.8), (claw + 1.6, 10.8), soft=0.7),
        )
        pen.blob(pen.body, path((16 + sign * 2.8, 18), (16 + sign * 2.8, 13.6), width=1.2))
    pen.blob(pen.body, Oval(16, 22, 9.8, 6.2))
    for x in (13.2, 18.8):
        pen.blob(WHITE, disc(x, 12.6, 1.9))
        pen.flat(INK, disc(x, 12.6, 1.1))
    pen.flat(border(pen.body), path((12.6, 23.4), (14.4, 24.8), (17.6, 24.8), (19.4, 23.4), width=1))


def butterfly(pen: Pen) -> None:
    """Seen from above: four spotted wings, a dark body, feelers."""
    feeler = distinct(pen.body, INK, (96, 98, 116))
    pen.flat(feeler, path((15.6, 9), (13.4, 4.6), (11.6, 4), width=0.9), path((16.4, 9), (18.6, 4.6), (20.4, 4), width=0.9))
    pen.flat(feeler, disc(11.4, 4, 0.9), disc(20.6, 4, 0.9))
    pen.blob(shade(pen.body), Oval(10.2, 24, 5.2, 5.8, 24), Oval(21.8, 24, 5.2, 5.8, -24))
    pen.blob(pen.body, Oval(9, 13.4, 5.6, 7.6, -34), Oval(23, 13.4, 5.6, 7.6, 34))
    spot = distinct(pen.body, WHITE, (176, 190, 214))
    pen.flat(spot, disc(7.4, 11.6, 1.9), disc(24.6, 11.6, 1.9), disc(9.8, 25, 1.5), disc(22.2, 25, 1.5))
    pen.blob(feeler, Oval(16, 18.4, 1.3, 8.6), disc(16, 10, 1.7))


def snowman(pen: Pen) -> None:
    """Two snowballs, a top hat, a carrot nose, twig arms and buttons."""
    pen.flat(WOOD, path((9, 20), (3.4, 15.4), width=1.3), path((23, 20), (28.6, 15.4), width=1.3))
    pen.flat(WOOD, path((5, 16.6), (2.8, 18), width=1), path((27, 16.6), (29.2, 18), width=1))
    pen.blob(pen.body, Oval(16, 23.6, 8.8, 7.2))
    pen.blob(pen.body, disc(16, 12, 6.2))
    pen.flat(INK, disc(13.6, 10.8, 1.1), disc(18.4, 10.8, 1.1), disc(16, 22.6, 1), disc(16, 26.4, 1))
    pen.blob(BEAK, poly((15.4, 12.2), (15.4, 14.2), (21, 13.6)))
    pen.blob((58, 62, 92), box(9.8, 6.2, 22.2, 8, 0.6), box(12, 1.8, 20, 7.6, 0.6))
