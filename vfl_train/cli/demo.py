"""`vfl-train demo`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import DemoConfig

EXAMPLE = """
vfl-train demo --output vfl-demo
"""


@config_command("demo", DemoConfig, EXAMPLE)
def demo(config: DemoConfig) -> None:
    """Run everything once on the bundled model, on a CPU.

    The bundled model (`phantom`) has six vision functions planted at known layers. The demo finds them, picks
    data, trains LoRA on them and measures what changed, so you see every file and every report. It says
    nothing about real models: the layers are known because they were planted.
    """
    from vfl_train.demo import demo as call

    call(config)
