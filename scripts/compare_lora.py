"""VFL-LoRA against its controls on the phantom's shifted domain: gain, forgetting and cost.

    python scripts/compare_lora.py --profile profile/profile.json --output DIR
    python scripts/compare_lora.py --model phantom-unplanted --profile twin/profile.json --output DIR \\
        --arm vfl --arm all --arm random --arm reversed --arm vfl:max_steps=690

Every arm trains on handwritten text with printed text mixed in (one pass over distinct rows, unless the arm
says how many `rows` there are), once for every seed; a seed draws the rows, the adapter's A and the control's
layers. An arm is `vfl` (the layers of --function in the profile) or a control, with any setting of `lora`
changed after a colon. Runs that stand in --output are not repeated. Prints a Markdown table and writes
comparison.json; time is given in forwards of one decoder layer over the batch, counted, and in seconds,
measured.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bench.comparing import Comparison, accuracy, parser_of
from bench.tables import markdown, mean_and_each

from vfl_train.config import CONTROLS, LoraConfig
from vfl_train.options import coerce, specs
from vfl_train.phantom.datasets import write_pool
from vfl_train.schemas import BUILTIN_FUNCTIONS, read_json
from vfl_train.training.run import train_lora

BATCH = 16
SHARES = {"printed": 0.35, "handwritten": 0.65}


def settings_of(arm: str) -> tuple[str, dict[str, Any]]:
    """("vfl", {"max_steps": 690}) of "vfl:max_steps=690". `rows` is ours: of the pool."""
    name, _, rest = arm.partition(":")
    pairs = dict(item.split("=", 1) for item in rest.split(",") if item)
    known, rows = specs(LoraConfig), pairs.pop("rows", None)
    truth = {"true": True, "false": False}
    changes = {k: coerce(known[k], truth.get(v, v), f"--arm {k}") for k, v in pairs.items()}
    return name, changes if rows is None else {**changes, "rows": int(rows)}


def train(arm: str, seed: int, arguments: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Train one arm on its seed's rows; returns the adapter and what the run cost."""
    name, changes = settings_of(arm)
    steps = changes.pop("max_steps", arguments.steps)
    rows = changes.pop("rows", steps * BATCH)
    folder = arguments.output / f"seed{seed}"
    pool = folder / f"pool-{rows}" / "pool.json"
    if not pool.is_file():
        kinds = {
            arguments.function: SHARES["printed"],
            f"{arguments.function}_handwritten": SHARES["handwritten"],
        }
        write_pool(pool.parent, rows, seed, kinds)
    settings: dict[str, Any] = dict(
        model=arguments.model, profile=str(arguments.profile), functions=(arguments.function,),
        control=None if name == "vfl" else name, data=str(pool), image_root=pool.parent,
        per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, max_steps=steps,
        learning_rate=arguments.learning_rate, seed=seed, device="cpu", overwrite=True,
        output=folder / arm.replace(":", "-").replace("=", "").replace(",", "-"),
    )  # fmt: skip
    if "layers" in changes:
        settings["functions"] = ()
    settings.update(changes)
    start, busy = time.perf_counter(), time.process_time()
    adapter = train_lora(LoraConfig(**settings))
    plan = read_json(adapter / "plan.json")
    depth, low = plan["model"]["num_layers"], plan["layers"][0]
    return adapter, {
        "layers": plan["layers"], "parameters": plan["trainable_parameters"], "steps": steps,
        "layer_forwards": steps * (2 * depth - low),  # forward of all, backward of those from `low` on
        "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy,
    }  # fmt: skip


def measure(arguments: argparse.Namespace, adapter: Path | None, seed: int) -> dict[str, float]:
    """Accuracy in percent of every function, the handwritten domain beside them."""
    function = arguments.function
    kinds = dict.fromkeys(BUILTIN_FUNCTIONS, 50) | {function: 100, f"{function}_handwritten": 100}
    return accuracy(arguments.model, adapter, kinds, seed)


def run_arm(arm: str, seed: int, arguments: argparse.Namespace, base: dict[str, float]) -> dict[str, Any]:
    """Train, measure, and compare with the untouched model."""
    adapter, cost = train(arm, seed, arguments)
    after = measure(arguments, adapter, seed)
    shifted = f"{arguments.function}_handwritten"
    elsewhere = {f: base[f] - after[f] for f in BUILTIN_FUNCTIONS if f != arguments.function}
    worst = max(elsewhere, key=lambda f: elsewhere[f])
    return {
        "arm": arm, "seed": seed, **cost, "accuracy": after, "gain": after[shifted] - base[shifted],
        "in_domain": after[shifted], "printed_loss": base[arguments.function] - after[arguments.function],
        "largest_loss_elsewhere": max(0.0, elsewhere[worst]), "worst": worst,
    }  # fmt: skip


def table(results: list[dict[str, Any]], arms: list[str]) -> str:
    """One Markdown row an arm: the mean over seeds, and each seed's value behind it."""
    head = ("arm", "layers", "parameters", "layer forwards a row", "in domain", "gain", "printed: loss",
            "elsewhere: largest loss")  # fmt: skip
    measured = ("in_domain", "gain", "printed_loss", "largest_loss_elsewhere")
    rows = []
    for arm in arms:
        mine = [r for r in results if r["arm"] == arm]
        if not mine:
            continue
        layers = "; ".join(dict.fromkeys(",".join(map(str, r["layers"])) for r in mine))
        cost = (f"{mine[0]['parameters']:,}", f"{mine[0]['layer_forwards']:,}")
        rows.append([arm, layers, *cost, *(mean_and_each([r[key] for r in mine]) for key in measured)])
    return "\n".join(markdown(head, rows))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--arm", action="append", help="default: vfl and the three controls")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    arms = arguments.arm or ["vfl", *CONTROLS]
    comparison = Comparison(arguments)
    bases: dict[int, dict[str, float]] = {}
    for arm in arms:
        for seed in arguments.seeds:
            if any(r["arm"] == arm and r["seed"] == seed for r in comparison.runs):
                continue
            if seed not in bases:
                bases[seed] = measure(arguments, None, seed)
            comparison.add(run_arm(arm, seed, arguments, bases[seed]))
            print(table(comparison.runs, arms), flush=True)


if __name__ == "__main__":
    main()
