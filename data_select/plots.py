"""How scores are distributed, a panel a function and a panel a source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vfl_train.data_select.rank import Selection
from vfl_train.report import style

BINS = 40
PANEL_HEIGHT, FRAME_HEIGHT, COLUMNS = 1.5, 0.6, 3
MOST_SOURCES = 9


def distribution_bytes(selection: Selection, groups: str, names: Sequence[str], what: str) -> bytes:
    """PNG of the scores of the rows whose column `groups` (bucket, source) is each of `names`: all rows, and
    the picked ones. `what`: what the score is, for the axis. Nothing for no names."""
    if not names:
        return b""
    lines = -(-len(names) // COLUMNS)
    return style.png(
        PANEL_HEIGHT * lines + FRAME_HEIGHT, lambda figure: _draw(figure, selection, groups, names, what)
    )


def largest_sources(selection: Selection) -> list[str]:
    """The sources with most rows, most first."""
    names, sizes = np.unique(selection.column("source").astype(str), return_counts=True)
    return [str(names[i]) for i in np.lexsort((names, -sizes))[:MOST_SOURCES]]


def _draw(figure: Figure, selection: Selection, groups: str, names: Sequence[str], what: str) -> None:
    score, picked = selection.column("score"), selection.column("selected").astype(bool)
    group = selection.column(groups)
    low, high = float(score.min()), float(score.max())
    bins = np.linspace(low, high if high > low else low + 1, BINS + 1)
    lines = -(-len(names) // COLUMNS)
    panels = figure.subplots(lines, COLUMNS, squeeze=False, sharex=True).ravel()
    for axes, name in zip(panels, names, strict=False):
        mine = group == name
        _panel(axes, score[mine], score[mine & picked], bins)
        style.titled(axes, f"{style.short(name, 28)}: {int((mine & picked).sum())} of {int(mine.sum())}")
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=8.5)
    figure.supxlabel(what, fontsize=9, color=style.SOFT)
    figure.supylabel("rows", fontsize=9, color=style.SOFT)


def _panel(axes: Axes, every: np.ndarray, picked: np.ndarray, bins: np.ndarray) -> None:
    style.light(axes)
    axes.hist(every, bins.tolist(), color=style.GRID, edgecolor=style.SOFT, lw=0.3, label="all rows")
    axes.hist(picked, bins.tolist(), color=style.BLUE, label="picked")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
