"""Hold a phantom (or its twin) against its bars and print the tables as Markdown.

    python scripts/check_phantom.py phantom --output DIR
    python scripts/check_phantom.py phantom-unplanted --output DIR
    python scripts/check_phantom.py phantom --output DIR --recovery 10

Bars, on unseen scenes, 200 questions a function: accuracy at least 98 %; a swap at the planted layer flips
at least 97 % of the answered directions, a swap two or more layers away changes at most 2 %. Exit code 1 if
one is missed. Of the twin (a model whose name ends in "unplanted") nothing is demanded. Also: how well a
linear probe on the frozen tower's tokens separates handwritten digits (the ceiling of what LoRA can reach
there), and what the untouched model makes of handwriting.

With --recovery N: profile the model and the unplanted twin with N probe seeds each, nothing else, and say how
often exactly the planted layer was found as peak and as flip block. Exit code 1 if the phantom missed one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from vfl_train.config import EvalConfig, ProfileConfig
from vfl_train.cpu import keep_freed_memory
from vfl_train.evaluation.run import evaluate
from vfl_train.functions.probes import save_probe_set
from vfl_train.models import VisionLanguageModel
from vfl_train.options import format_layers
from vfl_train.phantom import world
from vfl_train.phantom.architecture import PLANTED
from vfl_train.phantom.datasets import probe_set
from vfl_train.profiling.measure import measure_function
from vfl_train.profiling.run import profile
from vfl_train.profiling.sweep import Sweeper
from vfl_train.schemas import BUILTIN_FUNCTIONS, Profile

ACCURACY, FLIPS, AWAY = 0.98, 0.97, 0.02  # the bars above


def digit_probe(vlm: VisionLanguageModel, scenes: int = 1500) -> tuple[float, float]:
    """Accuracy on unseen specimens of a linear probe that reads one handwritten digit from the tower's
    tokens under it, and its cube: the ceiling for strings of three."""
    features, labels = {}, {}
    for split in ("train", "test"):
        rng = np.random.default_rng([11, len(split)])
        drawn = [world.sample_scene(rng, "digits", split) for _ in range(scenes)]
        features[split], labels[split] = tower_tokens(vlm, drawn)
    head = torch.nn.Linear(features["train"].shape[1], 10)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    mean, std = features["train"].mean(0), features["train"].std(0) + 1e-6
    for _ in range(400):
        scores = head((features["train"] - mean) / std)
        loss = torch.nn.functional.cross_entropy(scores, labels["train"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    guess = head((features["test"] - mean) / std).argmax(-1)
    single = (guess == labels["test"]).float().mean().item()
    return single, single**3


@torch.no_grad()
def tower_tokens(vlm: VisionLanguageModel, scenes: list[world.Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Connector output of the 2 x 3 tokens around each of the three glyphs [3 * scenes, 6 * D], and the
    digits [3 * scenes]."""
    rows, labels = [], []
    side = world.SIZE // world.PATCH
    for scene in scenes:
        inputs = vlm.processor.image_processor([world.render(scene)], return_tensors="pt")
        tower = vlm.base.model.visual
        tokens = tower(
            inputs["pixel_values"].to(vlm.base.dtype), grid_thw=inputs["image_grid_thw"]
        ).pooler_output
        grid = tokens.view(side, side, -1)
        for i, glyph in enumerate(scene.text.glyphs):
            column = min(side - 3, max(0, (4 + 20 * i) // world.PATCH))
            rows.append(grid[side - 2 :, column : column + 3].flatten())
            labels.append(int(glyph))
    return torch.stack(rows).float(), torch.tensor(labels)


def swap_table(found: Profile) -> list[str]:
    """Per function: planted layer, flips there, largest change two or more layers away."""
    lines = [
        "| function | planted | answered | peak | flips at planted | changes 2+ layers away | flip block |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, f in found.functions.items():
        k = PLANTED[name]
        away = _away(f.change_rate, k)
        flips = f.flip_rate[k] if f.flip_rate else float("nan")
        peak = "-" if f.peak_layer is None else f"{f.peak_layer} ({f.change_rate[f.peak_layer]:.1%})"
        block = format_layers(f.flip_block)
        lines.append(
            f"| {name} | {k} | {f.pairs_answered}/{f.pairs} | {peak} | {flips:.1%} | {away:.1%} | {block} |"
        )
    return lines


def missed_bars(found: Profile, accuracy: dict[str, float]) -> list[str]:
    """Which of the bars in this file's docstring a phantom with this profile and these accuracies misses."""
    missed = []
    for name, k in PLANTED.items():
        f = found.functions[name]
        if accuracy[name] < ACCURACY:
            missed.append(f"{name}: accuracy {accuracy[name]:.1%}, at least {ACCURACY:.0%} is wanted")
        flips = f.flip_rate[k] if f.flip_rate else 0.0
        if flips < FLIPS:
            missed.append(f"{name}: layer {k} flips {flips:.1%}, at least {FLIPS:.0%} is wanted")
        away = _away(f.change_rate, k)
        if away > AWAY:
            missed.append(f"{name}: 2+ layers away {away:.1%} change, at most {AWAY:.0%} is wanted")
    return missed


def _away(change_rate: list[float], planted: int) -> float:
    """The largest change rate two or more layers away from the planted one."""
    return max((r for i, r in enumerate(change_rate) if abs(i - planted) >= 2), default=0.0)


Found = dict[str, list[tuple[int | None, list[int]]]]


def recover(model: str, seeds: int, pairs: int) -> Found:
    """{function: [(peak layer, flip block) of every probe seed]}."""
    vlm = VisionLanguageModel.load(model)
    config = ProfileConfig(model=model, output=Path("unused"), control_pairs=4)
    found: Found = {name: [] for name in BUILTIN_FUNCTIONS}
    for seed in range(seeds):
        for name, probes in probe_set(dict.fromkeys(BUILTIN_FUNCTIONS, pairs), seed).pairs.items():
            sweeper = Sweeper(
                vlm, config.phase, config.path, config.batch_tokens, f"{model} seed {seed} {name}"
            )
            f = measure_function(sweeper, probes, config).function
            found[name].append((f.peak_layer, f.flip_block))
    return found


def recovery_table(phantom: Found, twin: Found) -> list[str]:
    """Per function: how often the phantom's planted layer was found, and what the twin's layers are."""
    lines = [
        "| function | planted | found exactly | twin: peaks (seeds) | twin: flip blocks (seeds) |",
        "|---|---|---|---|---|",
    ]
    for name, planted in PLANTED.items():
        exact = sum(each == (planted, [planted]) for each in phantom[name])
        peaks = Counter("-" if peak is None else str(peak) for peak, _ in twin[name])
        blocks = Counter(format_layers(block) for _, block in twin[name])
        said = (", ".join(f"{what} ({n})" for what, n in c.most_common()) for c in (peaks, blocks))
        lines.append(f"| {name} | {planted} | {exact} of {len(phantom[name])} | {' | '.join(said)} |")
    return lines


def check_recovery(model: str, seeds: int, pairs: int, output: Path) -> bool:
    """Print the recovery table and write recovery.json; whether every planted layer was found every time."""
    start = time.perf_counter()
    found, twin = recover(model, seeds, pairs), recover("phantom-unplanted", seeds, pairs)
    print("\n".join(recovery_table(found, twin)))
    print(f"\n{seeds} probe seeds, {pairs} pairs a function, {time.perf_counter() - start:.0f} s")
    output.mkdir(parents=True, exist_ok=True)
    (output / "recovery.json").write_text(json.dumps({model: found, "phantom-unplanted": twin}) + "\n")
    return all(each == (PLANTED[name], [PLANTED[name]]) for name in PLANTED for each in found[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="phantom, phantom-unplanted or a folder that train_phantom.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=100, help="per function; both images are asked about")
    parser.add_argument("--swap-pairs", type=int, default=100, help="pairs a function for the swaps")
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--recovery", type=int, metavar="N", help="only this, with N probe seeds; see above")
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.recovery:
        pairs = min(arguments.swap_pairs, 24)
        if not check_recovery(arguments.model, arguments.recovery, pairs, arguments.output):
            raise SystemExit(1)
        return

    kinds = dict.fromkeys(BUILTIN_FUNCTIONS, arguments.pairs)
    kinds |= {"ocr_handwritten": arguments.pairs, "count_handwritten": arguments.pairs}
    probes = arguments.output / "probes"
    save_probe_set(probe_set(kinds, arguments.seed), probes)
    shared = {"model": arguments.model, "probes": probes, "overwrite": True}
    asked = EvalConfig(output=arguments.output / "eval", pairs=arguments.pairs, max_new_tokens=8, **shared)
    scores = evaluate(asked)
    swapped = ProfileConfig(
        output=arguments.output / "profile", functions=BUILTIN_FUNCTIONS, pairs=arguments.swap_pairs,
        control_pairs=4, **shared,
    )  # fmt: skip
    found = profile(swapped)
    single, strings = digit_probe(VisionLanguageModel.load(arguments.model))
    print("\n".join(swap_table(found)))
    print("\n| function | accuracy | n |\n|---|---|---|")
    for name, s in scores.items():
        print(f"| {name} | {s.accuracy:.1%} | {s.n} |")
    print(f"\nlinear probe on handwritten digits: {single:.1%} single, ceiling for strings {strings:.1%}")
    summary = {
        "accuracy": {n: s.accuracy for n, s in scores.items()},
        "flips_at_planted": {n: f.flip_rate[PLANTED[n]] for n, f in found.functions.items() if f.flip_rate},
        "digit_probe": {"single": single, "strings": strings},
    }
    (arguments.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    missed = (
        [] if arguments.model.rstrip("/").endswith("unplanted") else missed_bars(found, summary["accuracy"])
    )
    if missed:
        print("\nbars missed:", *missed, sep="\n")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
