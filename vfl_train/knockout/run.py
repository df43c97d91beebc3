"""`vfl-train knockout`: measure on the shots, choose, prove on the rest, write knockout.json and its plot."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vfl_train.errors import DataError
from vfl_train.evaluation.questions import Question, file_questions
from vfl_train.interventions import Branch, knockout
from vfl_train.knockout.choice import Choice, choose, draw_shots, paired_gain
from vfl_train.knockout.cluster import average_linkage, leaf_order, pearson
from vfl_train.knockout.measure import Meter, Vectors, forced, together
from vfl_train.knockout.plot import plot_bytes
from vfl_train.knockout.record import SCHEMA_VERSION
from vfl_train.models import VisionLanguageModel
from vfl_train.models.digest import model_digest
from vfl_train.profiling.cost import record as cost_record
from vfl_train.profiling.cost import reference_line
from vfl_train.runs import RunFolder, fingerprint
from vfl_train.schemas import read_json

if TYPE_CHECKING:
    from vfl_train.config import KnockoutConfig

MIN_HELD_OUT = 10  # samples a task, beyond the shots
PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Task:
    """The samples of one task: where its shots stand among all questions, and what is held out."""

    name: str
    shots: list[int]
    held_out: list[int]


def run_knockout(config: KnockoutConfig) -> dict[str, Any]:
    """Find the interfering layer of each task in --data and write knockout.json and knockout.png.

    Returns:
        The content of knockout.json; {} for a dry run.

    Raises:
        DataError: no row to score, too few of a task, or one answer only.
        ConfigError: as loading does; NumericError: losses that are not finite.
    """
    asked = file_questions(config.data, config)
    questions = asked.questions
    tasks = split(questions, config.shots, config.seed, config.data)
    vlm = VisionLanguageModel.load(
        config.model, config.revision, config.dtype, config.device, config.load_in_4bit, config.max_pixels,
        load_in_8bit=config.load_in_8bit,
    )  # fmt: skip
    if config.dry_run:
        print("\n".join(estimate(vlm, questions, tasks, config)))
        return {}
    inputs = {"data": asked.sha256, "model": model_digest(vlm)}
    wanted = fingerprint("knockout", config, inputs, PACKAGES)
    with RunFolder.open(config.output, wanted, config.overwrite) as run:
        if run.already_done:
            print(f"already done: {run.folder}")
            found = dict(read_json(run.folder / "knockout.json"))
        else:
            print("\n".join(estimate(vlm, questions, tasks, config)))
            found = measure_tasks(vlm, questions, tasks, config)
            found["data"] = {"name": Path(config.data).name, "sha256": asked.sha256}
            run.write_json("knockout.json", found)
            run.write_bytes("knockout.png", plot_bytes(found))
    show(found)
    return found


def split(questions: list[Question], shots: int, seed: int, where: str) -> list[Task]:
    """Shots and held-out samples of each task (`source` of the rows), by `seed` and the
    task's name: other tasks of the file change nothing. Raises DataError."""
    tasks = []
    for name in dict.fromkeys(q.function for q in questions):
        mine = [i for i, q in enumerate(questions) if q.function == name]
        if len(mine) < shots + MIN_HELD_OUT:
            raise DataError(
                f"{where}: the task {name!r} has {len(mine)} rows, {shots} shots and {MIN_HELD_OUT} held out "
                f"need {shots + MIN_HELD_OUT}",
                "give more rows or fewer --shots",
            )
        try:
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
            rng = np.random.default_rng([seed, number])
            drawn = draw_shots([questions[i].answer for i in mine], shots, rng, questions[mine[0]].match)
        except DataError as e:
            raise DataError(f"{where}: the task {name!r}: {e.message}", e.fix) from None
        chosen = {mine[i] for i in drawn}
        tasks.append(Task(name, sorted(chosen), [i for i in mine if i not in chosen]))
    return tasks


def measure_tasks(
    vlm: VisionLanguageModel, questions: list[Question], tasks: list[Task], config: KnockoutConfig
) -> dict[str, Any]:
    """The content of knockout.json, but for `data`."""
    start = time.perf_counter()
    meter = Meter(vlm, config.max_new_tokens, config.path, config.batch_tokens)
    every: list[Branch] = [knockout([k], config.module) for k in range(vlm.num_layers)]
    all_shots = [i for task in tasks for i in task.shots]
    on_shots = dict(
        zip(
            all_shots, meter.measure([questions[i] for i in all_shots], [every] * len(all_shots)), strict=True
        )
    )
    groups = [(task.name, task.shots, task.held_out) for task in tasks]
    whole = ("all rows", all_shots, [i for task in tasks for i in task.held_out])
    choices = {name: _choose(questions, shots, on_shots, config.seed) for name, shots, _ in [*groups, whole]}
    # The candidates of a held-out sample: its task's and that of all rows.
    pooled = choices[whole[0]].candidate
    wanted = {i: sorted({choices[name].candidate, pooled}) for name, _, held in groups for i in held}
    branches = [[every[k] for k in layers] for layers in wanted.values()]
    held_out = dict(zip(wanted, meter.measure([questions[i] for i in wanted], branches), strict=True))

    def record(name: str, shots: list[int], held: list[int]) -> dict[str, Any]:
        at = choices[name].candidate
        right = [(held_out[i].right[0, 0], held_out[i].right[0, 1 + wanted[i].index(at)]) for i in held]
        rows = [row for i in shots if (row := questions[i].row) is not None]
        return task_record(choices[name], rows, [bool(b) for b, _ in right], [bool(a) for _, a in right])

    records = {name: record(name, shots, held) for name, shots, held in groups}
    found = {
        "schema_version": SCHEMA_VERSION,
        "model": vars(vlm.info),
        "module": config.module,
        **record(*whole),
        "tasks": records,
    }
    if len(tasks) > 1:
        found["similarity"] = similarity(records)
    found["cost"] = cost_record(meter.cost, meter.forward, time.perf_counter() - start)
    found |= {"path": config.path, "dtype": vlm.dtype, "seed": config.seed}
    found["versions"] = {name: version(name) for name in ("vfl-train", *PACKAGES)}
    return found


