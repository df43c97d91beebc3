"""`vfl-train export`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import ExportConfig

EXAMPLE = """
vfl-train export adapter --target peft --output export
"""


@config_command("export", ExportConfig, EXAMPLE)
def export(config: ExportConfig) -> None:
    """Write what can be published of an adapter or merged model.

    Only files on a list are copied, paths of this machine are removed, and the result is searched for
    tokens before it is written or uploaded. With --knockout, a plain model is written instead, without the
    layer that the file leaves out.
    """
    from vfl_train.hub.export import export as call

    call(config)
