"""The engine against what other tools do, for one profile sweep: the base and L single-layer drops.

    python scripts/bench_engine.py --check --output bench.json     # the CPU bars: ten minutes, two idle cores
    python scripts/bench_engine.py --preset 7b --check --output bench.json        # one large GPU, bfloat16

Needs `pip install 'vfl-train[bench]'` (or `--peers naive`). The sides, all in this process, on one model with
random weights, the same tensors and the same batch of images, one after the other in every round:

plain         one untouched forward: the unit
ours          `read_out(..., path="engine")`
naive         L + 1 forwards of plain transformers; the mask only where a layer is touched, the other layers
              stay on causal attention without a mask; no cache
nnsight       L + 1 traces, one a layer, as its documentation writes a sweep over layers
nnsight_skip  the same with the layers below the touched one skipped, their output saved by the base trace
              (its documented `.skip`): half the work, and the most that its documentation shows

The vision tower is in nobody's time: its place is taken by a stub that returns the features it is given.
The head sees answer positions only, on all sides. Unless all sides agree on every log-probability, nothing
is timed. Beside wall time the processor's is kept: other load on the machine moves it less.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from bench import command
from bench.measuring import Runs, agreement, interleaved, medians, peak_bytes
from bench.models import PRESETS, Batch, Shape, build_batch, build_model, no_processor, twin

from vfl_train.interventions.intervention import BASE, drop
from vfl_train.interventions.readout import Cost, Row, read_out
from vfl_train.models import VisionLanguageModel

PEERS = ("naive", "nnsight", "nnsight_skip")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}  # of log-probabilities, in nats: rounding, not effects


def logprobs(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """[B, A, V] to [B, A], on the CPU (which waits for the device)."""
    return logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0].cpu()


# --- the sides: each returns [L + 1, B, A], the base first ---------------------------------------


def run_plain(model: Any, batch: Batch) -> torch.Tensor:
    """One untouched forward."""
    return logprobs(model(**batch.inputs).logits, batch.answers)[None]


def run_ours(vlm: VisionLanguageModel, batch: Batch, path: str, cost: Cost | None = None) -> torch.Tensor:
    """The engine; everything in one batch."""
    branches = [BASE, *(drop([layer]) for layer in range(batch.shape.layers))]
    answers = [tuple(answer) for answer in batch.answers.tolist()]
    rows = [Row(p, a, b) for p, a in zip(batch.prompts, answers, strict=True) for b in branches]
    said = read_out(vlm, rows, path, batch_tokens=1 << 20 if path == "engine" else 1 << 12, cost=cost)
    lines = torch.tensor([line.logprobs for line in said])
    return lines.view(batch.shape.batch, len(branches), -1).transpose(0, 1)


def run_naive(model: Any, batch: Batch) -> torch.Tensor:
    """L + 1 forwards, one of them untouched."""

    def mask_images(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "attention_mask": batch.mask}

    lines = [logprobs(model(**batch.inputs).logits, batch.answers)]
    for layer in model.model.language_model.layers:
        hook = layer.self_attn.register_forward_pre_hook(mask_images, with_kwargs=True)
        lines.append(logprobs(model(**batch.inputs).logits, batch.answers))
        hook.remove()
    return torch.stack(lines)


def run_nnsight(net: Any, batch: Batch) -> torch.Tensor:
    """L + 1 traces. Source: nnsight's docs/patterns/activation-patching.md, "Sweep over layers", and
    docs/usage/access-and-modify.md, ".input vs .inputs"."""
    with net.trace(**batch.inputs):
        logits = net.output.logits.save()
    lines = [logprobs(logits, batch.answers)]
    for layer in net.model.language_model.layers:
        with net.trace(**batch.inputs):
            args, kwargs = layer.self_attn.inputs
            layer.self_attn.inputs = (args, {**kwargs, "attention_mask": batch.mask})
            logits = net.output.logits.save()
        lines.append(logprobs(logits, batch.answers))
    return torch.stack(lines)


def run_nnsight_skip(net: Any, batch: Batch) -> torch.Tensor:
    """L + 1 traces that start where they differ from the base. Source: nnsight's docs/usage/skip.md and
    docs/patterns/activation-patching.md ("Cache the clean run once")."""
    import nnsight

    layers = net.model.language_model.layers
    with net.trace(**batch.inputs):
        below = nnsight.save([layer.output for layer in layers])
        logits = net.output.logits.save()
    lines = [logprobs(logits, batch.answers)]
    for depth, layer in enumerate(layers):
        with net.trace(**batch.inputs):
            for lower, output in zip(layers[:depth], below, strict=False):
                lower.skip(output)
            args, kwargs = layer.self_attn.inputs
            layer.self_attn.inputs = (args, {**kwargs, "attention_mask": batch.mask})
            logits = net.output.logits.save()
        lines.append(logprobs(logits, batch.answers))
    return torch.stack(lines)


Side = Callable[[], torch.Tensor]


def build_sides(
    shape: Shape, device: str, dtype: torch.dtype, peers: list[str], path: str
) -> tuple[dict[str, Side], Callable[[], Cost]]:
    """The sides by name, and what runs ours once more and counts."""
    model = build_model(shape, device, dtype)
    batch = build_batch(model, shape)
    vlm = VisionLanguageModel(model, no_processor(), "random Qwen2.5-VL")

    def counted() -> Cost:
        run_ours(vlm, batch, path, cost := Cost())
        return cost

    sides: dict[str, Side] = {
        "plain": partial(run_plain, model, batch),
        "ours": partial(run_ours, vlm, batch, path),
    }
    if "naive" in peers:
        sides["naive"] = partial(run_naive, model, batch)
    if {"nnsight", "nnsight_skip"} & set(peers):
        from nnsight import NNsight

        net = NNsight(twin(model))
        for name, run in (("nnsight", run_nnsight), ("nnsight_skip", run_nnsight_skip)):
            if name in peers:
                sides[name] = partial(run, net, batch)
    return sides, counted


# --- measuring -----------------------------------------------------------------------------------


def memory(sides: dict[str, Side], shape: Shape, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Peak bytes of ours beyond those of one plain forward, against the KV cache of all layers with one
    row a branch. An upper bound of the extra KV: it counts whatever else ours keeps, too."""
    head = shape.hidden // shape.heads
    row = shape.tokens * shape.layers * 2 * shape.kv_heads * head * dtype.itemsize
    ours, plain = (peak_bytes(sides[name], device) for name in ("ours", "plain"))
    replicated = shape.batch * (shape.layers + 1) * row
    return {
        "ours_peak_bytes": ours,
        "plain_peak_bytes": plain,
        "row_replicated_kv_bytes": replicated,
        "one_plain_forward_kv_bytes": shape.batch * row,
        "extra_over_replicated": max(0, ours - plain) / replicated,
    }


