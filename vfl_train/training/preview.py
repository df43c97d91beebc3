"""`vfl-train lora --dry-run`: the layer x module map and what the run would cost."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from vfl_train.options import format_layers
from vfl_train.training.plan import LayerPlan

if TYPE_CHECKING:
    from rich.table import Table

    from vfl_train.config import LoraConfig


def plan_table(plan: LayerPlan) -> Table:
    """One row a decoder layer, one column a module kind; a dot where LoRA goes."""
    from rich.table import Table

    kinds: dict[int, set[str]] = defaultdict(set)
    columns: list[str] = []
    for name in plan.module_names:
        parts = name.split(".")
        layer = next(int(p) for p in reversed(parts) if p.isdigit())
        kinds[layer].add(parts[-1])
        if parts[-1] not in columns:
            columns.append(parts[-1])
    table = Table(title=f"{plan.model.name_or_path}: LoRA on layers {format_layers(plan.layers)}")
    table.add_column("layer", justify="right")
    for column in columns:
        table.add_column(column.removesuffix("_proj"), justify="center")
    table.add_column("function")
    for layer in range(plan.num_layers):
        cells = ["●" if column in kinds[layer] else "" for column in columns]
        table.add_row(
            str(layer),
            *cells,
            ", ".join(f for f, layers in plan.functions.items() if layer in layers),
            style=None if kinds[layer] else "dim",
        )
    return table


def print_plan(plan: LayerPlan, config: LoraConfig, rows: int) -> None:
    """Print the map, what is left out, and estimates: steps, parameters, size, and compute against LoRA on
    every layer (a forward of one layer is one unit, its backward another)."""
    from rich.console import Console

    from vfl_train.training.run import steps_of

    console = Console()
    console.print(plan_table(plan))
    reasons: dict[str, int] = defaultdict(int)
    for group in plan.skipped:
        reasons[group["reason"]] += group["linears"]
    for reason, count in reasons.items():
        console.print(f"not adapted: {count} linear modules, {reason}")
    depth, low = plan.num_layers, plan.lowest_layer
    share = (depth + depth - low) / (2 * depth)
    size = plan.trainable_parameters * 4 / 1e6
    console.print(f"rows {rows}, optimizer steps {steps_of(config, rows)}")
    console.print(f"trainable parameters {plan.trainable_parameters:,} ({size:.1f} MB in float32)")
    console.print(
        f"backward visits layers {low}-{depth - 1} only: about {share:.0%} of the decoder compute of "
        "LoRA on every layer"
    )
