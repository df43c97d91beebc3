"""`vfl-train lora --dry-run`: the layer x module map, where gradient goes, and what is left out."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from vfl_train.options import format_layers
from vfl_train.training.plan import LayerPlan

if TYPE_CHECKING:
    from rich.table import Table

    from vfl_train.config import LoraConfig
    from vfl_train.training.rows import TrainingRows


def plan_table(plan: LayerPlan, layer_names: list[str]) -> Table:
    """One row a decoder layer and adapted part, one column a module kind; a dot where LoRA goes.

    Args:
        layer_names: full module name of each decoder layer.
    """
    from rich.table import Table

    found, others = _by_layer(plan, layer_names)
    columns = list(dict.fromkeys(kind for kinds in found.values() for kind in kinds))
    table = Table(title=f"{plan.model.name_or_path}: LoRA on layers {format_layers(plan.layers)}")
    table.add_column("layer", justify="right")
    for column in columns:
        table.add_column(column.removesuffix("_proj"), justify="center")
    table.add_column("gradient", justify="center")
    table.add_column("function")
    for layer in range(plan.num_layers):
        cells = ["●" if column in found[layer] else "" for column in columns]
        flow = "↓" if layer >= plan.lowest_layer else ""
        names = ", ".join(f for f, layers in plan.functions.items() if layer in layers)
        table.add_row(str(layer), *cells, flow, names, style=None if found[layer] else "dim")
    for part in plan.also_adapts:
        blank = [""] * len(columns)
        table.add_row(part, *blank, "↓", f"{others[part]} linear modules")
    return table


def _by_layer(plan: LayerPlan, layer_names: list[str]) -> tuple[dict[int, list[str]], dict[str, int]]:
    """Adapted module kinds of each decoder layer, and how many modules of each other part are adapted."""
    kinds: dict[int, list[str]] = defaultdict(list)
    for name in plan.module_names:
        layer = next((i for i, prefix in enumerate(layer_names) if name.startswith(f"{prefix}.")), None)
        if layer is not None:
            kinds[layer].append(name.rsplit(".", 1)[1])
    return kinds, dict(plan.part_modules)


def print_plan(plan: LayerPlan, config: LoraConfig, rows: TrainingRows, layer_names: list[str]) -> None:
    """Print the map, where gradient goes, what is left out and why, and the size of the run."""
    from rich.console import Console

    from vfl_train.training.estimate import steps_of
    from vfl_train.training.launch import all_processes

    console = Console()
    console.print(plan_table(plan, layer_names))
    depth, low = plan.num_layers, plan.lowest_layer
    if plan.also_adapts:
        console.print(f"backward visits all layers, for the {' and '.join(plan.also_adapts)} below them")
    else:
        share = (depth + depth - low) / (2 * depth)
        console.print(
            f"backward visits layers {low}-{depth - 1} only: about {share:.0%} of the decoder compute of "
            "LoRA on every layer"
        )
    reasons: dict[str, int] = defaultdict(int)
    for group in plan.skipped:
        reasons[group["reason"]] += group["linears"]
    for reason, count in reasons.items():
        console.print(f"not adapted: {count} linear modules, {reason}")
    megabytes = plan.trainable_parameters * 4 / 1e6
    console.print(f"trainable parameters {plan.trainable_parameters:,} ({megabytes:.1f} MB in float32)")
    held = f", {len(rows.validation.rows)} for validation" if rows.validation is not None else ""
    named = f" of {rows.function}" if rows.function else ""
    unmeasured = ", those above --max-length included" if config.max_length is not None else ""
    steps = steps_of(config, len(rows.rows), all_processes(config))
    console.print(
        f"rows{named} {len(rows.rows)}{held}{unmeasured}, optimizer steps {steps}"
        + (f"; {len(rows.rejected)} rows are quarantined" if rows.rejected else "")
    )
