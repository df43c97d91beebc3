"""`vfl-train verify`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import VerifyConfig

EXAMPLE = """
vfl-train verify adapter
"""


@config_command("verify", VerifyConfig, EXAMPLE)
def verify(config: VerifyConfig) -> None:
    """Check that an adapter or a model is what it says it is.

    Compares hashes, the adapted modules with the plan, the card and configuration with the rules of who loads
    them, and the outputs, in a fresh process with plain transformers and PEFT, with those of the parts it was
    made of. Writes verification.json into the folder; exit code 4 when something does not hold.
    """
    from vfl_train.hub.verify import verify as call

    call(config)
