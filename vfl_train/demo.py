"""`vfl-train demo`: the whole job on the bundled phantom, offline, on a CPU, through the same code as the
single commands.

The phantom has never seen handwriting. The demo finds its function layers, picks from a mixed and
unlabelled pool the fifth that trains ocr, trains LoRA on the ocr layers, and shows what was gained on
handwritten text and what was forgotten elsewhere. Everything in its table is measured in the run.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vfl_train.config import EvalConfig, LoraConfig, MergeConfig, ProfileConfig, SelectConfig
from vfl_train.errors import ConfigError
from vfl_train.pipeline import Outcome, Steps, run_recipe, run_steps, selected_data
from vfl_train.runs import MARKER, RunFolder
from vfl_train.schemas import BUILTIN_FUNCTIONS, read_json

if TYPE_CHECKING:
    from vfl_train.config import DemoConfig

__all__ = ["demo", "run_recipe"]

POOL_ROWS = 2000
PROBE_PAIRS = 24
BATCH_TOKENS = 3072  # fits the caches of a small CPU: twice as fast as 8192 there
SHIFTED = ("ocr_handwritten", "count_handwritten")
DISCLAIMER = (
    "The phantom is a calibration instrument: a 3 M-parameter Qwen2.5-VL trained from scratch with its "
    "function layers planted, so that what a tool finds can be compared with what is known. It is no "
    "evidence about real models."
)


def demo(config: DemoConfig) -> Outcome:
    """Make the world, run the steps, print the table and write report.html. A few minutes on two cores.
    Raises ConfigError for a folder that holds anything else."""
    folder = Path(config.output)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "world" / MARKER).is_file():
        raise ConfigError(
            f"{folder} is not empty and vfl-train demo did not write it", "give another folder to --output"
        )
    start = time.perf_counter()
    world = make_world(folder / "world", config.seed, config.overwrite)
    steps = demo_steps(folder, world, config.seed, config.overwrite)
    made = time.perf_counter() - start
    outcome = run_steps(steps)
    outcome.seconds = _times(folder, {"world": made, **outcome.seconds}, outcome.skipped)
    facts = headline(outcome, read_json(world / "truth.json"))
    (folder / "report.html").write_text(report(outcome, facts), encoding="utf-8")
    show(outcome, facts)
    print(f"report: {folder / 'report.html'}")
    return outcome


def _times(folder: Path, now: dict[str, float], skipped: set[str]) -> dict[str, float]:
    """Seconds of each step when it ran, kept in times.json: a step that was done before keeps its own."""
    path = folder / "times.json"
    before = read_json(path) if path.is_file() and skipped else {}
    times = {name: before.get(name, s) if name in skipped else round(s, 1) for name, s in now.items()}
    path.write_text(json.dumps(times) + "\n", encoding="utf-8")
    return times


def make_world(folder: Path, seed: int, overwrite: bool = False) -> Path:
    """The pool and the probe set for measuring, as files a user would bring. Returns the folder."""
    from vfl_train.functions.probes import save_probe_set
    from vfl_train.phantom.datasets import probe_set, write_pool

    with RunFolder.open(folder, {"command": "demo world", "seed": seed, "rows": POOL_ROWS}, overwrite) as run:
        if not run.already_done:
            write_pool(folder, POOL_ROWS, seed)
            kinds = dict.fromkeys(BUILTIN_FUNCTIONS, 50) | {SHIFTED[0]: 100, SHIFTED[1]: 50}
            save_probe_set(probe_set(kinds, seed + 1), folder / "probes")
    return folder


def demo_steps(folder: Path, world: Path, seed: int, overwrite: bool) -> Steps:
    """The settings of the demo. Anyone can type them as single commands."""
    shared: dict[str, Any] = {"seed": seed, "overwrite": overwrite}
    profile, lora = folder / "profile", folder / "lora"
    select = SelectConfig(
        profile=str(profile / "profile.json"), data=str(world / "pool.json"), functions=("ocr",),
        budget="0.2", output=folder / "select", batch_tokens=BATCH_TOKENS, **shared,
    )  # fmt: skip
    return Steps(
        ProfileConfig(
            pairs=PROBE_PAIRS, control_pairs=4, batch_tokens=BATCH_TOKENS, output=profile, **shared
        ),
        select,
        LoraConfig(
            profile=str(profile / "profile.json"), functions=("ocr",), data=str(selected_data(select)[0]),
            image_root=world, output=lora, learning_rate=1e-3, max_steps=300, per_device_train_batch_size=16,
            gradient_accumulation_steps=1, **shared,
        ),
        EvalConfig(
            adapter=str(lora), probes=world / "probes", pairs=100, max_new_tokens=8,
            output=folder / "eval", **shared,
        ),
        MergeConfig(adapters=(str(lora),), output=folder / "merged", overwrite=overwrite),
    )  # fmt: skip


def headline(outcome: Outcome, truth: dict[str, str]) -> dict[str, Any]:
    """The demo's figures: planted and found layers, shares of ocr rows (from the world's truth, which the
    steps never read), gain and largest loss in points."""
    from vfl_train.phantom.architecture import PLANTED

    found = {name: f.flip_block for name, f in outcome.profile.functions.items()}
    rows = json.loads(selected_data(outcome.steps.select)[0].read_text(encoding="utf-8"))
    picked, pool = Counter(truth[row["id"]] for row in rows), Counter(truth.values())
    ocr = ("ocr", "ocr_handwritten")
    scores = outcome.scorecard["functions"]
    losses = {name: scores[name]["delta"] for name in BUILTIN_FUNCTIONS if name != "ocr"}
    worst = min(losses, key=lambda name: losses[name])
    return {
        "planted": PLANTED, "found": found,
        "recovered": sum(found.get(f) == [k] for f, k in PLANTED.items()),
        "ocr_in_pool": sum(pool[k] for k in ocr) / pool.total(),
        "ocr_in_picked": sum(picked[k] for k in ocr) / max(1, picked.total()),
        "picked": picked.total(), "pool": pool.total(),
        "before": scores[SHIFTED[0]]["base_accuracy"], "after": scores[SHIFTED[0]]["accuracy"],
        "worst": worst, "worst_delta": losses[worst], "printed_ocr": scores["ocr"]["delta"],
    }  # fmt: skip


def show(outcome: Outcome, facts: dict[str, Any]) -> None:
    """Print the demo's table."""
    table = Table(
        "what", "measured", title="vfl-train demo: the phantom, a calibration model with planted layers"
    )
    for name, layer in facts["planted"].items():
        table.add_row(f"{name}: planted layer, found block", f"{layer}, {facts['found'].get(name) or '-'}")
    table.add_row("ocr rows in the pool", f"{facts['ocr_in_pool']:.1%} of {facts['pool']}")
    table.add_row("ocr rows among the picked", f"{facts['ocr_in_picked']:.1%} of {facts['picked']}")
    table.add_row("handwritten text before -> after", f"{facts['before']:.1%} -> {facts['after']:.1%}")
    table.add_row("printed text, change", f"{facts['printed_ocr']:+.1f} points")
    table.add_row(
        "largest loss on another function", f"{facts['worst_delta']:+.1f} points ({facts['worst']})"
    )
    table.add_row("merged model verified", "yes" if outcome.verification["passed"] else "no")
    for name, seconds in outcome.seconds.items():
        table.add_row(f"seconds: {name}", f"{seconds:.1f}")
    table.add_row("seconds: all", f"{sum(outcome.seconds.values()):.1f}")
    Console().print(table)