def ratios(shape: Shape, runs: dict[str, Runs], cost: Cost) -> tuple[dict[str, float], dict[str, float]]:
    """(limits, measured). `of_limit`: naive over ours as a share of (L + 1) / limit_p1, which counts the
    last layer in full; ours computes it for answer positions only, which `of_executed_limit` takes off."""
    wall, cpu = medians(runs)
    executed = cost.token_layers + cost.last_layer_tokens
    naive = (shape.layers + 1) * shape.batch * shape.tokens * shape.layers
    limits = {
        "ours_over_plain": shape.limit_p1,
        "naive_over_ours": (shape.layers + 1) / shape.limit_p1,
        "executed_naive_over_ours": naive / executed,
    }
    measured = {"ours_over_plain": wall["ours"] / wall["plain"]}
    for name in wall.keys() & set(PEERS):
        measured[f"{name}_over_ours"] = wall[name] / wall["ours"]
        measured[f"{name}_over_ours_cpu"] = cpu[name] / cpu["ours"]
    if "naive" in wall:
        measured["of_limit"] = measured["naive_over_ours"] / limits["naive_over_ours"]
        measured["of_executed_limit"] = measured["naive_over_ours"] / limits["executed_naive_over_ours"]
    return limits, measured


BARS = {  # what, sign, bar; nnsight_skip has none: its limit lies below them
    "cpu": [("naive_over_ours", ">=", 7.8), ("nnsight_over_ours", ">=", 7.8), ("of_limit", ">=", 0.85),
            ("extra_over_replicated", "<=", 1 / 10)],
    "7b": [("ours_over_plain", "<=", 2.5), ("naive_over_ours", ">=", 11.0),
           ("extra_over_replicated", "<=", 1 / 15)],
    "7b-long": [("naive_over_ours", ">=", 15.0), ("extra_over_replicated", "<=", 1 / 15)],
    "tiny": [],
}  # fmt: skip


