"""What a fifth of the data is worth: LoRA on the rows that each method picks, against LoRA on all rows.

    python scripts/compare_select.py --profile profile/profile.json --output DIR
    python scripts/compare_select.py --model phantom-unplanted --profile twin/profile.json --output DIR

The pool mixes the phantom's six functions, language-only rows and a shifted domain (handwriting), unlabelled.
Each method picks --budget of it for --function; the same LoRA (that function's layers) is then trained on
each pick and on everything, as many passes over its rows (`epochs`) and, for ours and random, also as many
steps as on everything (`steps`). The gain is on held-out handwriting; its share of the full data's gain is
what the paper reports.
Runs that stand in --output are not repeated. Prints a Markdown table and writes comparison.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

from bench.comparing import Comparison, accuracy, parser_of
from bench.tables import markdown, mean_and_each

from vfl_train.config import METHODS, LoraConfig, SelectConfig
from vfl_train.data_select.run import select
from vfl_train.phantom.datasets import function_of, write_pool
from vfl_train.schemas import BUILTIN_FUNCTIONS, read_json
from vfl_train.training.run import train_lora

BATCH = 16
ALL = "everything"


def pick(method: str, seed: int, pool: Path, folder: Path, arguments: argparse.Namespace) -> Path:
    """The file of rows that `method` picks; rows are scored once a seed."""
    scores = folder / "select-vfl"
    config = SelectConfig(
        model=arguments.model, profile=str(arguments.profile), data=str(pool), budget=str(arguments.budget),
        functions=(arguments.function,), method=method, fill=True, seed=seed, device="cpu",
        from_scores=None if method == "vfl" else scores, output=folder / f"select-{method}",
        batch_tokens=3072, overwrite=True,
    )  # fmt: skip
    select(config)
    return folder / f"select-{method}" / "selected.json"


def train(rows: Path, pool: Path, steps: int, seed: int, output: Path, arguments: argparse.Namespace) -> Path:
    """The same LoRA on `rows`, for `steps` steps."""
    return train_lora(
        LoraConfig(
            model=arguments.model, profile=str(arguments.profile), functions=(arguments.function,),
            data=str(rows), image_root=pool.parent, per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1, max_steps=steps, learning_rate=arguments.learning_rate, seed=seed,
            device="cpu", output=output, overwrite=True,
        )
    )  # fmt: skip


def composition(rows: Path, truth: dict[str, str], function: str) -> dict[str, float]:
    """Percent of the picked rows that are of the function, and of its shifted domain."""
    kinds = [truth[row["id"]] for row in json.loads(rows.read_text(encoding="utf-8"))]
    of = [kind for kind in kinds if function_of(kind) == function]
    return {
        "rows": len(kinds),
        "of_function": 100 * len(of) / len(kinds),
        "shifted": 100 * sum(kind != function for kind in of) / len(kinds),
    }


def run_seed(seed: int, arguments: argparse.Namespace, comparison: Comparison) -> None:
    """All methods on the pool of one seed; each run is saved as soon as it is measured."""
    folder = arguments.output / f"seed{seed}"
    pool = folder / "pool" / "pool.json"
    if not pool.is_file():
        write_pool(pool.parent, arguments.rows, seed)
    truth = read_json(pool.parent / "truth.json")
    done = {(r["method"], r["budget"]) for r in comparison.runs if r["seed"] == seed}
    base: dict[str, float] = {}
    shifted = f"{arguments.function}_handwritten"
    asked = dict.fromkeys(BUILTIN_FUNCTIONS, 50) | {shifted: 100}
    full_steps = round(arguments.epochs * arguments.rows / BATCH)
    for method in (ALL, *METHODS):
        rows = pool if method == ALL else pick(method, seed, pool, folder, arguments)
        made_of = composition(rows, truth, arguments.function)
        kinds = {"steps": full_steps} if method in (ALL, "vfl", "random") else {}
        if method != ALL:
            kinds["epochs"] = round(arguments.epochs * made_of["rows"] / BATCH)
        for budget, steps in kinds.items():
            if (method, budget) in done:
                continue
            base = base or accuracy(arguments.model, None, asked, seed)
            adapter = train(rows, pool, steps, seed, folder / f"lora-{method}-{budget}", arguments)
            after = accuracy(arguments.model, adapter, asked, seed)
            elsewhere = max(base[f] - after[f] for f in BUILTIN_FUNCTIONS if f != arguments.function)
            comparison.add(
                {
                    "method": method, "budget": budget, "seed": seed, "steps": steps, **made_of,
                    "accuracy": after, "base": base, "gain": after[shifted] - base[shifted],
                    "printed_loss": base[arguments.function] - after[arguments.function],
                    "largest_loss_elsewhere": max(0.0, elsewhere),
                }
            )  # fmt: skip
            print(table(comparison.runs), flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """One Markdown row a method and budget; means over seeds, each seed's value behind them."""
    full = {r["seed"]: r["gain"] for r in results if r["method"] == ALL}
    head = ("rows of", "trained for", "rows", "of the function", "gain, points", "share of full gain",
            "elsewhere")  # fmt: skip
    rows = []
    for method, budget in product((ALL, *METHODS), ("epochs", "steps")):
        mine = [r for r in results if (r["method"], r["budget"]) == (method, budget) and r["seed"] in full]
        if not mine:
            continue
        of_function = statistics.mean(r["of_function"] for r in mine)
        shares = [100 * r["gain"] / full[r["seed"]] for r in mine if full[r["seed"]] > 0]
        elsewhere = [r["largest_loss_elsewhere"] for r in mine]
        rows.append([
            method, f"{budget} ({mine[0]['steps']} steps)", str(mine[0]["rows"]), f"{of_function:.0f} %",
            mean_and_each([r["gain"] for r in mine]), mean_and_each(shares), mean_and_each(elsewhere),
        ])  # fmt: skip
    return "\n".join(markdown(head, rows))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--budget", default="0.2")
    parser.add_argument("--epochs", type=float, default=3.0)
    arguments = parser.parse_args()
    comparison = Comparison(arguments)
    for seed in arguments.seeds:
        run_seed(seed, arguments, comparison)
    print(table(comparison.runs))


if __name__ == "__main__":
    main()
