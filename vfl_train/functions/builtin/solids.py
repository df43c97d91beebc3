"""Shaded solids that stand on the ground: for the built-in count and relation probes."""

from __future__ import annotations

from collections.abc import Callable

from vfl_train.functions.builtin.canvas import Color, Pen, arc, darker, lighter, mix

STEPS = 24  # of a gradient: finer than the eye sees at these sizes


def _around(color: Color, step: int) -> Color:
    """The shade of a round side at `step` from left to right, lit from the left."""
    share = abs(step / (STEPS - 1) - 0.3)
    return mix(lighter(color, 0.25), darker(color, 0.5), min(1.0, share * 1.4))


def _cube(pen: Pen, color: Color) -> None:
    pen.polygon([(0.02, 0.30), (0.30, 0.06), (0.98, 0.06), (0.70, 0.30)], lighter(color, 0.35))
    pen.polygon([(0.70, 0.30), (0.98, 0.06), (0.98, 0.72), (0.70, 0.98)], darker(color, 0.4))
    pen.box(0.02, 0.30, 0.70, 0.98, color)


def _sphere(pen: Pen, color: Color) -> None:
    for i in range(STEPS):
        t = i / (STEPS - 1)
        shade = mix(darker(color, 0.45), lighter(color, 0.45), t**1.3)
        pen.disc(0.5 - 0.16 * t, 0.52 - 0.18 * t, 0.46 * (1 - t) + 0.05 * t, shade)


def _cylinder(pen: Pen, color: Color) -> None:
    upper, lower = (arc((0.5, y), (0.34, 0.10), 180, 0, STEPS) for y in (0.14, 0.88))  # front edges
    for i in range(STEPS):
        pen.polygon([upper[i], upper[i + 1], lower[i + 1], lower[i]], _around(color, i))
    pen.ellipse(0.5, 0.14, 0.34, 0.10, lighter(color, 0.35))


def _cone(pen: Pen, color: Color) -> None:
    rim = arc((0.5, 0.86), (0.44, 0.12), 180, 0, STEPS)  # the front edge, left to right
    for i in range(STEPS):
        pen.polygon([(0.5, 0.02), rim[i], rim[i + 1]], _around(color, i))


SOLIDS: dict[str, Callable[[Pen, Color], None]] = {
    "cube": _cube, "sphere": _sphere, "cylinder": _cylinder, "cone": _cone,
}  # fmt: skip


def stand(pen: Pen, kind: str, color: Color, ground: Color) -> None:
    """Draw a solid of `kind` in the pen's unit square, with its shadow on ground of colour `ground`."""
    pen.ellipse(0.56, 0.93, 0.48, 0.09, darker(ground, 0.22))
    SOLIDS[kind](pen, color)
