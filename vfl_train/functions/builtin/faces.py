"""Drawn faces with one of five expressions: for the built-in emotion probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vfl_train.functions.builtin.canvas import DARK, Color, Pen, arc, darker, mix

WHITE: Color = (255, 255, 255)
MOUTH: Color = (120, 25, 35)
TONGUE: Color = (235, 110, 120)
TEAR: Color = (70, 160, 235)
HAIR_STYLES = ("short", "long", "bald")


@dataclass(frozen=True)
class Person:
    """Everything about a face but its expression."""

    skin: Color
    hair: Color
    style: str
    iris: Color


def draw_face(pen: Pen, person: Person, emotion: str) -> None:
    """The head of `person` in the pen's unit square. Raises KeyError for an unknown emotion."""
    if person.style == "long":
        pen.ellipse(0.50, 0.46, 0.46, 0.44, person.hair)
        pen.box(0.04, 0.46, 0.96, 0.92, person.hair)
    for x in (0.09, 0.91):
        pen.ellipse(x, 0.54, 0.06, 0.09, darker(person.skin, 0.1))
    pen.ellipse(0.50, 0.53, 0.40, 0.45, person.skin)
    if person.style != "bald":
        pen.polygon(
            [*arc((0.50, 0.44), (0.42, 0.40), 180, 360), *arc((0.50, 0.44), (0.42, 0.20), 360, 180)],
            person.hair,
        )
    EXPRESSIONS[emotion](pen, person)


def _nose(pen: Pen, person: Person) -> None:
    pen.stroke(arc((0.50, 0.60), (0.045, 0.03), 0, 180), darker(person.skin, 0.4), 0.014)


def _eyes(pen: Pen, person: Person, rx: float, ry: float, iris: float, look: float = 0.0) -> None:
    """Open eyes; `iris` is its radius, `look` how far down it looks."""
    for x in (0.34, 0.66):
        pen.ellipse(x, 0.47, rx + 0.008, ry + 0.008, DARK)
        pen.ellipse(x, 0.47, rx, ry, WHITE)
        pen.disc(x, 0.47 + look, iris, person.iris)
        pen.disc(x, 0.47 + look, iris * 0.55, DARK)


def _brows(pen: Pen, person: Person, outer: float, inner: float) -> None:
    """Straight eyebrows; heights (y) of their outer and inner ends."""
    color = darker(person.hair, 0.6)
    for side in (-1, 1):
        pen.stroke([(0.5 + 0.26 * side, outer), (0.5 + 0.08 * side, inner)], color, 0.036)


def _joy(pen: Pen, person: Person) -> None:
    for x in (0.34, 0.66):  # eyes closed by the smile
        pen.stroke(arc((x, 0.50), (0.075, 0.07), 190, 350), DARK, 0.026)
        pen.disc(x + (-0.07 if x < 0.5 else 0.07), 0.63, 0.055, mix(person.skin, (240, 90, 90), 0.4))
    color = darker(person.hair, 0.6)
    for x in (0.34, 0.66):
        pen.stroke(arc((x, 0.39), (0.10, 0.05), 200, 340), color, 0.03)
    _nose(pen, person)
    pen.polygon(arc((0.50, 0.68), (0.22, 0.20), 0, 180), MOUTH)
    pen.polygon([(0.29, 0.68), (0.71, 0.68), (0.69, 0.735), (0.31, 0.735)], WHITE)
    pen.polygon(arc((0.50, 0.86), (0.10, 0.045), 180, 360), TONGUE)


def _sadness(pen: Pen, person: Person) -> None:
    _eyes(pen, person, 0.07, 0.06, 0.038, look=0.02)
    for x in (0.34, 0.66):  # heavy upper lids
        pen.polygon(arc((x, 0.47), (0.08, 0.07), 180, 360), person.skin)
        pen.stroke([(x - 0.08, 0.47), (x + 0.08, 0.47)], DARK, 0.016)
    _brows(pen, person, 0.42, 0.345)
    _nose(pen, person)
    pen.stroke(arc((0.50, 0.87), (0.15, 0.11), 205, 335), MOUTH, 0.035)
    for x, y in ((0.31, 0.60), (0.69, 0.66)):
        pen.disc(x, y, 0.032, TEAR)
        pen.polygon([(x - 0.030, y - 0.01), (x, y - 0.085), (x + 0.030, y - 0.01)], TEAR)


def _anger(pen: Pen, person: Person) -> None:
    _eyes(pen, person, 0.075, 0.055, 0.036)
    for side in (-1, 1):  # lids pressed down by the brows
        pen.polygon(
            [
                (0.5 + 0.27 * side, 0.36),
                (0.5 + 0.06 * side, 0.36),
                (0.5 + 0.06 * side, 0.475),
                (0.5 + 0.27 * side, 0.405),
            ],
            person.skin,
        )
        pen.stroke([(0.5 + 0.035 * side, 0.36), (0.5 + 0.025 * side, 0.43)], darker(person.skin, 0.4), 0.014)
    _brows(pen, person, 0.375, 0.47)
    _nose(pen, person)
    pen.box(0.34, 0.72, 0.66, 0.84, DARK)
    pen.box(0.355, 0.735, 0.645, 0.825, WHITE)
    for i in range(1, 5):
        pen.stroke([(0.355 + 0.058 * i, 0.735), (0.355 + 0.058 * i, 0.825)], DARK, 0.010)
    pen.stroke([(0.355, 0.78), (0.645, 0.78)], DARK, 0.010)


def _fear(pen: Pen, person: Person) -> None:
    _eyes(pen, person, 0.095, 0.105, 0.026)
    _brows(pen, person, 0.345, 0.295)
    _nose(pen, person)
    pen.polygon([*arc((0.50, 0.84), (0.20, 0.16), 180, 360), (0.66, 0.89), (0.34, 0.89)], MOUTH)
    pen.polygon([(0.33, 0.845), (0.67, 0.845), (0.65, 0.89), (0.35, 0.89)], WHITE)
    for x, y in ((0.845, 0.30), (0.16, 0.34)):
        pen.disc(x, y, 0.034, TEAR)
        pen.polygon([(x - 0.032, y - 0.01), (x, y - 0.09), (x + 0.032, y - 0.01)], TEAR)


def _disgust(pen: Pen, person: Person) -> None:
    for side in (-1, 1):  # eyes pressed shut: > <
        pen.stroke(
            [(0.5 + 0.23 * side, 0.44), (0.5 + 0.10 * side, 0.485), (0.5 + 0.23 * side, 0.53)], DARK, 0.026
        )
    _brows(pen, person, 0.37, 0.42)
    line = darker(person.skin, 0.4)
    for y in (0.52, 0.55, 0.58):  # a wrinkled nose
        pen.stroke(arc((0.50, y), (0.05, 0.025), 200, 340), line, 0.012)
    _nose(pen, person)
    pen.stroke([(0.30, 0.79), (0.40, 0.70), (0.60, 0.70), (0.70, 0.79)], MOUTH, 0.03)
    pen.polygon([(0.33, 0.77), (0.40, 0.71), (0.60, 0.71), (0.67, 0.77)], MOUTH)
    pen.box(0.42, 0.76, 0.58, 0.87, TONGUE)
    pen.disc(0.50, 0.87, 0.08, TONGUE)
    pen.stroke([(0.50, 0.77), (0.50, 0.88)], darker(TONGUE, 0.3), 0.012)


EXPRESSIONS: dict[str, Callable[[Pen, Person], None]] = {
    "joy": _joy, "sadness": _sadness, "anger": _anger, "fear": _fear, "disgust": _disgust,
}  # fmt: skip