def report(outcome: Outcome, facts: dict[str, Any]) -> str:
    """The one page of the demo."""
    from vfl_train.data_select.run import bucket_rows
    from vfl_train.report.heatmap import heatmap_bytes
    from vfl_train.report.pages import control_rows, data_uri, function_rows, page

    profile, selection = outcome.profile, outcome.selection
    picked, rejected = _thumbnails(outcome)
    boxes = [
        (f"{facts['recovered']} of {len(facts['planted'])}", "planted layers found exactly"),
        (
            f"{facts['ocr_in_picked']:.0%}",
            f"ocr rows among the picked ({facts['ocr_in_pool']:.0%} in the pool)",
        ),
        (f"{facts['before']:.0%} -> {facts['after']:.0%}", "handwritten text read"),
        (f"{facts['worst_delta']:+.1f}", f"points, largest loss elsewhere ({facts['worst']})"),
        (f"{sum(outcome.seconds.values()):.0f} s", "in all"),
    ]
    times = [(name, f"{s:.1f}") for name, s in outcome.seconds.items()]
    return page(
        "demo.html", "vfl-train demo",
        "Profile, select, LoRA, eval, merge and verify on the bundled phantom.",
        facts=boxes, heatmap=data_uri(heatmap_bytes(profile, facts["planted"])),
        functions=function_rows(profile), controls=control_rows(profile),
        buckets=bucket_rows(selection), picked=picked, rejected=rejected, scores=_score_rows(outcome),
        checks=outcome.verification["checks"], times=times, disclaimer=DISCLAIMER,
    )  # fmt: skip


def _score_rows(outcome: Outcome) -> list[dict[str, str]]:
    rows = []
    for name, s in outcome.scorecard["functions"].items():
        tone = "good" if s["delta"] >= 1 else "bad" if s["delta"] <= -1 else ""
        rows.append(
            {"name": name.replace("_", ", "), "n": str(s["n"]), "before": f"{s['base_accuracy']:.1%}",
             "after": f"{s['accuracy']:.1%}", "delta": f"{s['delta']:+.1f}", "tone": tone,
             "interval": f"{s['ci95'][0]:.0%} - {s['ci95'][1]:.0%}"}
        )  # fmt: skip
    return rows


def _thumbnails(outcome: Outcome) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Picked (best first) and left-out rows, from scores.parquet and the pool."""
    import pyarrow.parquet as pq

    from vfl_train.data.readers import read_dataset
    from vfl_train.data_select.run import first_image, first_turn
    from vfl_train.report.pages import tiles

    select = outcome.steps.select
    table = pq.read_table(Path(select.output) / "scores.parquet").to_pylist()
    rows = {r.row: r for r in read_dataset(select.data, select.image_root, check_images=False).rows}
    chosen = sorted((t for t in table if t["selected"]), key=lambda t: -t["score"])[:12]
    out = [t for t in table if not t["selected"]]

    def show_row(t: dict[str, Any]) -> tuple[Any, str, str, str]:
        row = rows[t["row"]]
        return first_image(row), *first_turn(row), t["bucket"]

    return tiles([show_row(t) for t in chosen]), tiles(
        [show_row(t) for t in out[:: max(1, len(out) // 12)][:12]]
    )
