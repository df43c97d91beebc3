"""What `select` makes of pools whose truth is known: buckets, ablation forms, wrong labels.

    python scripts/select_truth.py --output DIR                                  # the phantom, all four forms
    python scripts/select_truth.py --output DIR --model phantom-unplanted --profile twin/profile.json

The pool is drawn from the phantom's world: its six functions, handwriting (the shifted domain), questions
without an image, questions that do not need theirs, wrong labels (the answer of another row of the same
kind) and corrupt rows, shuffled. Each ablation form scores it once. Prints how many image rows and language
rows land in the right bucket, precision and recall a function, what other bucket rules make of the same
scores, and how much rarer wrong labels are among the picked rows than in the pool. Writes truth.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from bench.tables import markdown

from vfl_train.config import ABLATIONS, SelectConfig
from vfl_train.cpu import keep_freed_memory
from vfl_train.data_select import choose
from vfl_train.data_select.run import select
from vfl_train.phantom import world
from vfl_train.phantom.architecture import LAYERS, PLANTED, WIDTH
from vfl_train.phantom.datasets import POOL, function_of, write_pool
from vfl_train.schemas import LANGUAGE, FunctionProfile, ModelInfo, Profile

WRONG, CORRUPT, NEEDLESS = 0.05, 0.02, 0.03  # shares of the rows; needless: language rows with an image
Truth = dict[str, dict[str, Any]]  # of each row id: kind, wrong, corrupt


def write_labelled_pool(folder: Path, rows: int, seed: int) -> tuple[Path, Truth]:
    """A pool as `write_pool` makes it, with wrong labels, corrupt rows and images that nobody needs."""
    path = write_pool(folder, rows, seed, POOL)
    kinds = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    entries, rng = json.loads(path.read_text(encoding="utf-8")), np.random.default_rng([seed, 3])
    answers: dict[str, list[str]] = {}
    for entry in entries:
        answers.setdefault(kinds[entry["id"]], []).append(entry["conversations"][1]["value"])
    truth: Truth = {}
    for entry in entries:
        kind, said, draw = kinds[entry["id"]], entry["conversations"][1], rng.random()
        truth[entry["id"]] = {"kind": kind, "wrong": False, "corrupt": False}
        if kind == LANGUAGE:
            continue
        if draw < WRONG:
            others = [answer for answer in answers[kind] if answer != said["value"]]
            said["value"] = others[int(rng.integers(len(others)))]
            truth[entry["id"]]["wrong"] = True
        elif draw < WRONG + CORRUPT:
            (folder / entry["image"]).write_bytes(b"\x89PNG\r\n\x1a\n cut")
            truth[entry["id"]]["corrupt"] = True
        elif draw < WRONG + CORRUPT + NEEDLESS:
            question, said["value"] = world.LANGUAGE[int(rng.integers(len(world.LANGUAGE)))]
            entry["conversations"][0]["value"] = f"<image>\n{question}"
            truth[entry["id"]]["kind"] = "needless"
    path.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")
    return path, truth


def write_profile(path: Path) -> Path:
    """The profile of the bundled phantom: the layers where its training planted each function."""
    functions = {
        name: FunctionProfile("ok", 50, 50, [], [], [], {}, k, [k], [k], False) for name, k in PLANTED.items()
    }
    info = ModelInfo("phantom", None, "qwen2_5_vl", LAYERS, WIDTH)
    profile = Profile(info, "swap", "text", "engine", "float32", 0, {}, {}, functions)
    path.write_text(json.dumps(profile.to_json()), encoding="utf-8")
    return path


# --- measures ------------------------------------------------------------------------------------


def columns_of(scores: Path, pool: Path, truth: Truth) -> dict[str, np.ndarray]:
    """scores.parquet with the truth beside it: `kind` (with its domain), `function`, `wrong`."""
    table = pq.read_table(scores)
    ids = [entry["id"] for entry in json.loads(pool.read_text(encoding="utf-8"))]
    said = [truth[ids[row]] for row in table["row"].to_pylist()]
    found = {name: table[name].to_numpy() for name in table.column_names if name != "flags"}
    kinds = np.array([s["kind"] for s in said])
    functions = [LANGUAGE if k == "needless" else function_of(k) for k in kinds]
    doubted = np.array(["suspicious_label" in flags for flags in table["flags"].to_pylist()])
    return found | {
        "kind": kinds, "function": np.array(functions), "wrong": np.array([s["wrong"] for s in said]),
        "doubted": doubted,
    }  # fmt: skip


def accuracy(columns: Mapping[str, np.ndarray], bucket: np.ndarray) -> dict[str, Any]:
    """Shares of rows in the right bucket, rows with wrong labels apart; precision and recall a function."""
    right, told, kind = bucket == columns["function"], ~columns["wrong"], columns["kind"]
    share = lambda which: float(right[which].mean()) if which.any() else None  # noqa: E731
    visual = told & ~np.isin(kind, [LANGUAGE, "needless"])
    return {
        "image_rows": share(visual),
        "language_rows": share(kind == LANGUAGE),
        "language_rows_with_image": share(kind == "needless"),
        "shifted_rows": share(visual & np.char.endswith(kind, "_handwritten")),
        "functions": {
            f: {"recall": share(told & (columns["function"] == f)), "precision": share(told & (bucket == f))}
            for f in np.unique(columns["function"]).tolist()
        },
    }


def plain_rule(columns: Mapping[str, np.ndarray], functions: list[str]) -> np.ndarray:
    """Buckets of the same scores by --bucket-rule need."""
    deltas = {f: columns[f"delta_{f}"] for f in functions}
    return choose.buckets(choose.needs({f: columns[f"loss_{f}"] for f in functions}, deltas), deltas)


def other_rules(columns: Mapping[str, np.ndarray], functions: list[str]) -> dict[str, np.ndarray]:
    """Buckets of the same scores by rules that were not taken."""
    delta = np.stack([columns[f"delta_{f}"] for f in functions], axis=1)
    size = np.abs(delta)
    scale = [np.quantile(c[c > 0], 0.95) if (c > 0).any() else 1.0 for c in size.T]
    ranks = np.argsort(np.argsort(delta, axis=0), axis=0)

    def buckets(of: np.ndarray) -> np.ndarray:
        best = of.argmax(axis=1)
        felt = size[np.arange(len(best)), best] >= choose.MIN_CHANGE
        return np.where(felt, np.array(functions)[best], LANGUAGE)

    return {
        "loss, in units of its 95th percentile": buckets(size / np.maximum(scale, 1e-3)),
        "loss, percentile rank": buckets(ranks),
        "loss, percentile rank of its size": buckets(np.argsort(np.argsort(size, axis=0), axis=0)),
    }


def wrong_labels(columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How much rarer wrong labels are among the picked rows (share in the pool over share in the pick; with
    none picked, as if half a row were), and what the flag finds and hits wrongly."""
    wrong, picked = columns["wrong"], columns["selected"].astype(bool)
    shifted = np.char.endswith(columns["kind"], "_handwritten")
    share = max(wrong[picked].sum(), 0.5) / picked.sum()
    return {
        "share_in_pool": float(wrong.mean()),
        "share_in_picked": float(wrong[picked].mean()),
        "rarer_by": float(wrong.mean() / share),
        "flagged_of_wrong": float(columns["doubted"][wrong].mean()),
        "flagged_of_right_printed": float(columns["doubted"][~wrong & ~shifted].mean()),
        "flagged_of_right_shifted": float(columns["doubted"][~wrong & shifted].mean()),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Score the pool under every form; returns what truth.json holds."""
    folder = args.output / f"pool-{args.seed}"
    pool, truth = write_labelled_pool(folder, args.rows, args.seed)
    profile = args.profile or write_profile(args.output / "profile.json")
    report: dict[str, Any] = {"rows": args.rows, "seed": args.seed, "model": args.model, "forms": {}}
    for form in args.ablations:
        config = SelectConfig(
            model=args.model, profile=str(profile), data=str(pool), budget="0.2", ablation=form, device="cpu",
            output=args.output / f"select-{form}-{args.seed}", overwrite=True,
        )  # fmt: skip
        record = select(config)
        columns = columns_of(config.output / "scores.parquet", pool, truth)
        rules = {"ours": columns["bucket"]}
        if record["bucket_rule"] != "need":
            rules["need"] = plain_rule(columns, list(record["layers"]))
        rules |= other_rules(columns, list(record["layers"]))
        report["forms"][form] = {
            "bucket_rule": record["bucket_rule"],
            "quarantined": record["rows_quarantined"],
            "corrupt": sum(t["corrupt"] for t in truth.values()),
            "rules": {name: accuracy(columns, bucket) for name, bucket in rules.items()},
            "wrong_labels": wrong_labels(columns),
        }
    return report


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row a form and rule."""
    head = ("form", "rule", "image rows", "of them shifted", "language", "with image", "worst recall",
            "worst precision")  # fmt: skip
    percent = lambda x: "-" if x is None else f"{100 * x:.1f} %"  # noqa: E731
    rows = []
    for form, found in report["forms"].items():
        for rule, a in found["rules"].items():
            each = [f for name, f in a["functions"].items() if name != LANGUAGE]
            worst = [min(f[key] or 0.0 for f in each) for key in ("recall", "precision")]
            numbers = (a["image_rows"], a["shifted_rows"], a["language_rows"],
                       a["language_rows_with_image"], *worst)  # fmt: skip
            rows.append([form, rule, *map(percent, numbers)])
    lines = markdown(head, rows)
    for form, found in report["forms"].items():
        w = found["wrong_labels"]
        lines.append(
            f"{form}: wrong labels {percent(w['share_in_pool'])} of the pool, "
            f"{percent(w['share_in_picked'])} of the picked (rarer by {w['rarer_by']:.1f}); flagged "
            f"{percent(w['flagged_of_wrong'])} of them, {percent(w['flagged_of_right_printed'])} of the "
            f"right printed and {percent(w['flagged_of_right_shifted'])} of the right shifted rows"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="phantom")
    parser.add_argument("--profile", type=Path, help="default: the layers planted in the phantom")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablations", default=",".join(ABLATIONS), type=lambda text: text.split(","))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    report = measure(args)
    (args.output / "truth.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