def _choose(questions: list[Question], shots: list[int], on_shots: dict[int, Vectors], seed: int) -> Choice:
    vectors = together([on_shots[i] for i in shots])
    answers = [questions[i].answer for i in shots]
    rng, mine = np.random.default_rng([seed, 1_000_000]), [questions[i] for i in shots]
    tasks = [q.function for q in mine]
    return choose(vectors.right, vectors.logprob, answers, rng, mine[0].match, tasks)


def task_record(
    choice: Choice, shot_rows: list[int], before: list[bool], after: list[bool]
) -> dict[str, Any]:
    """What knockout.json says of one task. `shot_rows`: the rows of the data chosen on. `before`, `after`:
    the held-out samples untouched and without the candidate. `held_out_gain`, `ci95` and `confirmed` (it is
    above zero, interval and all) are of the layer to knock out, None where that is none; `candidate` has the
    former two anyway."""
    gain, interval = paired_gain(before, after)
    chosen = choice.layer is not None
    return {
        "interaction": choice.interaction,
        "margin": choice.margin,
        "layer": choice.layer,
        "held_out_gain": gain if chosen else None,
        "ci95": interval if chosen else None,
        "confirmed": interval[0] > 0 if chosen else None,
        "shots": len(shot_rows),
        "shot_rows": shot_rows,
        "reason": choice.reason,
        "accuracy": choice.accuracy,
        "p_value": choice.p_value,
        "candidate": {"layer": choice.candidate, "held_out_gain": gain, "ci95": interval},
        "held_out": {
            "n": len(before), "accuracy": sum(before) / len(before), "without": sum(after) / len(after)
        },
    }  # fmt: skip


def similarity(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How alike the tasks are. The tree is of the margins: accuracies on a few shots are coarse, and often
    alike in all layers, which leaves no correlation."""
    by = {key: pearson([r[key] for r in records.values()]) for key in ("interaction", "margin")}
    merges = average_linkage(by["margin"])
    return {
        "tasks": list(records), **by, "merges": merges, "order": leaf_order(merges, len(records)),
    }  # fmt: skip


def estimate(
    vlm: VisionLanguageModel, questions: list[Question], tasks: list[Task], config: KnockoutConfig
) -> list[str]:
    """How much there is to do, in words; a task's shots taken to be as long as its first."""
    shots, held = sum(len(t.shots) for t in tasks), sum(len(t.held_out) for t in tasks)
    depth, on_shots = vlm.num_layers, 0.0
    for task in tasks:
        prompt, answer = forced(vlm, questions[task.shots[0]])
        fits = config.batch_tokens // (prompt.length + len(answer)) if config.path == "engine" else 1
        on_shots += len(task.shots) * sweep_forwards(depth, fits)
    counts = ", ".join(f"{t.name} {len(t.shots) + len(t.held_out)}" for t in tasks)
    return [
        f"{len(tasks)} tasks, {shots} shots, {held} held out: {counts}",
        f"{depth + 1} branches of a shot take {on_shots / shots:.1f} plain forwards, a held-out sample 2 or "
        f"3: about {on_shots + 2 * held:.0f} in all, and what it takes to generate wrong answers",
    ]


def sweep_forwards(depth: int, fits: int) -> float:
    """Plain forwards that the base and a knockout of each layer take, `fits` sequences at a time: a pass runs
    the base up to where its last branch leaves it (the first pass to the end, for it is read)."""
    layers, each = 0, max(1, fits - 1)
    for first in range(0, depth, each):
        branches = range(first, min(first + each, depth))
        layers += (depth if first == 0 else branches[-1]) + sum(depth - k for k in branches)
    return layers / depth


def show(found: dict[str, Any]) -> None:
    """Print what was found."""
    several = len(found["tasks"]) > 1
    table = Table("task", "shots", "out", "best layer: nats/token, p", "held out, %", "gain, points (95 %)")
    for name, task in {**found["tasks"], **({"all rows": found} if several else {})}.items():
        best, held = task["candidate"], task["held_out"]
        low, high = best["ci95"]
        table.add_row(
            escape(name), str(task["shots"]), "none" if task["layer"] is None else str(task["layer"]),
            f"{best['layer']}: {task['margin'][best['layer']]:+.2f}, {task['p_value']:.3f}",
            f"{100 * held['accuracy']:.0f} -> {100 * held['without']:.0f} of {held['n']}",
            f"{best['held_out_gain']:+.1f} ({low:+.0f} to {high:+.0f})",
        )  # fmt: skip
    Console().print(table)
    for name, task in found["tasks"].items():
        if task["reason"]:
            print(f"{name}: nothing is knocked out: {task['reason']}")
        elif not task["confirmed"]:
            low, high = task["ci95"]
            print(
                f"warning: {name}: layer {task['layer']} is not confirmed on the rows held out: "
                f"{task['held_out_gain']:+.1f} points ({low:+.0f} to {high:+.0f})"
            )
    if several and found["layer"] is not None and not found["confirmed"]:
        print(f"warning: all rows: layer {found['layer']} is not confirmed on the rows held out")
    cost = found["cost"]
    print(f"cost: {cost['plain_forwards']:.1f} plain forwards of a sample, {cost['seconds']:.0f} s")
    if line := reference_line(cost):
        print(line)
