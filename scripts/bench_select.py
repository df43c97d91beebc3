"""VFL-Select's scoring against what it replaces: F + 2 plain forwards, or a gradient, for every sample.

    python scripts/bench_select.py --check --output bench.json     # the CPU bars: ten minutes, two idle cores
    python scripts/bench_select.py --preset 7b --output bench.json               # one large GPU, bfloat16

The sides, all in this process, on one model with random weights, the same tensors and the same batch, one
after the other in every round:

plain      one untouched forward: the unit
ours       the sweep of `select`: the answers' loss untouched, without the image at each of F functions'
           layers, and without the image at all; the functions begin at different depths
ours_deep  the same with every function beginning at layer 0: the most that a sweep can cost
naive      F + 2 forwards of plain transformers; the mask only where a layer is touched
gradient   forward and backward of every sample by itself (what gradient methods need: one gradient a
           sample), LoRA of rank 16 on all linear layers of the decoder, no checkpointing
gradient_gc  the same with gradient checkpointing, as a 7B model on long samples is trained

The vision tower is in nobody's time: a stub in its place returns the features it is given (`--preset 7b`
times a real one of Qwen2.5-VL-7B's size as a side of its own and counts it in the GPU-hours). The head sees
answer positions only, on all sides. Unless all sides agree on every loss, nothing is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from bench import command
from bench.measuring import Runs, agreement, interleaved, medians
from bench.models import PRESETS, Batch, Shape, build_batch, build_model, no_processor, twin
from peft import LoraConfig, get_peft_model

from vfl_train.interventions import Row, drop, read_out
from vfl_train.interventions.readout import Cost
from vfl_train.models import VisionLanguageModel

ANSWER = 20  # of the suffix's tokens
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of losses, nats per token: rounding, not effects
POOL = 665_000  # rows of LLaVA's instruction data, for the GPU-hours
STARTS = (0.10, 0.30, 0.45, 0.60, 0.80)  # depth at which a function's two layers begin
SIDES = ("plain", "ours", "ours_deep", "naive", "gradient", "gradient_gc")


def function_layers(depth: int, functions: int, deep: bool) -> list[list[int]]:
    """Two layers a function: from its depth on, or (deep) layer 0 and one of its own."""
    if deep:
        return [[0, 1 + f % (depth - 1)] for f in range(functions)]
    starts = [int(STARTS[f % len(STARTS)] * depth) for f in range(functions)]
    return [[k, min(k + 1, depth - 1)] for k in starts]


def losses(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """[B, A, V] to [B]: nats per answer token."""
    return -logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0].mean(-1)


# --- the sides: each returns losses [branches, B], the untouched model's first ---------------------


def run_plain(model: Any, batch: Batch) -> torch.Tensor:
    """One untouched forward."""
    with torch.no_grad():
        return losses(model(**batch.inputs).logits, batch.answers).cpu()[None]


def run_ours(
    vlm: VisionLanguageModel, batch: Batch, layers: list[list[int]], cost: Cost | None = None
) -> torch.Tensor:
    """The engine; everything in one batch."""
    branches = [(), *map(drop, layers), drop(range(batch.shape.layers))]
    answers = [tuple(answer) for answer in batch.answers.tolist()]
    rows = [Row(p, a, b) for p, a in zip(batch.prompts, answers, strict=True) for b in branches]
    found = read_out(vlm, rows, batch_tokens=1 << 20, cost=cost)
    return torch.tensor([r.loss for r in found]).view(batch.shape.batch, len(branches)).T


@torch.no_grad()
def run_naive(model: Any, batch: Batch, layers: list[list[int]]) -> torch.Tensor:
    """F + 2 forwards."""

    def mask_images(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "attention_mask": batch.mask}

    decoder = model.model.language_model.layers
    lines = []
    for touched in ([], *layers, range(batch.shape.layers)):
        hooks = [
            decoder[k].self_attn.register_forward_pre_hook(mask_images, with_kwargs=True) for k in touched
        ]
        lines.append(losses(model(**batch.inputs).logits, batch.answers).cpu())
        for hook in hooks:
            hook.remove()
    return torch.stack(lines)


def run_gradient(model: Any, batch: Batch) -> torch.Tensor:
    """Forward and backward of one sample after the other; the gradients are dropped."""
    said = []
    for i in range(batch.shape.batch):
        own = {
            "inputs_embeds": batch.inputs["inputs_embeds"][i : i + 1],
            "position_ids": batch.inputs["position_ids"][:, i : i + 1],
            "use_cache": False,
            "logits_to_keep": batch.inputs["logits_to_keep"],
        }
        loss = losses(model(**own).logits, batch.answers[i : i + 1])[0]
        loss.backward()
        said.append(loss.detach())
        model.zero_grad(set_to_none=True)
    return torch.stack(said).cpu()[None]


def with_lora(model: Any, checkpointing: bool) -> Any:
    """A model around the same weights that trains LoRA in every decoder layer."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trained = get_peft_model(twin(model), LoraConfig(r=16, target_modules=targets))
    if checkpointing:
        trained.enable_input_require_grads()
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    return trained.train()


