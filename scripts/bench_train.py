"""A training step of VFL-LoRA against what users run today, on one model, one batch, in one process.

    python scripts/bench_train.py --check --output bench.json              # the CPU bars: two idle cores
    python scripts/bench_train.py --shape 7b --check --output bench.json   # one GPU of 141 GB, bfloat16

The sides; LoRA of rank 16 on all seven linears of a decoder layer, frozen weights shared:

trl       TRL's SFTTrainer with its defaults, LoRA on all layers of the language model. Its default is
          activation checkpointing, which takes backward through every layer and the vision tower.
all       the same with checkpointing switched off: what a user with memory to spare runs
all_supervised  the same as all, with what lies behind the last layer's keys computed at supervised positions
          only, as ours does. TRL's loss head does that on CUDA; elsewhere it scores every position, so that
          against `all` a CPU shows more than a GPU will. This side shows what the choice of layers saves.
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
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from bench import command
from bench.measuring import medians, peak_bytes, rounds
from bench.models import twin
from bench.training import SHAPES, Shape, batch_of, build, predicted, units
from peft import LoraConfig as PeftLoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from vfl_train.config import LoraConfig
from vfl_train.models import VisionLanguageModel
from vfl_train.training.adapter import apply_lora, trainable_parameters
from vfl_train.training.frozen import limit_backward
from vfl_train.training.guards import StepGuard
from vfl_train.training.plan import build_plan, choose_layers
from vfl_train.training.prefix_start import PREFIX_STATES, beginning_at, states_at
from vfl_train.training.prefix_store import without_pixels
from vfl_train.training.supervised import supervised_only
from vfl_train.training.trainer import ROWS, LoraTrainer, autocast_of, training_arguments

RANK, ALPHA, STEPS = 16, 32, 2  # two steps a round: one to settle, one to time
BARS = {  # what, sign, bar
    "cpu": [("trl_over_ours", ">=", 1.9), ("all_over_ours", ">=", 1.25), ("all_over_cached", ">=", 2.5)],
    "7b": [("all_over_ours", ">=", 1.3), ("trl_over_ours", ">=", 1.9), ("all_over_cached", ">=", 3.2),
           ("saved_ours_over_all", "<=", 0.33)],
    "tiny": [],
}  # fmt: skip
RATIOS = (
    "trl_over_ours", "all_over_ours", "all_over_cached", "trl_over_cached", "trl_over_ours_recomputed",
    "all_supervised_over_ours", "all_supervised_over_cached",
)  # fmt: skip
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
    make = {name: _trl if name in ("trl", "all", "all_supervised") else _ours for name in predicted(shape)}
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
    """TRL as its users run it; `all` without checkpointing; `all_supervised` with our head."""
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
    side = _finish(trainer, vlm)
    if name == "all_supervised":
        side.undo.enter_context(supervised_only(vlm))
    return side


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
    undo.enter_context(supervised_only(vlm))
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


def ratios(costs: dict[str, float]) -> dict[str, float]:
    """`RATIOS` of what was measured, or predicted."""
    pairs = {what: what.split("_over_") for what in RATIOS}
    return {what: costs[a] / costs[b] for what, (a, b) in pairs.items() if {a, b} <= costs.keys()}


def bars(shape: str, measured: dict[str, float], expected: dict[str, float]) -> list[dict[str, Any]]:
    """The bars of this shape that what was measured can be held to."""
    return [
        {**bar, "unit_model": expected.get(bar["what"])} for bar in command.held_to(BARS[shape], measured)
    ]


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the JSON. Raises SystemExit if the sides disagree."""
    shape, dtype = SHAPES[args.preset], getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory(prefix="vfl-bench-") as folder:
        sides = build_sides(shape, args.device, dtype, args.sides, folder)
        counts: dict[str, dict[str, int]] = {}
        for name, side in sides.items():
            with counted(side) as counts[name]:
                side.run()
        agreement(sides, TOLERANCE[args.dtype])
        runs = rounds({name: side.run for name, side in sides.items()}, args.repeats, args.warmup)
        same = agreement(sides, TOLERANCE[args.dtype])
        peak = {name: peak_bytes(side.run, args.device) for name, side in sides.items()}
    median, cpu = medians(runs)
    measured, expected = ratios(median), ratios(predicted(shape))
    if {"ours", "all"} <= counts.keys():
        measured["saved_ours_over_all"] = counts["ours"]["saved_bytes"] / counts["all"]["saved_bytes"]
        expected["saved_ours_over_all"] = (shape.layers - shape.lowest) / shape.layers
    return {
        **command.circumstances(args, ("vfl-train", "torch", "transformers", "trl", "peft")),
        "shape_name": args.preset, "shape": asdict(shape), "rank": RANK,
        "seconds_median": median, "seconds": {name: asdict(each) for name, each in runs.items()},
        "ratios_of_processor_seconds": ratios(cpu), "peak_bytes": peak, "per_step": counts,
        "ratios": measured, "unit_model": {**units(shape), "steps": predicted(shape), "ratios": expected},
        "loss_difference": same, "bars": bars(args.preset, measured, expected),
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
    return "\n".join(lines + command.bar_lines(report))


def main() -> int:
    """Exit code 1: a bar is missed and --check was given."""
    names = list(predicted(SHAPES["tiny"]))
    parser = command.parser_of(__doc__, SHAPES, TOLERANCE, repeats=9)
    parser.add_argument("--sides", default=",".join(names), type=partial(command.names_in, names))
    command.add_check(parser)
    args = command.settled(parser)
    torch.set_flush_denormal(True)
    logging.getLogger("trl").setLevel(logging.ERROR)

    report = bench(args)
    return command.concluded(args, report, table(report))


if __name__ == "__main__":
    sys.exit(main())
