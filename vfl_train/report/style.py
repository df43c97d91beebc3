"""What the plots of a report share: colours, marks, names, layer ticks, PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, which the colour-blind tell apart; lines differ in their dashes, too.
INK, SOFT, GRID = "#1f2933", "#52606d", "#e4e7eb"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
WIDTH = 11.0  # inches, of all plots: side by side in a page their letters are equally large
DPI = 140
PERCENT_TICKS = ([0, 0.5, 1], ["0", "50", "100"])


def png(height: float, draw: Callable[[Figure], None]) -> bytes:
    """The PNG of a figure `height` inches high that `draw` fills, in matplotlib's own style: the user's
    settings may be those of a dark screen."""
    with matplotlib.style.context(["default", {"font.size": 9, "axes.edgecolor": GRID, "text.color": INK}]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DPI, format="png", metadata={"Software": "vfl-train"})
    return buffer.getvalue()


def short(name: str, length: int) -> str:
    """`name` as a plot can show it: one line of at most `length` characters that the font has."""
    clean = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in name)
    head = (length - 1) // 2
    return clean if len(clean) <= length else f"{clean[:head]}…{clean[len(clean) - (length - 1 - head) :]}"


def layer_ticks(steps: int, room: int) -> range:
    """Which of `steps` places are numbered when there is room for `room` numbers."""
    return range(0, steps, next(s for s in (1, 2, 4, 8, 16, 32, steps) if steps <= s * room))


def titled(axes: Axes, text: str) -> None:
    """A title at the left. No text from outside is read as a formula."""
    axes.set_title(text, loc="left", fontsize=9.5, parse_math=False)


def light(axes: Axes) -> None:
    """A light frame and grid."""
    axes.tick_params(length=0, labelsize=8, colors=SOFT)
    axes.grid(True, color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def diamond(axes: Axes, x: float, y: float) -> None:
    """The mark of a peak."""
    axes.plot([x], [y], "D", mfc="white", mec=INK, mew=1, ms=4.5, clip_on=False, zorder=5, label="peak")
