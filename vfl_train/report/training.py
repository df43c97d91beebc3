"""The course of a training run from its log: losses, functions, validation, learning rate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vfl_train.report import style

_FUNCTIONS = 8  # lines that can still be told apart; further ones are in the log
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1, 2)))
_COLOURS = (style.ORANGE, style.GREEN, "#cc79a7", "#56b4e9", "#e69f00", "#7b8794", "#882255", style.INK)
Series = list[tuple[int, float]]


def training_png(log: Path) -> bytes:
    """The plot of a `train_log.jsonl` as PNG bytes."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    functions = _functions(entries)

    def draw(figure: Figure) -> None:
        heights = [3, 3, 1] if functions else [3, 1]
        panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        _losses(panels[0], entries)
        if functions:
            _by_function(panels[1], entries, functions)
        _rate(panels[-1], entries)
        panels[-1].set_xlim(left=0)
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[-1].set_xlabel("optimizer step", fontsize=9, color=style.SOFT)

    return style.png(6.4 if functions else 4.0, draw)


def series(entries: Sequence[dict[str, Any]], name: str) -> Series:
    """(step, value) of a logged quantity, where it is a number."""
    return [(e["step"], e[name]) for e in entries if isinstance(e.get(name), int | float)]


def _functions(entries: Sequence[dict[str, Any]]) -> list[str]:
    keys = {key for entry in entries for key in entry}
    found = {k.split("/", 1)[1] for k in keys if k.startswith(("loss/", "eval_loss/"))}
    return sorted(found)[:_FUNCTIONS]


def _losses(axes: Axes, entries: Sequence[dict[str, Any]]) -> None:
    _line(axes, series(entries, "loss"), "training", color=style.BLUE, lw=1.8)
    held_out = series(entries, "eval_loss")
    _line(axes, held_out, "validation", color=style.ORANGE, lw=1.6, marker="o", ms=3.5)
    if held_out:
        style.diamond(axes, *min(held_out, key=lambda point: point[1]))
        axes.lines[-1].set_label("lowest")
    _frame(axes, "Loss, nats per answer token")


def _by_function(axes: Axes, entries: Sequence[dict[str, Any]], functions: Sequence[str]) -> None:
    for number, name in enumerate(functions):
        look: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)], "ls": _DASHES[number % len(_DASHES)],
        }  # fmt: skip
        _line(axes, series(entries, f"loss/{name}"), style.short(name, 24), lw=1.5, **look)
        held_out = series(entries, f"eval_loss/{name}")
        _line(axes, held_out, "", lw=0, marker="o", ms=3.5, color=look["color"])
    dots = any(key.startswith("eval_loss/") for entry in entries for key in entry)
    _frame(axes, "Loss of each function" + (", dots: validation" if dots else ""))


def _rate(axes: Axes, entries: Sequence[dict[str, Any]]) -> None:
    _line(axes, series(entries, "learning_rate"), "", color=style.SOFT, lw=1.4)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.yaxis.get_offset_text().set(fontsize=8, color=style.SOFT)
    _frame(axes, "Learning rate")


def _line(axes: Axes, points: Series, label: str, **look: Any) -> None:
    if points:
        single = {"marker": "o", "ms": 3.5} if len(points) == 1 else {}
        axes.plot(*zip(*points, strict=True), label=label or None, **{**single, **look})


def _frame(axes: Axes, title: str) -> None:
    style.titled(axes, title)
    style.light(axes)
    axes.tick_params(labelbottom=True)
    if any(not label.startswith("_") for label in axes.get_legend_handles_labels()[1]):
        axes.legend(loc="upper right", frameon=False, fontsize=8.5, ncols=2)
