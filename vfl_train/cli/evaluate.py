"""`vfl-train eval`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import EvalConfig

EXAMPLE = """
vfl-train eval --model Qwen/Qwen2.5-VL-7B-Instruct --adapter adapter \\
  --fail-if-drop ocr=1.0,count=2 --output eval
vfl-train eval --model Qwen/Qwen2.5-VL-7B-Instruct --data textvqa.jsonl \\
  --drop-from 24,20,16 --output drop
vfl-train eval --model Qwen/Qwen2.5-VL-7B-Instruct --data task.jsonl \\
  --knockout knockout --output without
vfl-train eval --model Qwen/Qwen2.5-VL-7B-Instruct --data textvqa.jsonl \\
  --rerun 22 --output twice
"""


@config_command("eval", EvalConfig, EXAMPLE)
def evaluate(config: EvalConfig) -> None:
    """Score each vision function; with an adapter, gains and losses.

    Writes scorecard.json: accuracy with its 95 % interval for each function, and with --adapter the base's
    accuracy and the change in points. --fail-if-drop makes it a gate: exit code 4 when a function lost more.
    --drop-from 24,20,16 adds what is still right when no text may read the image from layer 24 on, from 20 on
    and from 16 on: the table of the VFL paper, on your own questions. --knockout adds what is right without
    the layer that `vfl-train knockout` chose; --rerun 22 what is right with that layer run twice, beside
    every other layer run twice.
    """
    from vfl_train.evaluation.run import evaluate as call

    call(config)
