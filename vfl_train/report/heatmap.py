"""The picture of a profile: a layer x function heat map, and below it the curves with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from vfl_train.report import style
from vfl_train.report.curves import curves_height, draw_curves
from vfl_train.schemas import FunctionProfile, Profile

WHAT = {
    "swap": "swapping the image at one layer",
    "drop": "dropping the image at one layer",
    "drop-from": "dropping the image from a layer on",
}
NUMBERED = 40  # layers up to which a cell is wide enough for its number
DARK = 0.6  # rates above it are written in white
EMPTY: dict[str, Any] = {"fc": "#f5f5f5", "ec": "#d5d5d5", "hatch": "///"}


def draw_heatmap(panel: Figure | SubFigure, profile: Profile, planted: dict[str, int] | None = None) -> None:
    """Change rate by function (rows) and layer (columns), the flip block framed, the peak marked and written
    out at the right with its interval. `planted`: layers known beforehand, marked below their cells."""
    functions, depth = profile.functions, profile.model.num_layers
    axes = panel.add_subplot()
    shown = [f.change_rate if f.status == "ok" else [0.0] * depth for f in functions.values()]
    image = axes.imshow(shown, cmap="GnBu", vmin=0, vmax=1, aspect="auto")
    for y, (name, f) in enumerate(functions.items()):
        _row(axes, y, f, depth)
        if planted and name in planted:
            axes.plot([planted[name]], [y + 0.36], "^", color=style.INK, ms=4.5, clip_on=False)
    _scales(axes, profile)
    bar = panel.colorbar(image, ax=axes, shrink=0.9, pad=0.01, aspect=max(8, 3 * len(functions)))
    bar.set_ticks(style.PERCENT_TICKS[0], labels=style.PERCENT_TICKS[1])
    bar.ax.tick_params(length=0, labelsize=8, colors=style.SOFT)
    bar.outline.set_visible(False)
    marks = _legend(profile, bool(planted))
    panel.legend(handles=marks, loc="outside lower left", ncols=4, frameon=False, fontsize=8.5)


def _row(axes: Axes, y: int, f: FunctionProfile, depth: int) -> None:
    """Numbers, block and peak of one row, or that it says nothing."""
    if f.status != "ok":
        axes.add_patch(Rectangle((-0.5, y - 0.5), depth, 1, **EMPTY, lw=0, zorder=3))
        text = f"not measurable: {f.pairs_answered} of {f.pairs} pairs answered"
        box = {"fc": EMPTY["fc"], "lw": 0, "pad": 2}
        axes.text((depth - 1) / 2, y, text, ha="center", va="center", fontsize=8.5, bbox=box)
        return
    for x, value in enumerate(f.change_rate if depth <= NUMBERED else []):
        if value >= 0.05:
            color, weight = "white" if value > DARK else style.INK, "bold" if x == f.peak_layer else "normal"
            axes.text(
                x, y, f"{100 * value:.0f}", ha="center", va="center", color=color, weight=weight,
                fontsize=8 if depth <= 30 else 7,
            )  # fmt: skip
    if block := _block(f):
        corner = block[0] - 0.46, y - 0.44
        axes.add_patch(
            Rectangle(corner, len(block) - 0.08, 0.88, fill=False, lw=2, ec=style.ORANGE, zorder=3)
        )
    if f.peak_layer is not None:
        style.diamond(axes, f.peak_layer, y - 0.36)


def _scales(axes: Axes, profile: Profile) -> None:
    """White lines between the cells, layers, names, peaks at the right, titles."""
    functions, depth = profile.functions, profile.model.num_layers
    axes.set_xticks([k - 0.5 for k in range(1, depth)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(functions))], minor=True)
    axes.grid(True, which="minor", color="white", lw=1)
    axes.set_xticks(style.layer_ticks(depth, NUMBERED))
    axes.set_yticks(range(len(functions)), [style.short(n, 24) for n in functions])
    axes.set_xlabel("decoder layer", color=style.SOFT)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(functions)), [_peak(f) for f in functions.values()])
    for side in (axes, right):
        side.tick_params(which="both", length=0, labelsize=8.5, colors=style.INK)
        side.spines[:].set_visible(False)
    name = style.short(profile.model.name_or_path, 90)
    style.titled(axes, f"{name}\nOutputs changed by {WHAT[profile.intervention]}, %")
    axes.annotate(
        "peak (95 % interval)", (1, 1), (4, 5), xycoords="axes fraction", textcoords="offset points",
        color=style.SOFT, fontsize=8.5, annotation_clip=False,
    )  # fmt: skip


def _block(f: FunctionProfile) -> list[int]:
    """What is framed: the flip block; of a drop, which has none, the layers around the peak."""
    return f.flip_block or ([] if f.flip_rate else f.layers)


def _peak(f: FunctionProfile) -> str:
    if f.status != "ok":
        return ""
    if f.peak_layer is None:
        return "none above the floor"
    low, high = f.ci95[f.peak_layer]
    return f"layer {f.peak_layer}: {100 * f.change_rate[f.peak_layer]:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def _legend(profile: Profile, planted: bool) -> list[Line2D | Patch]:
    """What of the marks is there."""
    framed = "flip block" if profile.intervention == "swap" else "layers around the peak"
    functions, marks = profile.functions.values(), list[Line2D | Patch]()
    if any(f.peak_layer is not None for f in functions):
        marks.append(Line2D([], [], ls="", marker="D", mfc="white", mec=style.INK, ms=4.5, label="peak"))
    if any(_block(f) for f in functions):
        marks.append(Patch(fill=False, ec=style.ORANGE, lw=2, label=framed))
    if planted:
        marks.append(Line2D([], [], ls="", marker="^", color=style.INK, ms=4.5, label="planted there"))
    if any(f.status != "ok" for f in functions):
        marks.append(Patch(**EMPTY, label="not measurable"))
    return marks


def _height(profile: Profile) -> float:
    """Inches of the heat map."""
    return 1.5 + 0.42 * len(profile.functions)


def heatmap_bytes(profile: Profile, planted: dict[str, int] | None = None) -> bytes:
    """The heat map as PNG bytes, for pages that hold their pictures."""
    return style.png(_height(profile), lambda figure: draw_heatmap(figure, profile, planted))


def save_heatmap(profile: Profile, path: Path, planted: dict[str, int] | None = None) -> None:
    """Write profile.png: the heat map and, where anything was measured, the curves below it."""
    above, below = _height(profile), curves_height(profile)

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(2, 1, height_ratios=[above, below])
        draw_heatmap(figure.add_subfigure(grid[0]), profile, planted)
        draw_curves(figure.add_subfigure(grid[1]), profile)

    path.write_bytes(style.png(above + below, draw) if below else heatmap_bytes(profile, planted))
