"""`vfl-train merge`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import MergeConfig

EXAMPLE = """
vfl-train merge adapter-ocr adapter-count --output merged
"""


@config_command("merge", MergeConfig, EXAMPLE)
def merge(config: MergeConfig) -> None:
    """Merge adapters into their base model.

    Adapters on different layers merge exactly: each weight gets the update of one adapter. A later layer
    still sees what an earlier one changed, so measure the merge with `vfl-train eval`.
    """
    from vfl_train.hub.merge import merge as call

    call(config)
