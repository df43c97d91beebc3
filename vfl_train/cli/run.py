"""`vfl-train run`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import RunConfig

EXAMPLE = """
vfl-train run vfl-train.yaml
vfl-train run quickstart      # a recipe that comes with the package
"""


@config_command("run", RunConfig, EXAMPLE)
def run(config: RunConfig) -> None:
    """Run a recipe: profile, select, lora, eval, merge on your data.

    Each step writes its own folder below the recipe's project folder. A run that was stopped goes on where it
    was; steps that are done are not done again.
    """
    from vfl_train.demo import run_recipe

    run_recipe(config)
