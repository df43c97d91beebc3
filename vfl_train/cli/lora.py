"""`vfl-train lora`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import LoraConfig

EXAMPLE = """
vfl-train lora --model Qwen/Qwen2.5-VL-7B-Instruct --profile profile/profile.json --functions ocr,count \\
  --data selected/selected.jsonl --image-root . --output adapter
vfl-train lora --layers 20-23 --data train.jsonl --output adapter --dry-run
"""


@config_command("lora", LoraConfig, EXAMPLE)
def lora(config: LoraConfig) -> None:
    """Train LoRA on the layers of chosen functions, on no others.

    The layers come from a profile (--functions) or from you (--layers). The output loads with plain
    PeftModel.from_pretrained and says in plan.json which modules were adapted. Training options have the
    names of transformers.TrainingArguments.
    """
    from vfl_train.training.run import train_lora as call

    call(config)
