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
    still sees what an earlier one changed, so the merge is scored beside the base and each adapter alone: on
    the built-in probes 120 short answers for each of them, a minute or two on a GPU and much longer for a
    large model on a CPU (--pairs 0 leaves it out). To measure what 16 bits cost, the base is loaded in 32
    bits too, beside the first: six bytes a parameter in all.
    Merging is into 16-bit (or 32-bit) weights: an adapter trained on a 4-bit base goes into the model that
    base was made of.
    """
    from vfl_train.hub.merge import merge as call

    call(config)
