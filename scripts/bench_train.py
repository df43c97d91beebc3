"""A training step of VFL-LoRA against what users run today, on one model, one batch, in one process.

    python scripts/bench_train.py --check --output bench.json              # the CPU bars: two idle cores
    python scripts/bench_train.py --shape 7b --check --output bench.json   # one GPU of 141 GB, bfloat16

The sides; LoRA of rank 16 on all seven linears of a decoder layer, frozen weights shared:

trl       TRL's SFTTrainer with its defaults, LoRA on all layers of the language model. Its default is
          activation checkpointing, which takes backward through every layer and the vision tower.
all       the same with checkpointing switched off: what a user with memory to spare runs
ours      `vfl-train lora` on the adapted layers
ours_recomputed   the same with --activation-checkpointing
cached    the same as ours with --cache-prefix, as from the second epoch on

Each runs its trainer's own loop for two steps a round, the second of which is timed from the trainer's
on_step_begin to its on_step_end: forward, backward, clipping, optimizer, and ours its checks. Loading rows
is in nobody's time (the batch is made once). Before anything is timed all sides must agree on the loss of
the first step, where LoRA changes nothing yet, and cached must stay with ours.

The bars (reference: trainer bars T1 to T4):
    all / ours     T1   what layer selection saves a user who has the memory
    trl / ours     T2   what it saves the user of the defaults
    all / cached   T3   what an epoch costs once the prefix is cached
    bytes saved for backward, ours / all   T4
Beside each ratio stands the unit model's: forwards of one decoder layer, LoRA's own cost left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from bench.measuring import Runs, hardware, peak_bytes
from bench.models import twin
from bench.training import SHAPES, Shape, batch_of, build, predicted, units
from peft import LoraConfig as PeftLoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from vfl_train.config import LoraConfig
from vfl_train.cpu import keep_freed_memory
from vfl_train.models import VisionLanguageModel
from vfl_train.training.adapter import apply_lora, trainable_parameters
from vfl_train.training.frozen import limit_backward
from vfl_train.training.guards import StepGuard
from vfl_train.training.plan import build_plan, choose_layers
from vfl_train.training.prefix_start import PREFIX_STATES, beginning_at, states_at
from vfl_train.training.prefix_store import without_pixels
from vfl_train.training.trainer import ROWS, LoraTrainer, autocast_of, training_arguments

RANK, ALPHA, STEPS = 16, 32, 2  # two steps a round: one to settle, one to time
BARS = {  # what, sign, bar
    "cpu": [("trl_over_ours", ">=", 1.9), ("all_over_ours", ">=", 1.25), ("all_over_cached", ">=", 2.5)],
    "7b": [("all_over_ours", ">=", 1.3), ("trl_over_ours", ">=", 1.9), ("all_over_cached", ">=", 3.2),
           ("saved_ours_over_all", "<=", 0.33)],
    "tiny": [],
}  # fmt: skip
RATIOS = ("trl_over_ours", "all_over_ours", "all_over_cached", "trl_over_cached", "trl_over_ours_recomputed")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of losses, relative


class Clock(TrainerCallback):
    """Seconds of the last step as the trainer delimits it: of the wall clock, and of the processor summed
    over threads, which other load on the machine moves less."""

    def __init__(self, device: str) -> None:
        self.device, self.started, self.step = device, (0.0, 0.0), (0.0, 0.0)

    def _now(self) -> tuple[float, float]:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wall, cpu = self._now()
        self.step = wall - self.started[0], cpu - self.started[1]


@dataclass
class Side:
    """One way to train. `losses`: of every step so far."""

    trainer: SFTTrainer
    vlm: VisionLanguageModel
    clock: Clock
    undo: ExitStack = field(default_factory=ExitStack)
    losses: list[float] = field(default_factory=list)

    def run(self) -> tuple[float, float]:
        """`STEPS` steps of the trainer's own loop; the last one's seconds, wall and processor."""
        self.trainer.train()
        self.losses += [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]
        return self.clock.step


def build_sides(
    shape: Shape, device: str, dtype: torch.dtype, names: list[str], folder: str
) -> dict[str, Side]:
    """The sides by name, around the same frozen weights."""
    model, processor = build(shape, device, dtype)
    batch = batch_of(model, shape)
    make = {"trl": _trl, "all": _trl, "ours": _ours, "ours_recomputed": _ours, "cached": _ours}
    return {
        name: make[name](name, twin(model), processor, batch, shape, f"{folder}/{name}") for name in names
    }


def _rows(shape: Shape) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"row": [0] * shape.batch * STEPS})


def _finish(trainer: SFTTrainer, vlm: VisionLanguageModel) -> Side:
    trainer.add_callback(clock := Clock(vlm.device.type))
    trainer.remove_callback(PrinterCallback)
    return Side(trainer, vlm, clock)


def _trl(name: str, model: Any, processor: Any, batch: dict[str, Any], shape: Shape, folder: str) -> Side:
    """TRL as its users run it; `all` without checkpointing."""
    vlm = VisionLanguageModel(model, processor, "random Qwen2.5-VL")
    plan = build_plan(choose_layers(vlm.info, layers=f"0-{shape.layers - 1}"), vlm, RANK)
    changed = {} if name == "trl" else {"gradient_checkpointing": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=shape.batch,
            max_steps=STEPS,
            # Not settings of training: precision as on our side, no files, no downloads, our batch as it is.
            bf16=vlm.device.type != "cpu", use_cpu=vlm.device.type == "cpu", report_to="none",
            save_strategy="no", logging_steps=1, max_length=None, remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True, **changed,
        )  # fmt: skip
        lora = PeftLoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(plan.module_names), task_type="CAUSAL_LM"
        )
        model.requires_grad_(False)
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=_rows(shape), processing_class=processor,
            data_collator=lambda rows: dict(batch), peft_config=lora,
        )  # fmt: skip
    return _finish(trainer, vlm)


def _ours(name: str, model: Any, processor: Any, batch: dict[str, Any], shape: Shape, folder: str) -> Side:
    """What `vfl-train lora` runs, put together as `training.run` does."""
    vlm = VisionLanguageModel(model, processor, "random Qwen2.5-VL")
    plan = build_plan(choose_layers(vlm.info, layers=",".join(map(str, shape.adapted))), vlm, RANK)
    adapted = apply_lora(vlm.model, plan, r=RANK, alpha=ALPHA)
    limit_backward(vlm, plan, recompute=name == "ours_recomputed")
    config = LoraConfig(
        model="random", data="none", output=Path(folder), device=vlm.device.type, layers="0",
        per_device_train_batch_size=shape.batch, gradient_accumulation_steps=1, max_steps=STEPS,
        logging_steps=1, learning_rate=2e-5, lr_scheduler_type="linear",  # TRL's
    )  # fmt: skip
    undo = ExitStack()
    if name == "cached":
        states = states_at(vlm, batch, shape.lowest, autocast_of(config, vlm.device))
        batch = {**without_pixels(batch), PREFIX_STATES: states.cpu()}
        undo.enter_context(beginning_at(vlm, adapted, shape.lowest))
    trainer = LoraTrainer(
        model=adapted,
        args=training_arguments(config, vlm.device, folder),
        data_collator=lambda rows: {**batch, ROWS: list(range(shape.batch))},
        train_dataset=_rows(shape),
        processing_class=processor,
        guard=StepGuard(trainable_parameters(adapted)),
    )
    side = _finish(trainer, vlm)
    side.undo = undo
    return side


# --- measuring -----------------------------------------------------------------------------------------


def agreement(sides: dict[str, Side], tolerance: float) -> dict[str, float]:
    """Relative differences between losses: of each side's first step to the first side's, and of cached to
    ours over all steps so far. Raises SystemExit beyond `tolerance`."""
    first = next(iter(sides.values())).losses[0]
    found = {name: abs(side.losses[0] / first - 1) for name, side in sides.items()}
    if {"ours", "cached"} <= sides.keys():
        pairs = zip(sides["ours"].losses, sides["cached"].losses, strict=True)
        found["cached_to_ours"] = max(abs(b / a - 1) for a, b in pairs)
    if max(found.values()) > tolerance:
        raise SystemExit(f"the sides disagree by more than {tolerance}: {found}")
    return found


@contextmanager
def counted(side: Side) -> Iterator[dict[str, int]]:
    """Per step: decoder layers and vision blocks that ran (recomputation included), those that backward
    visited, and bytes saved for backward outside of recomputed layers (parameters not counted)."""
    found: Counter[str] = Counter()
    regions = {"layers": list(side.vlm.layers), "vision": list(side.vlm.base.model.visual.blocks)}
    parameters = {p.untyped_storage().data_ptr() for p in side.vlm.base.parameters()}

    def visited(name: str) -> Callable:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: found.update([f"{name}_backward"]))

        return hook

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            found["saved_bytes"] += tensor.numel() * tensor.element_size()
        return tensor

    per_step: dict[str, int] = {}
    with ExitStack() as undo:
        for name, modules in regions.items():
            for module in modules:
                undo.callback(module.register_forward_hook(visited(name)).remove)
                mlp = module.mlp.register_forward_pre_hook(lambda *_, n=name: found.update([f"{n}_forward"]))
                undo.callback(mlp.remove)
        undo.enter_context(torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor))
        yield per_step
    per_step.update({name: count // STEPS for name, count in found.items()})


def rounds(sides: dict[str, Side], repeats: int, warmup: int) -> dict[str, Runs]:
    """Seconds a step; every round runs all sides, beginning with another one each time."""
    runs = {name: Runs() for name in sides}
    names = list(sides)
    for turn in range(-warmup, repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            wall, cpu = sides[name].run()
            if turn >= 0:
                runs[name].wall.append(wall)
                runs[name].cpu.append(cpu)
        print(f"round {turn + 1} of {repeats}", file=sys.stderr, flush=True)
    return runs


def ratios(costs: dict[str, float]) -> dict[str, float]:
    """`RATIOS` of what was measured, or predicted."""
    pairs = {what: what.split("_over_") for what in RATIOS}
    return {what: costs[a] / costs[b] for what, (a, b) in pairs.items() if {a, b} <= costs.keys()}


def bars(shape: str, measured: dict[str, float], expected: dict[str, float]) -> list[dict[str, Any]]:
    """The bars of this shape that what was measured can be held to."""
    out = []
    for what, sign, bar in BARS[shape]:
        if (value := measured.get(what)) is not None:
            met = value >= bar if sign == ">=" else value <= bar
            line = {"what": what, "bar": f"{sign} {bar:.4g}", "measured": value, "met": met}
            out.append({**line, "unit_model": expected.get(what)})
    return out


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the JSON. Raises SystemExit if the sides disagree."""
    shape, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory(prefix="vfl-bench-") as folder:
        sides = build_sides(shape, args.device, dtype, args.sides, folder)
        counts: dict[str, dict[str, int]] = {}
        for name, side in sides.items():
            with counted(side) as counts[name]:
                side.run()
        agreement(sides, TOLERANCE[args.dtype])
        runs = rounds(sides, args.repeats, args.warmup)
        same = agreement(sides, TOLERANCE[args.dtype])
        print({name: statistics.median(run.cpu) for name, run in runs.items()}, file=sys.stderr, flush=True)
        peak = {name: peak_bytes(side.run, args.device) for name, side in sides.items()}
    median = {name: statistics.median(each.wall) for name, each in runs.items()}
    cpu = {name: statistics.median(each.cpu) for name, each in runs.items()}
    measured, expected = ratios(median), ratios(predicted(shape))
    if {"ours", "all"} <= counts.keys():
        measured["saved_ours_over_all"] = counts["ours"]["saved_bytes"] / counts["all"]["saved_bytes"]
        expected["saved_ours_over_all"] = (shape.layers - shape.lowest) / shape.layers
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(args.device),
        "versions": {n: version(n) for n in ("vfl-train", "torch", "transformers", "trl", "peft")},
        "shape_name": args.shape, "dtype": args.dtype, "shape": asdict(shape), "rank": RANK,
        "seconds_median": median, "seconds": {name: asdict(each) for name, each in runs.items()},
        "ratios_of_processor_seconds": ratios(cpu), "peak_bytes": peak, "per_step": counts,
        "ratios": measured, "unit_model": {**units(shape), "steps": predicted(shape), "ratios": expected},
        "loss_difference": same, "bars": bars(args.shape, measured, expected),
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The result on one screen."""
    shape, model, cpu = report["shape"], report["unit_model"], report["ratios_of_processor_seconds"]
    sizes = " ".join(f"{key}={shape[key]}" for key in ("hidden", "layers", "batch"))
    tokens = shape["side"] ** 2 + shape["text"]
    lines = [
        f"{report['hardware']}, {report['dtype']}, {sizes} tokens={tokens}, adapted {shape['adapted']}; "
        f"V={model['V']:.2f} H={model['H']:.2f} layer forwards",
        f"{'side':<16}{'s/step':>9}{'units':>8}{'peak MiB':>10}{'saved MiB':>11}"
        f"{'layers fwd/bwd':>16}{'vision fwd/bwd':>16}",
    ]
    for name, seconds in report["seconds_median"].items():
        count = report["per_step"][name]
        visits = [
            f"{count.get(f'{part}_forward', 0)}/{count.get(f'{part}_backward', 0)}"
            for part in ("layers", "vision")
        ]
        peak = report["peak_bytes"][name]
        lines.append(
            f"{name:<16}{seconds:>9.3f}{model['steps'][name]:>8.1f}{peak / 2**20:>10.0f}"
            f"{count['saved_bytes'] / 2**20:>11.0f}{visits[0]:>16}{visits[1]:>16}"
        )
    lines += [
        f"{what:<26}{value:>7.3f}  processor seconds {cpu.get(what, float('nan')):.3f}  "
        f"unit model {model['ratios'][what]:.3f}"
        for what, value in report["ratios"].items()
    ]
    for bar in report["bars"]:
        verdict = "met" if bar["met"] else "MISSED"
        lines.append(f"{bar['what']:<26}{bar['measured']:>7.3f}  bar {bar['bar']:<10}{verdict}")
    return "\n".join(lines)


def main() -> int:
    """Exit code 1: a bar is missed and --check was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = list(predicted(SHAPES["tiny"]))
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--device", help="default: cuda for 7b, else cpu")
    parser.add_argument("--dtype", choices=list(TOLERANCE), help="default: bfloat16 for 7b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", default=",".join(names), type=lambda text: text.split(","))
    parser.add_argument("--repeats", type=int, default=9, help="rounds that count, at least 7 for --check")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    args = parser.parse_args()
    if unknown := set(args.sides) - set(names):
        parser.error(f"no side {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if args.check and args.repeats < 7:
        parser.error("--check needs at least 7 repeats")
    large = args.shape == "7b"
    args.device = args.device or ("cuda" if large else "cpu")
    args.dtype = args.dtype or ("bfloat16" if large else "float32")
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    logging.getLogger("trl").setLevel(logging.ERROR)
    keep_freed_memory()

    report = bench(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return int(args.check and not all(bar["met"] for bar in report["bars"]))


if __name__ == "__main__":
    sys.exit(main())
