"""knockout.png: what leaving out each layer does to a task, and how tasks resemble each other."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from vfl_train.report import style

TASK_HEIGHT, TREE_HEIGHT = 2.8, 2.2  # inches
NUMBERED = 40


def plot_bytes(found: dict[str, Any]) -> bytes:
    """The PNG of a knockout.json: a panel a task; of several tasks also their similarity and tree."""
    tasks = found["tasks"]
    several = len(tasks) > 1
    heights = [TASK_HEIGHT] * len(tasks) + ([TREE_HEIGHT + 0.3 * len(tasks)] if several else [])

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        for i, (name, task) in enumerate(tasks.items()):
            _task(figure.add_subfigure(grid[i]), name, task, found["module"])
        if several:
            _similarity(figure.add_subfigure(grid[len(tasks)]), found["similarity"])

    return style.png(sum(heights), draw)


def _task(panel: SubFigure | Figure, name: str, task: dict[str, Any], module: str) -> None:
    """Change in accuracy above, margin below, the choice marked."""
    above, below = panel.subplots(2, 1, sharex=True)
    out = {"attention": "attention", "mlp": "MLP", "both": "attention and MLP"}[module]
    layer, held = task["layer"], task["held_out"]
    if layer is None:
        verdict = f"nothing is knocked out: {task['reason']}"
    else:
        low, high = task["ci95"]
        verdict = (
            f"layer {layer}: held out {held['accuracy']:.0%} -> {held['without']:.0%}, "
            f"{task['held_out_gain']:+.1f} points ({low:+.1f} to {high:+.1f}), p = {task['p_value']:.3f}"
        )
    what = f"{style.short(name, 40)}: accuracy and margin without the {out} of a layer, {task['shots']} shots"
    style.titled(above, f"{what}\n{verdict}")
    _bars(above, task["interaction"], layer, "points")
    _bars(below, task["margin"], layer, "nats/token")
    below.set_xlabel("decoder layer", color=style.SOFT)
    below.set_xticks(style.layer_ticks(len(task["margin"]), NUMBERED))


def _bars(axes: Axes, values: list[float], layer: int | None, label: str) -> None:
    style.light(axes)
    colors = [style.GREEN if v > 0 else style.ORANGE for v in values]
    axes.bar(range(len(values)), values, color=colors, width=0.7)
    axes.axhline(0, color=style.SOFT, lw=0.8)
    axes.set_ylabel(label, fontsize=8, color=style.SOFT)
    axes.margins(y=0.15)
    if layer is not None:
        style.diamond(axes, layer, values[layer])


def _similarity(panel: SubFigure | Figure, found: dict[str, Any]) -> None:
    """The tree of the tasks at the left, their correlations in its order at the right."""
    tree, matrix = panel.subplots(1, 2, width_ratios=[1, 1.3])
    names, order = found["tasks"], found["order"]
    _tree(tree, found["merges"], order, len(names))
    shown = [[found["margin"][i][j] for j in order] for i in order]
    image = matrix.imshow(
        [[0.0 if r is None else r for r in row] for row in shown], cmap="RdBu", vmin=-1, vmax=1, aspect="auto"
    )
    for y, row in enumerate(shown):
        for x, r in enumerate(row):
            ink = "white" if r is not None and abs(r) > 0.7 else style.INK
            matrix.text(
                x, y, "-" if r is None else f"{r:.2f}", ha="center", va="center", fontsize=8, color=ink
            )
    labels = [style.short(names[i], 18) for i in order]
    # A name is never read as a formula.
    matrix.set_yticks(range(len(order)), labels, parse_math=False)
    matrix.set_xticks(range(len(order)), labels, rotation=30, ha="right", parse_math=False)
    matrix.tick_params(length=0, labelsize=8)
    matrix.spines[:].set_visible(False)
    style.titled(matrix, "Pearson correlation of the margins")
    bar = panel.colorbar(image, ax=matrix, shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, colors=style.SOFT)


def _tree(axes: Axes, merges: list[list[float]], order: list[int], n: int) -> None:
    """Average linkage, leaves at the right beside the rows of the matrix."""
    place = {leaf: (float(y), 0.0) for y, leaf in enumerate(order)}
    for i, (a, b, height) in enumerate(merges):
        (y_a, h_a), (y_b, h_b) = place[int(a)], place[int(b)]
        axes.plot([h_a, height, height, h_b], [y_a, y_a, y_b, y_b], color=style.BLUE, lw=1.4)
        place[n + i] = ((y_a + y_b) / 2, height)
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_xlim(max(0.1, 1.05 * max(m[2] for m in merges)), 0)
    axes.set_yticks([])
    style.light(axes)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("distance, 1 - r (average linkage)", color=style.SOFT)
    style.titled(axes, "Tasks that layers treat alike")
