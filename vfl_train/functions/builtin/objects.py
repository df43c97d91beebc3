"""Flat drawings of everyday objects and plain shapes, each filling the pen's unit square."""

from __future__ import annotations

import math
from collections.abc import Callable

from vfl_train.functions.builtin.canvas import DARK, Color, Pen, Point, arc, darker, lighter

WHITE: Color = (255, 255, 255)
WOOD: Color = (130, 85, 45)
LEAF: Color = (50, 140, 60)


def _car(pen: Pen, color: Color) -> None:
    pen.polygon([(0.22, 0.48), (0.34, 0.28), (0.68, 0.28), (0.82, 0.48)], color)
    pen.polygon([(0.03, 0.70), (0.03, 0.52), (0.12, 0.47), (0.92, 0.47), (0.98, 0.54), (0.98, 0.70)], color)
    glass = (205, 230, 245)
    pen.polygon([(0.29, 0.47), (0.38, 0.33), (0.49, 0.33), (0.49, 0.47)], glass)
    pen.polygon([(0.53, 0.47), (0.53, 0.33), (0.65, 0.33), (0.75, 0.47)], glass)
    pen.stroke([(0.51, 0.48), (0.51, 0.68)], darker(color, 0.3), 0.008)
    pen.stroke([(0.55, 0.53), (0.60, 0.53)], darker(color, 0.4), 0.014)
    pen.disc(0.95, 0.56, 0.025, (255, 235, 140))
    for x in (0.25, 0.77):
        pen.disc(x, 0.70, 0.115, DARK)
        pen.disc(x, 0.70, 0.055, (190, 190, 195))


def _house(pen: Pen, color: Color) -> None:
    pen.box(0.68, 0.10, 0.78, 0.35, darker(color, 0.35))
    pen.box(0.16, 0.42, 0.84, 0.96, color)
    pen.polygon([(0.06, 0.44), (0.50, 0.06), (0.94, 0.44)], darker(color, 0.55))
    pen.box(0.43, 0.62, 0.60, 0.96, WOOD)
    pen.disc(0.565, 0.80, 0.014, (240, 210, 90))
    for x in (0.22, 0.66):
        pen.box(x, 0.54, x + 0.14, 0.70, (215, 235, 250))
        pen.stroke([(x + 0.07, 0.54), (x + 0.07, 0.70)], DARK, 0.012)
        pen.stroke([(x, 0.62), (x + 0.14, 0.62)], DARK, 0.012)


def _tree(pen: Pen, color: Color) -> None:
    pen.polygon([(0.44, 0.60), (0.56, 0.60), (0.60, 0.98), (0.40, 0.98)], WOOD)
    for x, y, r in ((0.30, 0.48, 0.20), (0.70, 0.48, 0.20), (0.50, 0.52, 0.22), (0.38, 0.27, 0.20)):
        pen.disc(x, y, r, LEAF)
    pen.disc(0.62, 0.27, 0.20, LEAF)
    for x, y in ((0.28, 0.45), (0.52, 0.25), (0.70, 0.42), (0.47, 0.58), (0.40, 0.38), (0.63, 0.57)):
        pen.disc(x, y, 0.035, color)


def _fish(pen: Pen, color: Color) -> None:
    pen.polygon([(0.70, 0.50), (0.98, 0.26), (0.92, 0.50), (0.98, 0.74)], darker(color, 0.2))
    pen.polygon([(0.34, 0.34), (0.50, 0.14), (0.62, 0.34)], darker(color, 0.2))
    pen.ellipse(0.41, 0.50, 0.38, 0.24, color)
    pen.stroke(arc((0.24, 0.50), (0.10, 0.19), -70, 70), darker(color, 0.35), 0.016)
    pen.polygon([(0.40, 0.52), (0.55, 0.47), (0.54, 0.62)], darker(color, 0.25))
    pen.disc(0.18, 0.44, 0.045, WHITE)
    pen.disc(0.17, 0.44, 0.024, DARK)
    pen.stroke([(0.05, 0.55), (0.12, 0.57)], DARK, 0.014)


def _umbrella(pen: Pen, color: Color) -> None:
    pen.stroke([(0.50, 0.06), (0.50, 0.84)], DARK, 0.028)
    pen.stroke(arc((0.42, 0.84), (0.08, 0.10), 0, 170), DARK, 0.028)
    pen.polygon([*arc((0.50, 0.54), (0.44, 0.42), 180, 360)], color)
    for i, x in enumerate((0.06, 0.28, 0.50, 0.72)):
        shade = darker(color, 0.25) if i % 2 else lighter(color, 0.25)
        pen.polygon([(0.50, 0.12), (x + 0.22, 0.54), (x, 0.54)], shade)


