"""The layer x function heat map of a profile."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vfl_train.schemas import Profile

BLOCK = "#d1495b"


def draw_heatmap(profile: Profile, planted: dict[str, int] | None = None) -> Figure:
    """Change rate by function (rows) and layer (columns), the flip block framed, the peak marked with its
    value. `planted`: layers known beforehand, marked with a triangle under the cell."""
    names, depth = list(profile.functions), profile.model.num_layers
    figure = Figure(figsize=(max(6.0, 1.6 + 0.52 * depth), 1.5 + 0.46 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    known = [f.change_rate if f.status == "ok" else [] for f in profile.functions.values()]
    rates = [r or [0.0] * depth for r in known]
    image = axes.imshow(rates, cmap="GnBu", vmin=0, vmax=1, aspect="auto")
    for y, name in enumerate(names):
        f = profile.functions[name]
        if f.status != "ok":
            axes.text((depth - 1) / 2, y, "not measurable", ha="center", va="center", color="#777777")
            continue
        for x, value in enumerate(f.change_rate):
            if value >= 0.05:
                color = "white" if value > 0.6 else "#333333"
                weight = "bold" if x == f.peak_layer else "normal"
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8, weight=weight)  # fmt: skip # noqa: E501
        block = f.flip_block or f.layers
        if block:
            axes.add_patch(
                Rectangle((block[0] - 0.46, y - 0.44), len(block) - 0.08, 0.88, fill=False, lw=2, ec=BLOCK)
            )
        if planted and name in planted:
            axes.plot([planted[name]], [y + 0.36], marker="^", color="black", markersize=5, clip_on=False)
    axes.set_xticks(range(depth))
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("decoder layer" + (" (triangle: planted there)" if planted else ""))
    what = {"swap": "swapping the image at this layer", "drop": "dropping the image at this layer"}
    how = what.get(profile.intervention, "dropping the image from this layer on")
    axes.set_title(
        f"{profile.model.name_or_path}: outputs changed by {how}, %",
        fontsize=10,
        loc="left",
        parse_math=False,
    )
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["0", "50", "100"])
    bar.outline.set_visible(False)
    return figure


def save_heatmap(profile: Profile, path: Path, planted: dict[str, int] | None = None) -> None:
    """Write the heat map as a PNG."""
    draw_heatmap(profile, planted).savefig(path, dpi=140, format="png", metadata={"Software": "vfl-train"})


def heatmap_bytes(profile: Profile, planted: dict[str, int] | None = None) -> bytes:
    """The heat map as PNG bytes, for pages that hold their pictures."""
    buffer = io.BytesIO()
    draw_heatmap(profile, planted).savefig(buffer, dpi=140, format="png", metadata={"Software": "vfl-train"})
    return buffer.getvalue()
