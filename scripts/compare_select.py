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
from pathlib import Path
from typing import Any

from vfl_train.config import METHODS, LoraConfig, SelectConfig
from vfl_train.cpu import keep_freed_memory
from vfl_train.data_select.run import select
from vfl_train.evaluation.run import Asking, probe_questions, score
from vfl_train.models import VisionLanguageModel
from vfl_train.phantom.datasets import function_of, probe_set, write_pool
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


def accuracy(model: str, adapter: Path | None, function: str, seed: int) -> dict[str, float]:
    """Percent right on held-out scenes, every function and the shifted domain."""
    kinds = dict.fromkeys(BUILTIN_FUNCTIONS, 50) | {f"{function}_handwritten": 100}
    vlm = VisionLanguageModel.load(model, adapter=str(adapter) if adapter else None)
    found = score(vlm, probe_questions(probe_set(kinds, seed + 1)), Asking(max_new_tokens=8))
    return {name: 100 * s.accuracy for name, s in found.items()}


def composition(rows: Path, truth: dict[str, str], function: str) -> dict[str, float]:
    """Percent of the picked rows that are of the function, and of its shifted domain."""
    kinds = [truth[row["id"]] for row in json.loads(rows.read_text(encoding="utf-8"))]
    of = [kind for kind in kinds if function_of(kind) == function]
    return {
        "rows": len(kinds),
        "of_function": 100 * len(of) / len(kinds),
        "shifted": 100 * sum(kind != function for kind in of) / len(kinds),
    }


def run_seed(seed: int, arguments: argparse.Namespace, results: list[dict[str, Any]], save: Any) -> None:
    """All methods on the pool of one seed; each run is saved as soon as it is measured."""
    folder = arguments.output / f"seed{seed}"
    pool = folder / "pool" / "pool.json"
    if not pool.is_file():
        write_pool(pool.parent, arguments.rows, seed)
    truth = read_json(pool.parent / "truth.json")
    done = {(r["method"], r["budget"]) for r in results if r["seed"] == seed}
    base: dict[str, float] = {}
    shifted = f"{arguments.function}_handwritten"
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
            base = base or accuracy(arguments.model, None, arguments.function, seed)
            adapter = train(rows, pool, steps, seed, folder / f"lora-{method}-{budget}", arguments)
            after = accuracy(arguments.model, adapter, arguments.function, seed)
            elsewhere = max(base[f] - after[f] for f in BUILTIN_FUNCTIONS if f != arguments.function)
            results.append(
                {
                    "method": method, "budget": budget, "seed": seed, "steps": steps, **made_of,
                    "accuracy": after, "base": base, "gain": after[shifted] - base[shifted],
                    "printed_loss": base[arguments.function] - after[arguments.function],
                    "largest_loss_elsewhere": max(0.0, elsewhere),
                }
            )  # fmt: skip
            save()


def table(results: list[dict[str, Any]]) -> str:
    """One Markdown row a method and budget; means over seeds, each seed's value behind them."""
    full = {r["seed"]: r["gain"] for r in results if r["method"] == ALL}
    lines = [
        "| rows of | trained for | rows | of the function | gain, points | share of full gain | elsewhere |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in (ALL, *METHODS):
        for budget in ("epochs", "steps"):
            mine = [
                r for r in results if (r["method"], r["budget"]) == (method, budget) and r["seed"] in full
            ]
            if not mine:
                continue
            of_function = statistics.mean(r["of_function"] for r in mine)
            shares = [100 * r["gain"] / full[r["seed"]] for r in mine if full[r["seed"]] > 0]
            lines.append(
                f"| {method} | {budget} ({mine[0]['steps']} steps) | {mine[0]['rows']} "
                f"| {of_function:.0f} % | {_mean([r['gain'] for r in mine])} | {_mean(shares)} "
                f"| {_mean([r['largest_loss_elsewhere'] for r in mine])} |"
            )
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="phantom")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--function", default="ocr", choices=("ocr", "count"))
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--budget", default="0.2")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    keep_freed_memory()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "comparison.json"
    results: list[dict[str, Any]] = read_json(path)["runs"] if path.is_file() else []

    def save() -> None:
        record = {"model": arguments.model, "function": arguments.function, "runs": results}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(table(results), flush=True)

    for seed in map(int, arguments.seeds.split(",")):
        run_seed(seed, arguments, results, save)
    print(table(results))


if __name__ == "__main__":
    main()