def _clock(pen: Pen, color: Color) -> None:
    pen.disc(0.50, 0.50, 0.46, color)
    pen.disc(0.50, 0.50, 0.39, WHITE)
    for i in range(12):
        sine, cosine = math.sin(math.pi * i / 6), math.cos(math.pi * i / 6)
        inner = 0.30 if i % 3 == 0 else 0.335
        pen.stroke(
            [(0.5 + inner * sine, 0.5 - inner * cosine), (0.5 + 0.36 * sine, 0.5 - 0.36 * cosine)],
            DARK,
            0.022 if i % 3 == 0 else 0.012,
        )
    pen.stroke([(0.50, 0.50), (0.38, 0.36)], DARK, 0.036)
    pen.stroke([(0.50, 0.50), (0.68, 0.33)], DARK, 0.022)
    pen.disc(0.50, 0.50, 0.03, DARK)


def _cup(pen: Pen, color: Color) -> None:
    pen.stroke(arc((0.70, 0.56), (0.18, 0.16), -90, 90), color, 0.06)
    pen.polygon([(0.14, 0.34), (0.74, 0.34), (0.66, 0.90), (0.22, 0.90)], color)
    pen.ellipse(0.44, 0.34, 0.30, 0.07, lighter(color, 0.35))
    pen.ellipse(0.44, 0.35, 0.25, 0.048, (85, 50, 25))
    for x in (0.34, 0.44, 0.54):
        pen.stroke([(x, 0.24), (x + 0.03, 0.18), (x - 0.01, 0.13), (x + 0.02, 0.07)], (150, 150, 155), 0.016)


def _apple(pen: Pen, color: Color) -> None:
    pen.disc(0.35, 0.56, 0.26, color)
    pen.disc(0.65, 0.56, 0.26, color)
    pen.ellipse(0.50, 0.66, 0.32, 0.30, color)
    pen.stroke([(0.50, 0.36), (0.51, 0.24), (0.56, 0.14)], WOOD, 0.035)
    pen.polygon([*arc((0.68, 0.24), (0.13, 0.075), 0, 360)], LEAF)
    pen.ellipse(0.27, 0.50, 0.05, 0.09, lighter(color, 0.45))


def _flower(pen: Pen, color: Color) -> None:
    pen.stroke([(0.50, 0.40), (0.50, 0.97)], LEAF, 0.035)
    pen.polygon([(0.50, 0.84), (0.62, 0.68), (0.78, 0.66), (0.68, 0.80)], LEAF)
    pen.polygon([(0.50, 0.90), (0.38, 0.74), (0.22, 0.72), (0.32, 0.86)], LEAF)
    for i in range(6):
        angle = math.pi * i / 3
        pen.disc(0.5 + 0.19 * math.sin(angle), 0.33 - 0.19 * math.cos(angle), 0.125, color)
    pen.disc(0.50, 0.33, 0.10, (250, 205, 40))


def _boat(pen: Pen, color: Color) -> None:
    pen.stroke([(0.48, 0.06), (0.48, 0.70)], WOOD, 0.03)
    pen.polygon([(0.51, 0.08), (0.51, 0.62), (0.88, 0.62)], lighter(color, 0.55))
    pen.polygon([(0.45, 0.16), (0.45, 0.62), (0.16, 0.62)], lighter(color, 0.3))
    pen.polygon([(0.04, 0.68), (0.96, 0.68), (0.80, 0.90), (0.20, 0.90)], color)


def _cat(pen: Pen, color: Color) -> None:
    for side in (-1, 1):
        x = 0.5 + 0.25 * side
        pen.polygon([(x - 0.15, 0.40), (x + 0.10 * side, 0.08), (x + 0.15, 0.40)], color)
        pen.polygon([(x - 0.06, 0.34), (x + 0.07 * side, 0.18), (x + 0.08, 0.36)], (240, 160, 170))
    pen.ellipse(0.50, 0.56, 0.40, 0.35, color)
    for side in (-1, 1):
        pen.ellipse(0.5 + 0.17 * side, 0.50, 0.075, 0.085, (190, 220, 90))
        pen.ellipse(0.5 + 0.17 * side, 0.50, 0.022, 0.075, DARK)
        for slope in (-0.05, 0.0, 0.05):
            pen.stroke(
                [(0.5 + 0.12 * side, 0.68), (0.5 + 0.46 * side, 0.68 + slope)], darker(color, 0.7), 0.008
            )
        pen.stroke(arc((0.5 + 0.06 * side, 0.70), (0.06, 0.06), 0, 180), DARK, 0.014)
    pen.polygon([(0.45, 0.62), (0.55, 0.62), (0.50, 0.68)], (225, 110, 130))


def _key(pen: Pen, color: Color) -> None:
    pen.stroke(arc((0.22, 0.50), (0.15, 0.15), 0, 360), color, 0.085)
    pen.box(0.40, 0.455, 0.95, 0.545, color)
    for x in (0.74, 0.86):
        pen.box(x, 0.50, x + 0.07, 0.70, color)


