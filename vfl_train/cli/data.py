"""`vfl-train data`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import DataConfig

EXAMPLE = """
vfl-train data check train.jsonl --image-root images
vfl-train data preview train.jsonl --limit 3
"""


@config_command("data", DataConfig, EXAMPLE)
def data(config: DataConfig) -> None:
    """Look at training data without a model.

    `check` reads every row and opens every image; it counts and names the rows that cannot be used and why.
    `preview` prints the first rows as conversations.
    """
    from vfl_train.data.check import check, preview

    (check if config.action == "check" else preview)(config)
