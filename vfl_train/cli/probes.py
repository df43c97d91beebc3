"""`vfl-train probes`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import ProbesConfig

EXAMPLE = """
vfl-train probes check my-probes
vfl-train probes export my-probes --functions ocr,count --pairs 100
"""


@config_command("probes", ProbesConfig, EXAMPLE)
def probes(config: ProbesConfig) -> None:
    """Check your own probe pairs, or write out the built-in ones.

    The folder holds pairs.jsonl, one object a line (function, image_a, image_b, question, answer_a,
    answer_b, match), and the images; of videos, image_a and image_b are lists of frames. check reads
    every pair and names every one that cannot be used.
    """
    if config.action == "export":
        from vfl_train.functions.export import export_probes

        export_probes(config)
        return
    from vfl_train.functions.check import check_probes

    check_probes(config)
