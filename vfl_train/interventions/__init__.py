"""Interventions on what text tokens may read from the image at a layer, and their read-outs."""

from vfl_train.interventions.intervention import (
    BASE,
    NOISE,
    Branch,
    Intervention,
    drop,
    knockout,
    rerun,
    swap,
    uniform,
)
from vfl_train.interventions.readout import Prompt, ReadOut, Row, read_out

__all__ = [
    "BASE", "NOISE", "Branch", "Intervention", "Prompt", "ReadOut", "Row", "drop", "knockout", "read_out",
    "rerun", "swap", "uniform",
]  # fmt: skip