def _balloon(pen: Pen, color: Color) -> None:
    pen.stroke([(0.50, 0.66), (0.48, 0.74), (0.53, 0.82), (0.48, 0.90), (0.51, 0.98)], (110, 110, 110), 0.012)
    pen.polygon([(0.50, 0.60), (0.455, 0.69), (0.545, 0.69)], darker(color, 0.2))
    pen.ellipse(0.50, 0.34, 0.27, 0.31, color)
    pen.ellipse(0.40, 0.23, 0.05, 0.09, lighter(color, 0.55))


def _mushroom(pen: Pen, color: Color) -> None:
    pen.polygon([(0.40, 0.50), (0.60, 0.50), (0.65, 0.92), (0.35, 0.92)], (240, 225, 195))
    pen.ellipse(0.50, 0.92, 0.15, 0.045, (240, 225, 195))
    pen.polygon(arc((0.50, 0.54), (0.44, 0.44), 180, 360), color)
    pen.ellipse(0.50, 0.54, 0.44, 0.06, darker(color, 0.25))
    for x, y, r in ((0.50, 0.24, 0.065), (0.28, 0.38, 0.055), (0.72, 0.38, 0.055), (0.50, 0.42, 0.045)):
        pen.disc(x, y, r, WHITE)


def _book(pen: Pen, color: Color) -> None:
    pen.polygon([(0.04, 0.24), (0.50, 0.32), (0.50, 0.84), (0.04, 0.76)], color)
    pen.polygon([(0.96, 0.24), (0.50, 0.32), (0.50, 0.84), (0.96, 0.76)], darker(color, 0.2))
    page = (252, 250, 240)
    pen.polygon([(0.08, 0.20), (0.50, 0.29), (0.50, 0.79), (0.08, 0.70)], page)
    pen.polygon([(0.92, 0.20), (0.50, 0.29), (0.50, 0.79), (0.92, 0.70)], darker(page, 0.06))
    for i in range(5):
        y = 0.30 + 0.08 * i
        pen.stroke([(0.14, y), (0.44, y + 0.065)], (150, 150, 150), 0.012)
        pen.stroke([(0.86, y), (0.56, y + 0.065)], (150, 150, 150), 0.012)


def _ladder(pen: Pen, color: Color) -> None:
    for i in range(6):
        y = 0.14 + 0.145 * i
        pen.stroke([(0.32, y), (0.68, y)], color, 0.045)
    for x in (0.32, 0.68):
        pen.stroke([(x, 0.03), (x, 0.97)], darker(color, 0.25), 0.055)


def _star(pen: Pen, color: Color) -> None:
    radii = (0.49, 0.20)
    points: list[Point] = [
        (0.5 + radii[i % 2] * math.sin(math.pi * i / 5), 0.52 - radii[i % 2] * math.cos(math.pi * i / 5))
        for i in range(10)
    ]
    pen.polygon(points, color)


def _heart(pen: Pen, color: Color) -> None:
    points: list[Point] = []
    for i in range(120):
        t = 2 * math.pi * i / 120
        up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((0.5 + math.sin(t) ** 3 / 2.05, 0.46 - up / 32.8))
    pen.polygon(points, color)


def _circle(pen: Pen, color: Color) -> None:
    pen.disc(0.5, 0.5, 0.5, color)


def _square(pen: Pen, color: Color) -> None:
    pen.box(0, 0, 1, 1, color)


def _triangle(pen: Pen, color: Color) -> None:
    pen.polygon([(0.5, 0.02), (1, 0.94), (0, 0.94)], color)


def _cross(pen: Pen, color: Color) -> None:
    pen.box(0.35, 0, 0.65, 1, color)
    pen.box(0, 0.35, 1, 0.65, color)


Drawing = Callable[[Pen, Color], None]

# A drawing and the colours that such a thing may have.
OBJECTS: dict[str, tuple[Drawing, tuple[str, ...]]] = {
    "car": (_car, ("red", "blue", "green", "orange", "purple")),
    "house": (_house, ("red", "blue", "orange", "brown")),
    "tree": (_tree, ("red", "yellow", "orange", "green")),
    "fish": (_fish, ("orange", "blue", "red", "cyan")),
    "umbrella": (_umbrella, ("red", "blue", "purple", "green", "pink")),
    "clock": (_clock, ("red", "blue", "black", "brown", "green")),
    "cup": (_cup, ("red", "blue", "green", "orange", "purple")),
    "apple": (_apple, ("red", "green", "yellow")),
    "flower": (_flower, ("red", "pink", "purple", "orange", "blue")),
    "boat": (_boat, ("red", "blue", "brown", "green")),
    "cat": (_cat, ("orange", "brown", "black")),
    "key": (_key, ("brown", "black", "orange", "blue")),
    "balloon": (_balloon, ("red", "blue", "green", "pink", "purple")),
    "mushroom": (_mushroom, ("red", "orange", "brown")),
    "book": (_book, ("red", "blue", "green", "purple", "brown")),
    "ladder": (_ladder, ("brown", "orange", "black", "red")),
}
SHAPES: dict[str, Drawing] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "heart": _heart,
    "cross": _cross,
}  # fmt: skip
