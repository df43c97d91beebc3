"""LoRA on the phantom's shifted domain: what training different layers gains and forgets.

    python scripts/adapt_phantom.py --output DIR --layers 10 --layers 0-11 --layers 6
    python scripts/adapt_phantom.py --model phantom-unplanted --output DIR --layers 5-9 --layers 0-11

Trains on handwritten text with printed text mixed in (one pass over distinct rows), once for every --layers,
and prints one Markdown row each: handwritten and printed ocr, and the largest loss on any other function.
Hold the handwritten column against the ceiling that scripts/check_phantom.py prints.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vfl_train.config import LoraConfig
from vfl_train.cpu import keep_freed_memory
from vfl_train.evaluation.run import Asking, probe_questions, score
from vfl_train.models import VisionLanguageModel
from vfl_train.phantom.datasets import probe_set, write_pool
from vfl_train.schemas import BUILTIN_FUNCTIONS
from vfl_train.training.run import train_lora

BATCH = 16
SHARES = {"ocr": 0.35, "ocr_handwritten": 0.65}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="phantom")
    parser.add_argument("--layers", action="append", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    keep_freed_memory()

    pool = write_pool(arguments.output / "pool", arguments.steps * BATCH, arguments.seed, SHARES)
    kinds = dict.fromkeys(BUILTIN_FUNCTIONS, 50) | {"ocr": 100, "ocr_handwritten": 100}
    questions = list(probe_questions(probe_set(kinds, arguments.seed + 1)))
    print("| model | layers | handwritten, before | after | printed ocr | largest loss elsewhere, points |")
    print("|---|---|---|---|---|---|")
    for layers in arguments.layers:
        adapter = train_lora(
            LoraConfig(
                model=arguments.model, layers=layers, data=str(pool),
                output=arguments.output / f"lora-{layers}",
                per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, seed=arguments.seed,
                max_steps=arguments.steps, learning_rate=arguments.learning_rate, overwrite=True,
            )
        )  # fmt: skip
        vlm = VisionLanguageModel.load(arguments.model, adapter=str(adapter))
        scores = score(vlm, questions, Asking(max_new_tokens=8, with_base=True))
        others = {n: s.delta or 0.0 for n, s in scores.items() if not n.startswith("ocr")}
        worst = min(others, key=lambda n: others[n])
        hand, printed = scores["ocr_handwritten"], scores["ocr"]
        print(
            f"| {arguments.model} | {layers} | {hand.base_accuracy:.1%} | {hand.accuracy:.1%} "
            f"| {printed.accuracy:.1%} | {others[worst]:+.1f} ({worst}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
