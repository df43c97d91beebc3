"""`vfl-train select`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import SelectConfig

EXAMPLE = """
vfl-train select --model Qwen/Qwen2.5-VL-7B-Instruct --profile profile/profile.json \\
  --data train.jsonl --budget 0.2 --functions ocr,count --output selected
"""


@config_command("select", SelectConfig, EXAMPLE)
def select(config: SelectConfig) -> None:
    """Sort training rows by the vision function they need, and pick.

    A row whose answer becomes less likely when a function's layers do not see the image needs that function.
    Writes the selected rows in the format and order of the input, scores.parquet with every row's numbers,
    quarantine.jsonl with the rows that cannot be used and why, and report.html.
    """
    from vfl_train.data_select.run import select as call

    call(config)
