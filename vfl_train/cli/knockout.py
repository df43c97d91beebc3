"""`vfl-train knockout`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import KnockoutConfig

EXAMPLE = """
vfl-train knockout --model Qwen/Qwen2.5-VL-7B-Instruct --data task.jsonl --shots 10 --output knockout
"""


@config_command("knockout", KnockoutConfig, EXAMPLE)
def knockout(config: KnockoutConfig) -> None:
    """Find the layer a task is better off without.

    Leaves out one layer at a time, chooses on a few rows of each task (the rows' `source`), or abstains where
    chance could have done it, confirms on the rest and writes knockout.json and knockout.png.
    """
    from vfl_train.knockout.run import run_knockout

    run_knockout(config)