def bars(preset: str, shape: Shape, measured: dict[str, float]) -> list[dict[str, Any]]:
    """The bars that what was measured can be held to."""
    return command.held_to(BARS["7b-long" if preset == "7b" and shape.prefix >= 1500 else preset], measured)


# --- the report ----------------------------------------------------------------------------------


@torch.no_grad()
def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the JSON. Raises SystemExit if the sides disagree."""
    wanted = {k: v for k in ("prefix", "suffix", "layers", "batch") if (v := getattr(args, k)) is not None}
    shape, dtype = replace(PRESETS[args.preset], **wanted), getattr(torch, args.dtype)
    sides, count = build_sides(shape, args.device, dtype, args.peers, args.path)
    same = agreement({name: run() for name, run in sides.items()}, TOLERANCE[args.dtype])
    runs = interleaved(sides, args.repeats, args.warmup, args.device, often=("plain", "ours"))
    used, cost = memory(sides, shape, dtype, args.device), count()
    wall, _ = medians(runs)
    limits, measured = ratios(shape, runs, cost)
    return {
        **command.circumstances(args, packages(args.peers)),
        "preset": args.preset, "path": args.path, "shape": asdict(shape),
        "seconds_median": wall,
        "seconds_median_per_image": {name: seconds / shape.batch for name, seconds in wall.items()},
        "seconds": {name: asdict(r) for name, r in runs.items()},
        "ratios": measured, "limits": limits,
        "token_layers": asdict(cost) | {"formula": shape.token_layers},
        "memory": used, "logprob_difference": same,
        "bars": bars(args.preset, shape, measured | used),
    }  # fmt: skip


def packages(peers: list[str]) -> list[str]:
    """Whose versions matter."""
    return ["vfl-train", "torch", "transformers", *(["nnsight"] if set(peers) - {"naive"} else [])]


def table(report: dict[str, Any]) -> str:
    """The result on one screen."""
    shape, median, limits = report["shape"], report["seconds_median"], report["limits"]
    same, count, used = report["logprob_difference"], report["token_layers"], report["memory"]
    rounds = min(len(runs["wall"]) for runs in report["seconds"].values())
    sizes = " ".join(f"{key}={shape[key]}" for key in ("hidden", "layers", "prefix", "suffix", "batch"))
    lines = [
        f"{report['hardware']}, {report['dtype']}, {sizes}, {rounds} rounds",
        f"{'side':<14}{'s/image':>10}{'plain forwards':>16}{'over ours':>11}{'|dlogp|':>10}",
    ]
    for name, seconds in median.items():
        lines.append(
            f"{name:<14}{seconds / shape['batch']:>10.4f}{seconds / median['plain']:>16.2f}"
            f"{seconds / median['ours']:>11.2f}{same.get(name, 0.0):>10.1e}"
        )
    mib = {key: f"{value / 2**20:.0f} MiB" for key, value in used.items()}
    lines += [
        f"limits: ours {limits['ours_over_plain']:.2f} plain forwards, naive over ours "
        f"{limits['naive_over_ours']:.2f} ({limits['executed_naive_over_ours']:.2f} without the last layer)",
        f"token-layers {count['token_layers']}, formula {count['formula']}; "
        f"{count['reference_rows']} rows on the reference path; largest effect {same['largest_effect']:.2g}",
        f"peak {mib['ours_peak_bytes']}, plain forward {mib['plain_peak_bytes']}, "
        f"row-replicated KV {mib['row_replicated_kv_bytes']}",
    ]
    return "\n".join(lines + command.bar_lines(report))


def main() -> int:
    """Exit code 1: a bar is missed and --check was given."""
    parser = command.parser_of(__doc__, PRESETS, TOLERANCE)
    command.add_sizes(parser, ("prefix", "suffix", "layers", "batch"))
    parser.add_argument("--peers", default=",".join(PEERS), type=partial(command.names_in, PEERS))
    parser.add_argument("--path", choices=["engine", "reference"], default="engine", help="what ours runs")
    command.add_check(parser)
    args = command.settled(parser)
    if set(args.peers) - {"naive"} and find_spec("nnsight") is None:
        parser.error("nnsight is not installed: pip install 'vfl-train[bench]', or give --peers naive")

    report = bench(args)
    return command.concluded(args, report, table(report))


if __name__ == "__main__":
    sys.exit(main())
