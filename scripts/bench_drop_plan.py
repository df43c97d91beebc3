"""`generate` under a drop plan against the untouched model and against the same plan by masks.

    python scripts/bench_drop_plan.py --output bench.json                        # CPU, float32
    python scripts/bench_drop_plan.py --preset 7b --output bench.json            # one large GPU, bfloat16

untouched  transformers' `generate`, scaled dot product attention
masked K   the same with the image's keys masked out for all text from layer K on
plan K     `drop_images_from(model, K)`

All in this process, on one model with random weights and the same prompts, in turn in every round; greedy,
with a fixed number of new tokens. The vision tower is in nobody's time (a stub returns the features it is
given). `prefill`: seconds until the first token's logits; `per_token`: seconds for each further one;
`cache_bytes`: K and V after the last; `prefill_flops`: counted by PyTorch. Unless plan and masks give the
same tokens and logits, nothing is timed. On a CPU the processor's seconds count: other load moves them less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from bench import command
from bench.measuring import interleaved
from bench.models import PRESETS, Shape, build_batch, build_model, no_processor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LogitsProcessor

from vfl_train.interventions.drop_plan import drop_images_from
from vfl_train.models import VisionLanguageModel
from vfl_train.models.batching import stack

# Two more tokens than the image's; 600 of them, as 24 x 25, and 20 in the toy.
PREFIX = {"cpu": 602, "7b": 602, "tiny": 22}
LAYERS = {"cpu": (4, 8, 10), "7b": (14, 20, 24), "tiny": (1, 2)}
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}  # of log-probabilities, in nats


@contextmanager
def masked(model: Any, layer: int, span: tuple[int, int]) -> Iterator[None]:
    """The image's keys masked out for all text from `layer` on; the other layers stay without a mask."""

    @lru_cache(maxsize=2)
    def mask(queries: int, keys: int) -> torch.Tensor:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=model.device).tril(keys - queries)
        seen[max(0, span[1] - (keys - queries)) :, slice(*span)] = False
        return seen[None, None]

    def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        queries = kwargs["hidden_states"].shape[1]
        keys = queries + kwargs["past_key_values"].get_seq_length(module.layer_idx)
        return args, {**kwargs, "attention_mask": mask(queries, keys)}

    layers = model.model.language_model.layers[layer:]
    handles = [m.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Seconds:
    """Wall and processor seconds of each run of one side."""

    prefill: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    prefill_cpu: list[float] = field(default_factory=list)
    per_token_cpu: list[float] = field(default_factory=list)


class Clock(LogitsProcessor):
    """Notes when each token's logits are there."""

    def __init__(self, device: str) -> None:
        self.device, self.ticks = device, [self._now(device)]

    @staticmethod
    def _now(device: str) -> tuple[float, float]:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ticks.append(self._now(self.device))
        return scores

    def note(self, seconds: Seconds) -> None:
        """Add this run to `seconds`."""
        start, first, last = self.ticks[0], self.ticks[1], self.ticks[-1]
        (wall, cpu), steps = ((b - a for a, b in zip(start, first, strict=True)), len(self.ticks) - 2)
        seconds.prefill.append(wall)
        seconds.prefill_cpu.append(cpu)
        seconds.per_token.append((last[0] - first[0]) / steps)
        seconds.per_token_cpu.append((last[1] - first[1]) / steps)


@dataclass
class Bench:
    """A model, its inputs, and how to generate from them."""

    model: Any
    inputs: dict[str, torch.Tensor]
    span: tuple[int, int]
    new: int
    device: str

    def around(self, side: str) -> AbstractContextManager:
        """What is in force for `side`."""
        name, _, layer = side.partition(" ")
        if name == "untouched":
            return nullcontext()
        if name == "masked":
            return masked(self.model, int(layer), self.span)
        # Given, not found by its placeholders: random weights generate these, too, and the masks let them be.
        image = torch.zeros_like(self.inputs["input_ids"], dtype=torch.bool)
        image[:, slice(*self.span)] = True
        return drop_images_from(self.model, int(layer), image)

    def generate(self, side: str, **options: Any) -> Any:
        """Greedy output of `side`."""
        options = {"max_new_tokens": self.new, "min_new_tokens": self.new, "do_sample": False, **options}
        with self.around(side):
            return self.model.generate(**self.inputs, **options)

    def timed(self, side: str, seconds: Seconds) -> None:
        """One run of `side`, added to `seconds`."""
        clock = Clock(self.device)
        self.generate(side, logits_processor=[clock])
        clock.note(seconds)

    def found(self, side: str) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """(tokens [B, new], log-probabilities [B, new, V], bytes of the cache, FLOPs of the prefill)."""
        out = self.generate(side, return_dict_in_generate=True, output_logits=True)
        cache = sum(t.nbytes for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
        with FlopCounterMode(display=False) as counter:
            self.generate(side, max_new_tokens=1, min_new_tokens=1)
        tokens = out.sequences[:, self.inputs["input_ids"].shape[1] :].cpu()
        logits = torch.stack(out.logits, 1).float().log_softmax(-1).cpu()
        return tokens, logits, cache, counter.get_total_flops()


def build(shape: Shape, new: int, device: str, dtype: torch.dtype) -> Bench:
    """A random model and prompts for it."""
    model = build_model(shape, device, dtype)
    prompts = build_batch(model, shape).prompts
    vlm = VisionLanguageModel(model, no_processor(), "random Qwen2.5-VL")
    inputs = stack(vlm, [(prompt, ()) for prompt in prompts])
    return Bench(model, inputs, prompts[0].spans[0], new, device)


def agreement(found: dict[str, Any], layers: list[int], tolerance: float) -> dict[str, dict[str, Any]]:
    """Per layer: whether plan and masks say the same tokens, the largest difference in log-probability
    after equal tokens, and for comparison the plan's largest effect on the first. Raises SystemExit beyond
    `tolerance`."""
    same = {}
    for k in layers:
        (ours, logits, *_), (theirs, expected, *_) = found[f"plan {k}"], found[f"masked {k}"]
        alike = (ours == theirs).cumprod(1).bool()
        after = torch.cat([torch.ones_like(alike[:, :1]), alike[:, :-1]], 1)
        difference = float((logits - expected)[after].abs().max())
        if difference > tolerance:
            raise SystemExit(f"plan and masks from layer {k} differ by {difference} nats")
        effect = float((logits - found["untouched"][1])[:, 0].abs().max())
        same[str(k)] = {"tokens": bool(alike.all()), "difference": difference, "effect": effect}
    return same


def expected_share(bench: Bench, layers: int, k: int, tokens: int) -> float:
    """What is left of `tokens` tokens a layer if the image's are at the first `k` layers only."""
    image = bench.span[1] - bench.span[0]
    return 1 - image / tokens * (1 - k / layers)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the JSON. Raises SystemExit if plan and masks differ."""
    shape = replace(PRESETS[args.preset], prefix=PREFIX[args.preset], batch=args.batch)
    bench = build(shape, args.new, args.device, getattr(torch, args.dtype))
    names = ["untouched", *(f"{side} {k}" for k in args.layers for side in ("masked", "plan"))]
    found = {name: bench.found(name) for name in names}
    same = agreement(found, args.layers, TOLERANCE[args.dtype])

    seconds = {name: Seconds() for name in names}
    sides = {name: partial(bench.timed, name, seconds[name]) for name in names}
    interleaved(sides, args.repeats, args.warmup, args.device)
    median = {
        name: {key: statistics.median(runs[args.warmup :]) for key, runs in asdict(of).items()}
        | {"cache_bytes": found[name][2], "prefill_flops": found[name][3]}
        for name, of in seconds.items()
    }
    prompt = bench.inputs["input_ids"].shape[1]
    return {
        **command.circumstances(args, ("vfl-train", "torch", "transformers")),
        "device": args.device, "preset": args.preset, "shape": asdict(shape), "prompt_tokens": prompt,
        "image_tokens": bench.span[1] - bench.span[0], "new_tokens": args.new,
        "median": median, "seconds": {name: asdict(of) for name, of in seconds.items()},
        "over_untouched": {
            name: {key: m[key] / median["untouched"][key] for key in m} for name, m in median.items()
        },
        "expected": {
            str(k): {
                # The last new token is never fed, so it is not in the cache.
                "cache_bytes": expected_share(bench, shape.layers, k, prompt + args.new - 1),
                "token_layers": expected_share(bench, shape.layers, k, prompt),
            }
            for k in args.layers
        },
        "same": same,
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The result on one screen."""
    shape, on_cpu = report["shape"], not report["device"].startswith("cuda")
    clock, label = ("_cpu", "processor") if on_cpu else ("", "wall")
    lines = [
        f"{report['hardware']}, {report['dtype']}, hidden={shape['hidden']} layers={shape['layers']} "
        f"batch={shape['batch']}, {report['image_tokens']} image tokens of {report['prompt_tokens']}, "
        f"{report['new_tokens']} new; {label} seconds",
        f"{'side':<12}{'prefill s':>11}{'s/token':>16}{'cache MiB':>18}{'prefill GFLOP':>22}",
    ]
    for name, m in report["median"].items():
        over = report["over_untouched"][name]
        cells = [("prefill" + clock, 1, 11, 3), ("per_token" + clock, 1, 9, 4), ("cache_bytes", 2**20, 11, 2),
                 ("prefill_flops", 1e9, 15, 1)]  # fmt: skip
        text = "".join(f"{m[key] / unit:>{w}.{d}f}{over[key]:>6.2f}x" for key, unit, w, d in cells)
        lines.append(f"{name:<12}{text}")
    for k, value in report["expected"].items():
        same = report["same"][k]
        lines.append(
            f"from layer {k}: expected cache {value['cache_bytes']:.3f}x, token-layers "
            f"{value['token_layers']:.3f}x; plan and masks differ by {same['difference']:.1e} nats, "
            f"the plan's effect is {same['effect']:.2g}"
        )
    return "\n".join(lines)


def main() -> int:
    """Exit code 1: plan and masks differ."""
    parser = command.parser_of(__doc__, PREFIX, TOLERANCE, threads=1)
    parser.add_argument("--layers", type=lambda text: [int(k) for k in text.split(",")], help="4,8,10")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new", type=int, default=17, help="tokens to generate, at least 2")
    args = command.settled(parser)
    if args.new < 2:
        parser.error("--new must be at least 2")
    args.layers = args.layers or list(LAYERS[args.preset])

    report = run(args)
    return command.concluded(args, report, table(report))


if __name__ == "__main__":
    sys.exit(main())
