"""Drawing for the built-in probes: an anti-aliased square canvas and pens in local coordinates.

Everything is drawn `SUPERSAMPLE` times too large and averaged down. Coordinates are shares of the pen's
square, x to the right and y down, so a drawing does not know where on the canvas and how large it stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vfl_train.errors import ConfigError

SIZE = 448  # pixels; a multiple of 14, 28 and 32, the grids that model families round to
SUPERSAMPLE = 3

Color = tuple[int, int, int]
Point = tuple[float, float]

COLORS: dict[str, Color] = {
    "red": (210, 35, 40), "blue": (35, 80, 205), "green": (30, 140, 60), "orange": (240, 130, 20),
    "purple": (130, 50, 170), "yellow": (240, 200, 30), "brown": (125, 75, 40), "black": (30, 30, 30),
    "pink": (240, 110, 165), "cyan": (20, 165, 185),
}  # fmt: skip
LIGHT: tuple[Color, ...] = (
    (250, 250, 250), (246, 241, 228), (232, 240, 250), (236, 247, 236), (250, 236, 236), (240, 236, 248),
    (230, 230, 230),
)  # fmt: skip
DARK: Color = (35, 35, 40)


def mix(color: Color, other: Color, share: float) -> Color:
    """`color` with `share` (0..1) of it replaced by `other`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(color, other, strict=True))
    return red, green, blue


def lighter(color: Color, share: float) -> Color:
    """`color` moved towards white."""
    return mix(color, (255, 255, 255), share)


def darker(color: Color, share: float) -> Color:
    """`color` moved towards black."""
    return mix(color, (0, 0, 0), share)


def arc(center: Point, radii: Point, start: float, stop: float, steps: int = 40) -> list[Point]:
    """Points on an ellipse from angle `start` to `stop` in degrees, clockwise from three o'clock."""
    angles = (math.radians(start + (stop - start) * i / steps) for i in range(steps + 1))
    return [(center[0] + radii[0] * math.cos(a), center[1] + radii[1] * math.sin(a)) for a in angles]


class Pen:
    """Draws in the square of side `side` at (`left`, `top`) of an image, all three in its pixels."""

    def __init__(self, image: Image.Image, left: float, top: float, side: float) -> None:
        self._image, self._draw = image, ImageDraw.Draw(image)
        self._left, self._top, self._side = left, top, side

    def at(self, left: float, top: float, side: float) -> Pen:
        """A pen for a smaller square, given in this pen's coordinates."""
        x, y = self._xy((left, top))
        return Pen(self._image, x, y, side * self._side)

    def polygon(self, points: Sequence[Point], fill: Color) -> None:
        """A filled polygon."""
        self._draw.polygon([self._xy(p) for p in points], fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Color) -> None:
        """A filled upright rectangle."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Color) -> None:
        """A filled ellipse around (x, y)."""
        self._draw.ellipse((self._xy((x - rx, y - ry)), self._xy((x + rx, y + ry))), fill=fill)

    def disc(self, x: float, y: float, r: float, fill: Color) -> None:
        """A filled circle around (x, y)."""
        self.ellipse(x, y, r, r, fill)

    def stroke(self, points: Sequence[Point], fill: Color, width: float) -> None:
        """A line through `points` with round ends."""
        self._draw.line([self._xy(p) for p in points], fill, max(1, round(width * self._side)), joint="curve")
        for x, y in (points[0], points[-1]):
            self.disc(x, y, width / 2, fill)

    def text(self, x: float, y: float, text: str, fill: Color, font: str, height: float) -> None:
        """`text` in font face `font`, `height` its size; (x, y) is the left end of its baseline."""
        self._draw.text(self._xy((x, y)), text, fill, font_of(font, round(height * self._side)), anchor="ls")

    def _xy(self, point: Point) -> Point:
        return self._left + point[0] * self._side, self._top + point[1] * self._side


class Canvas(Pen):
    """A square image of `size` pixels, filled with `background`, and a pen for all of it."""

    def __init__(self, size: int, background: Color) -> None:
        side = size * SUPERSAMPLE
        super().__init__(Image.new("RGB", (side, side), background), 0, 0, side)

    def finish(self) -> Image.Image:
        """The drawing, RGB."""
        return self._image.reduce(SUPERSAMPLE)


@lru_cache(maxsize=256)
def font_of(face: str, pixels: int) -> ImageFont.FreeTypeFont:
    """A TrueType face that matplotlib ships (DejaVu, STIX). Raises ConfigError if it is not there."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    try:
        # The basic layout exists everywhere; Raqm, where it is there, kerns differently.
        return ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)
    except OSError as e:
        raise ConfigError(f"the font {path} cannot be read: {e}", "reinstall matplotlib") from None
