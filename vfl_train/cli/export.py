"""`vfl-train export`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import ExportConfig

EXAMPLE = """
vfl-train export adapter --target vllm --output export
vfl-train export adapter --output export --scorecard eval --push-to-hub USER/NAME --private
"""


@config_command("export", ExportConfig, EXAMPLE)
def export(config: ExportConfig) -> None:
    """Write a folder to serve or to publish.

    Of an adapter, merged model, profile or selection. An adapter or model is made to fit --target, with the
    command line that serves it in serve.md, or refused before anything is written. Only files on a list are
    copied, paths of this machine are removed, and the result is searched for tokens before it is written or
    uploaded. The card names base, licence, data and, with --scorecard, what was gained and forgotten.
    --push-to-hub uploads it in one commit; a push that was cut short goes on when the same command runs
    again. With --knockout, a plain model is written instead, without the layer that the file leaves out.
    """
    from vfl_train.hub.export import export as call

    call(config)
