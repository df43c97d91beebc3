"""`vfl-train migrate`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import MigrateConfig

EXAMPLE = """
vfl-train migrate old-adapter --output adapter
"""


@config_command("migrate", MigrateConfig, EXAMPLE)
def migrate(config: MigrateConfig) -> None:
    """Rename the modules of an older adapter.

    transformers 4.52 moved the parts of vision-language models: adapters from before load as the base model
    in some versions, with a warning at most. They get today's names, or with --to legacy the older ones
    again. The weights stay as they are; the result is compared with the module names and sizes of the base.
    """
    from vfl_train.hub.migrate import migrate as call

    call(config)
