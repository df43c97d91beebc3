"""`vfl-train profile`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import ProfileConfig

EXAMPLE = """
vfl-train profile --model phantom --pairs 24 --output profile
vfl-train profile --model Qwen/Qwen2.5-VL-7B-Instruct --probes my-probes --output profile
vfl-train profile --model Qwen/Qwen2.5-VL-7B-Instruct --profile hub:USER/NAME --output profile
"""


@config_command("profile", ProfileConfig, EXAMPLE)
def profile(config: ProfileConfig) -> None:
    """Find the layers that read each vision function out of the image.

    Probe pairs are two images with one question and two answers. At one layer at a time the text reads the
    other image; where the answer changes, the layer reads that function. Writes profile.json, profile.png
    and report.html. With --profile, the profile that somebody else measured of this model is checked and
    taken instead.
    """
    from vfl_train.profiling.run import profile as call

    call(config)
