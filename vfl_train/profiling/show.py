"""What `vfl-train profile` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from vfl_train.options import format_layers
from vfl_train.profiling.cost import reference_line
from vfl_train.schemas import Profile


def show(found: Profile) -> None:
    """The layers found, what the drop plan allows, whether training moved them, and the cost."""
    console = Console()
    console.print(layers_table(found))
    if found.compared_with:
        console.print(_moved(found))
    cost = found.cost
    line = (
        f"{cost['rows']} rows for the price of {cost['plain_forwards']:.1f} plain forwards an image, "
        f"{cost['seconds']:.1f} s"
    )
    for text in (line, reference_line(cost)):
        if text:
            console.print(text, markup=False, highlight=False)


def layers_table(found: Profile) -> Table:
    """One row a function: pairs answered, peak, layers, and the drop plan where there is one."""
    table = Table("function", "answered", "peak", "changed", "papers' layers", "flip block")
    table.columns[0].no_wrap = True
    if found.drop_plan:
        table.add_column("drop from")
        points = next(iter(found.drop_plan.values()))["allowed_points"]
        table.caption = f"drop from: from there on the image can go, at most {points:g} points lost"
    for name, f in found.functions.items():
        peak = "-" if f.peak_layer is None else str(f.peak_layer)
        at_peak = "-" if f.peak_layer is None else f"{f.change_rate[f.peak_layer]:.0%}"
        status = "" if f.status == "ok" else f" ({f.status.replace('_', ' ')})"
        table.add_row(
            name + status, f"{f.pairs_answered}/{f.pairs}", peak, at_peak,
            format_layers(f.layers), format_layers(f.flip_block),
            *([_drop(found.drop_plan.get(name), found.model.num_layers)] if found.drop_plan else []),
        )  # fmt: skip
    return table


def _drop(plan: dict[str, Any] | None, depth: int) -> str:
    if plan is None:
        return "-"
    return "nowhere" if plan["from_layer"] == depth else str(plan["from_layer"])


def _moved(found: Profile) -> Table:
    table = Table("function", "peak: base", "now", "flip block: base", "now", "largest change of a rate")
    table.title = "did training move the layers?"
    for name, base in found.compared_with.items():
        f = found.functions[name]
        peaks = ("-" if p is None else str(p) for p in (base["peak_layer"], f.peak_layer))
        blocks = (format_layers(b) for b in (base["flip_block"], f.flip_block))
        change = base["largest_change"]
        table.add_row(name, *peaks, *blocks, "-" if change is None else f"{100 * change:.1f} points")
    return table
