"""Train the phantom (or, with --unplanted, its twin) from scratch on the CPU and save it as a model folder.

    python scripts/train_phantom.py --output vfl_train/phantom/weights/planted --seed 0
    python scripts/train_phantom.py --output vfl_train/phantom/weights/unplanted --seed 0 --unplanted

The folder holds float16 safetensors, config, processor and training.json (recipe, time, log).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from vfl_train.cpu import keep_freed_memory
from vfl_train.phantom.training import Recipe, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unplanted", action="store_true", help="free turns only: the twin")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply all step counts (for a smoke run)")
    arguments = parser.parse_args()

    keep_freed_memory()
    recipe = Recipe(seed=arguments.seed, planted=not arguments.unplanted)
    steps = ("tower_steps", "function_steps", "interchange_steps")
    recipe = replace(recipe, **{s: max(1, round(getattr(recipe, s) * arguments.scale)) for s in steps})
    history: list[dict] = []

    def log(entry: dict) -> None:
        history.append(entry)
        print(json.dumps(entry), flush=True)

    model, processor, record = train(recipe, log)
    arguments.output.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    (arguments.output / "model.safetensors").chmod(0o644)  # safetensors makes it the owner's alone
    record["log"] = history[:: max(1, len(history) // 12)] + history[-1:]
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"saved {arguments.output} after {record['seconds']} s")


if __name__ == "__main__":
    main()
