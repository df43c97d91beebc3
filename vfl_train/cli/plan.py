"""`vfl-train plan`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import PlanConfig

EXAMPLE = """
vfl-train plan --profile profile/profile.json --functions ocr,count --emit peft
"""


@config_command("plan", PlanConfig, EXAMPLE)
def plan(config: PlanConfig) -> None:
    """Print settings that make another trainer train these layers.

    They name every module in full, in the form that the trainer matches names by, so that it trains these
    layers and nothing else.
    """
    from vfl_train.training.emit import emit_plan

    emit_plan(config)
