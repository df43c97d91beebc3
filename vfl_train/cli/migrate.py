"""`vfl-train migrate`."""

from __future__ import annotations

from vfl_train.cli.command import config_command, refuse
from vfl_train.config import MigrateConfig

EXAMPLE = """
vfl-train migrate old-adapter --output adapter
"""


@config_command("migrate", MigrateConfig, EXAMPLE)
def migrate(config: MigrateConfig) -> None:
    """Rename the keys of an older adapter. Not there yet.

    Adapters trained with an older transformers name modules that newer ones call differently.
    """
    refuse("migrate")