def vision_side(shape: Shape, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """A vision tower of Qwen2.5-VL-7B's size over the batch's images."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel as Tower,
    )

    config = Qwen2_5_VLVisionConfig(out_hidden_size=shape.hidden)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        tower = Tower(config).to(dtype).eval()
    side = 2 * int((shape.prefix - 2) ** 0.5)
    grids = torch.tensor([[1, side, side]], device=device).repeat(shape.batch, 1)
    pixels = torch.randn(shape.batch * side * side, 1176, device=device, dtype=dtype)

    def run() -> Any:
        with torch.no_grad():
            return tower(pixels, grid_thw=grids)

    return run


Side = Callable[[], torch.Tensor]


def build_sides(args: argparse.Namespace, shape: Shape) -> tuple[dict[str, Side], dict[str, Cost]]:
    """The sides by name, after a run of ours that counts."""
    model = build_model(shape, args.device, getattr(torch, args.dtype)).requires_grad_(False)
    with torch.no_grad():
        batch = build_batch(model, shape)
    vlm = VisionLanguageModel(model, no_processor(), "random Qwen2.5-VL")
    spread, deep = (function_layers(shape.layers, args.functions, deep) for deep in (False, True))
    counted = {"ours": Cost(), "ours_deep": Cost()}
    run_ours(vlm, batch, spread, counted["ours"])
    different = (run_ours(vlm, batch, deep, counted["ours_deep"]) - run_naive(model, batch, deep)).abs().max()
    if different > TOLERANCE[args.dtype]:
        raise SystemExit(f"ours_deep and naive differ by {different} nats")
    return {
        "plain": partial(run_plain, model, batch),
        "ours": partial(run_ours, vlm, batch, spread),
        "ours_deep": partial(run_ours, vlm, batch, deep),
        "naive": partial(run_naive, model, batch, spread),
        "gradient": partial(run_gradient, with_lora(model, False), batch),
        "gradient_gc": partial(run_gradient, with_lora(model, True), batch),
    }, counted


# --- measuring -----------------------------------------------------------------------------------


def formula(shape: Shape, layers: list[list[int]]) -> int:
    """Token-layers of the sweep, the last layer apart: prefix and base at every layer, a branch from its
    first layer on (dropping the image everywhere begins at layer 0)."""
    below = shape.layers - 1
    joined = sum(max(0, below - min(k)) for k in (*layers, [0]))
    return shape.batch * (shape.tokens * below + shape.suffix * joined)


def ratios(runs: dict[str, Runs], shape: Shape, functions: int) -> dict[str, float]:
    """What the bars are held to, from medians of wall time; `_cpu` of processor time. `limit_*`: naive over
    ours if nothing but token-layers took time, the head and the last layer's savings left out."""
    wall, cpu = medians(runs)
    out = {}
    for ours in ("ours", "ours_deep"):
        starts = [min(k) for k in function_layers(shape.layers, functions, ours == "ours_deep")]
        share = shape.suffix / shape.tokens
        sweep = 1 + share * (1 + sum(1 - k / shape.layers for k in starts))
        out[f"limit_naive_over_{ours}"] = (functions + 2) / sweep
        out[f"naive_over_{ours}"] = wall["naive"] / wall[ours]
        out[f"naive_over_{ours}_cpu"] = cpu["naive"] / cpu[ours]
        for peer in ("gradient", "gradient_gc"):
            out[f"{ours}_over_{peer}"] = wall[ours] / wall[peer]
            out[f"{ours}_over_{peer}_cpu"] = cpu[ours] / cpu[peer]
    return out


BARS = {
    "cpu": [
        ("naive_over_ours_deep", ">=", 4.2),
        ("ours_deep_over_gradient_gc", "<=", 0.52),
        ("ours_deep_over_gradient", "<=", 0.78),
    ]
}


def bars(preset: str, measured: dict[str, float]) -> list[dict[str, Any]]:
    """The bars of a preset, held to its most expensive sweep."""
    return command.held_to(BARS.get(preset, []), measured)


def throughput(runs: dict[str, Runs], shape: Shape) -> dict[str, float]:
    """Samples a second and GPU-hours for 665 000 samples; the vision tower's time where it was measured is
    added, encoding on the CPU runs beside it and is not in here."""
    seconds = statistics.median(runs["ours"].wall)
    seconds += statistics.median(runs["vision"].wall) if "vision" in runs else 0.0
    each = seconds / shape.batch
    return {"samples_per_second": 1 / each, "hours_for_665k": POOL * each / 3600}


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the JSON. Raises SystemExit if the sides disagree."""
    wanted = {k: v for k in ("prefix", "suffix", "batch") if (v := getattr(args, k)) is not None}
    shape = replace(PRESETS[args.preset], **wanted)
    shape = replace(shape, answer=min(ANSWER, shape.suffix // 2))
    sides, counted = build_sides(args, shape)
    results = {name: run() for name, run in sides.items()}
    same = agreement(results, TOLERANCE[args.dtype], ours=("ours", "ours_deep"))
    if args.preset == "7b":
        sides["vision"] = vision_side(shape, args.device, getattr(torch, args.dtype))
    runs = interleaved(sides, args.repeats, args.warmup, args.device, often=("ours", "ours_deep"))
    measured = ratios(runs, shape, args.functions)
    executed = {
        name: asdict(cost)
        | {"formula": formula(shape, function_layers(shape.layers, args.functions, name == "ours_deep"))}
        for name, cost in counted.items()
    }
    return {
        **command.circumstances(args, ("vfl-train", "torch", "transformers", "peft")),
        "preset": args.preset, "functions": args.functions, "shape": asdict(shape),
        "seconds_median": medians(runs)[0],
        "seconds": {name: asdict(r) for name, r in runs.items()},
        "ratios": measured, "throughput": throughput(runs, shape), "token_layers": executed,
        "loss_difference": same, "bars": bars(args.preset, measured),
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The result on one screen."""
    shape, median, ratio = report["shape"], report["seconds_median"], report["ratios"]
    sizes = " ".join(f"{key}={shape[key]}" for key in ("hidden", "layers", "prefix", "suffix", "batch"))
    lines = [
        f"{report['hardware']}, {report['dtype']}, F={report['functions']} {sizes}",
        f"{'side':<14}{'s/sample':>10}{'plain forwards':>16}{'over ours_deep':>16}",
    ]
    for name, seconds in median.items():
        lines.append(
            f"{name:<14}{seconds / shape['batch']:>10.4f}{seconds / median['plain']:>16.2f}"
            f"{seconds / median['ours_deep']:>16.2f}"
        )
    for ours, count in report["token_layers"].items():
        lines.append(
            f"{ours}: {count['token_layers']} token-layers, formula {count['formula']}; naive over it "
            f"{ratio[f'naive_over_{ours}']:.2f}, limit {ratio[f'limit_naive_over_{ours}']:.2f}"
        )
    speed = report["throughput"]
    lines.append(f"{speed['samples_per_second']:.2f} samples/s, {speed['hours_for_665k']:.1f} h for 665 000")
    return "\n".join(lines + command.bar_lines(report))


def main() -> int:
    """Exit code 1: a bar is missed and --check was given."""
    parser = command.parser_of(__doc__, PRESETS, TOLERANCE)
    command.add_sizes(parser, ("prefix", "suffix", "batch"))
    parser.add_argument("--functions", type=int, default=5)
    command.add_check(parser)
    args = command.settled(parser)

    report = bench(args)
    return command.concluded(args, report, table(report))


if __name__ == "__main__":
    sys.exit(main())
