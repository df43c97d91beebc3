"""`vfl-train plan`."""

from __future__ import annotations

from vfl_train.cli.command import config_command, refuse
from vfl_train.config import PlanConfig

EXAMPLE = """
vfl-train plan --profile profile/profile.json --functions ocr,count --emit peft
"""


@config_command("plan", PlanConfig, EXAMPLE)
def plan(config: PlanConfig) -> None:
    """Print settings that make another trainer train these layers."""
    if config.emit != "peft":
        refuse(f"--emit {config.emit}", "--emit peft works")
    from vfl_train.training.plan import emit_plan

    emit_plan(config)
