"""Small multiples, one panel a function: rates by layer with their intervals, and drop curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from vfl_train.report import style
from vfl_train.schemas import FunctionProfile, Profile

PANEL_HEIGHT, FRAME_HEIGHT = 1.75, 0.75  # inches
FLIP_SHADE, FREE_SHADE, QUIET = "#fbe3d2", "#dff2ea", "#7b8794"
LEGEND = (  # its order
    "changed", "answers kept", "95 % interval", "flipped", "peak", "flip block", "floor", "unrelated control",
    "noise control", "drop from here", "image not needed",
)  # fmt: skip


# --- rates by layer ------------------------------------------------------------------------------


def curves_height(profile: Profile) -> float:
    """Inches that `draw_curves` wants; 0 if there is no rate to draw."""
    return _height(len(profile.functions)) if any(f.change_rate for f in profile.functions.values()) else 0.0


def curves_bytes(profile: Profile) -> bytes:
    """The curves as PNG bytes, none if there is no rate to draw."""
    height = curves_height(profile)
    return style.png(height, lambda figure: draw_curves(figure, profile)) if height else b""


def draw_curves(panel: Figure | SubFigure, profile: Profile) -> None:
    """Per function change rate with 95 % band, flip rate, floor and controls; the block shaded."""

    def draw(axes: Axes, name: str) -> None:
        f = profile.functions[name]
        _rates(axes, f)
        if f.status != "ok":
            axes.set_title(
                f"not measurable: {f.pairs_answered} of {f.pairs} pairs answered", loc="right", fontsize=8.5
            )

    _panels(panel, list(profile.functions), profile.model.num_layers, "outputs, %", draw)
    panel.supxlabel("decoder layer", fontsize=9, color=style.SOFT)


def _rates(axes: Axes, f: FunctionProfile) -> None:
    layers, alpha = range(len(f.change_rate)), 1.0 if f.status == "ok" else 0.4
    if f.flip_block:
        first, last = f.flip_block[0], f.flip_block[-1]
        axes.axvspan(first - 0.5, last + 0.5, color=FLIP_SHADE, lw=0, label="flip block")
    if f.ci95:
        _band(axes, f.ci95)
    for kind, dashes in (("unrelated", ":"), ("noise", "-.")):
        if rates := f.controls.get(kind):
            axes.plot(layers, rates, ls=dashes, lw=1.1, color=QUIET, label=f"{kind} control")
    if floor := [c for c in (f.controls.get("self"), f.controls.get("nuisance")) if c]:
        highest = [max(v) for v in zip(*floor, strict=True)]
        axes.plot(layers, highest, lw=1.4, color=style.SOFT, label="floor")
    axes.plot(layers, f.change_rate, "o-", color=style.BLUE, lw=2, ms=2.4, alpha=alpha, label="changed")
    if f.flip_rate:
        dash = (0, (3, 2))
        axes.plot(layers, f.flip_rate, ls=dash, color=style.ORANGE, lw=1.3, alpha=alpha, label="flipped")
    if f.peak_layer is not None:
        style.diamond(axes, f.peak_layer, f.change_rate[f.peak_layer])


# --- drop curves ---------------------------------------------------------------------------------


def drop_bytes(profile: Profile) -> bytes:
    """The drop curves of the measurable functions as PNG bytes, none without one."""
    names = [n for n, f in profile.functions.items() if f.status == "ok" and n in profile.drop_curve]
    depth = profile.model.num_layers

    def draw(figure: Figure) -> None:
        _panels(figure, names, depth + 1, "answers kept, %", lambda a, n: _drop(a, profile, n))
        text = f"image dropped from this layer to the last ({depth}: untouched)"
        figure.supxlabel(text, fontsize=9, color=style.SOFT)

    return style.png(_height(len(names)), draw) if names else b""


def _drop(axes: Axes, profile: Profile, name: str) -> None:
    """Accuracy with its band; where the drop plan lets the image go, shaded."""
    curve, depth = profile.drop_curve[name], profile.model.num_layers
    kept = curve["accuracy"]
    here = profile.drop_plan.get(name, {}).get("from_layer", depth)
    if here < depth:
        axes.axvspan(here - 0.5, depth + 0.5, color=FREE_SHADE, lw=0, label="image not needed")
    _band(axes, curve["ci95"])
    axes.plot(range(depth + 1), kept, "o-", color=style.BLUE, lw=2, ms=2.4, label="answers kept")
    if here < depth:
        axes.plot(
            [here], [kept[here]], "s", mfc="white", mec=style.GREEN, mew=1.6, ms=5.5, label="drop from here"
        )


def _band(axes: Axes, intervals: Sequence[Sequence[float]]) -> None:
    low, high = zip(*intervals, strict=True)
    axes.fill_between(range(len(low)), low, high, color=style.BLUE, alpha=0.22, lw=0, label="95 % interval")


# --- the grid ------------------------------------------------------------------------------------


def _height(panels: int) -> float:
    return FRAME_HEIGHT + PANEL_HEIGHT * -(-panels // _columns(panels))


def _columns(panels: int) -> int:
    return 1 if panels == 1 else 2


def _panels(
    panel: Figure | SubFigure, names: Sequence[str], steps: int, what: str, draw: Callable[[Axes, str], None]
) -> None:
    """One small plot a name on common axes of `steps` places, and one legend for all."""
    columns = _columns(len(names))
    grid = panel.subplots(-(-len(names) // columns), columns, sharex=True, sharey=True, squeeze=False)
    labelled: dict[str, Artist] = {}
    for i, axes in enumerate(grid.flat):
        if i >= len(names):
            axes.set_axis_off()
            continue
        draw(axes, names[i])
        style.titled(axes, style.short(names[i], 28))
        style.light(axes)
        axes.tick_params(labelbottom=True, labelleft=True)
        if i % columns == 0:
            axes.set_ylabel(what, fontsize=8.5, color=style.SOFT)
        handles, labels = axes.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    grid[0, 0].set(xlim=(-0.7, steps - 0.3), ylim=(-0.04, 1.06))
    grid[0, 0].set_xticks(style.layer_ticks(steps, 40 if columns == 1 else 20))
    grid[0, 0].set_yticks(*style.PERCENT_TICKS)
    shown = [label for label in LEGEND if label in labelled]
    panel.legend(
        [labelled[label] for label in shown], shown, loc="outside upper left", ncols=len(shown),
        frameon=False, fontsize=8.5,
    )  # fmt: skip
