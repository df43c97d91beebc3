"""`vfl-train probes`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import ProbesConfig

EXAMPLE = """
vfl-train probes check my-probes
"""


@config_command("probes", ProbesConfig, EXAMPLE)
def probes(config: ProbesConfig) -> None:
    """Check a folder of your own probe pairs before profiling with it.

    The folder holds pairs.jsonl, one object a line (function, image_a, image_b, question, answer_a,
    answer_b, match), and the images. Every pair is read; every pair that cannot be used is named.
    """
    from vfl_train.functions.check import check_probes

    check_probes(config)
