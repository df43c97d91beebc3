"""`vfl-train knockout`."""

from __future__ import annotations

from vfl_train.cli.command import config_command, refuse
from vfl_train.config import KnockoutConfig

EXAMPLE = """
vfl-train knockout --model Qwen/Qwen2.5-VL-7B-Instruct --data task.jsonl --shots 10 --output knockout
"""


@config_command("knockout", KnockoutConfig, EXAMPLE)
def knockout(config: KnockoutConfig) -> None:
    """Find the layer a task is better off without. Not there yet.

    Will leave out one layer at a time, choose on a few rows, confirm on the rest and write knockout.json.
    """
    refuse("knockout")
