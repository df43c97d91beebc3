"""The fused kernel against every other way to compute it, in one process on the same tensors.

    python scripts/bench_kernel.py --output bench.json                  # one H200: within ten minutes
    TRITON_INTERPRET=1 python scripts/bench_kernel.py --preset toy --device cpu --output bench.json

The ways (scripts/bench/attention.py), each at its best:

triton, torch     ours; torch is the path without triton
masked, _cudnn    a copy of the prefix for each row, repeat_kv, a mask: transformers' sdpa path, by
                  PyTorch's choice of kernel and by cuDNN's
two_calls_flash,  all rows against the prefix, each row's suffix, merged by a compiled function; for plain
two_calls_cudnn   rows alone; .packed: with the query heads of a key head as one dimension
flex_flattened    FlexAttention, the rows of an image one sequence; at the shapes that bars are held to with
                  several kernel options and max-autotune, of which the best counts
flex_by_row       FlexAttention, a batch of rows

Nothing is timed unless its result is right: relative error to float64 below 1e-2 (16 bit) or 1e-5. Inputs
rotate through more memory than the second-level cache holds. A time is the median of rounds that begin with
another way each; `graph` replays a CUDA graph, `eager` counts what the host adds. What fails or finds no time
is reported as such; ours must not.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from bench.attention import (
    Inputs,
    Run,
    Shape,
    exact,
    flex_by_row,
    flex_flattened,
    make_inputs,
    masked,
    ours,
    two_calls,
)
from bench.command import save
from bench.measuring import hardware
from torch.nn.attention import SDPBackend

from vfl_train.kernels.vision_kv import configs, triton_path

CACHE = 64 << 20  # bytes; the H200's second level has 60 MB
PEAK = 0.78e15  # FLOP/s of a large bf16 product on an H200, measured
# Q1 Qwen2.5-VL-7B, its top layer in a sweep; Q1b more image; Q1c Qwen3-VL-8B; Q1d 0.5B; Q2 last token alone;
# Q3 selection; Q4 LLaVA-1.5. The gated ones first: time may run out.
SHAPES = {
    "Q1": Shape(8, 29, 40, 600, 576, 28, 4, 128),
    "Q2": Shape(16, 29, 1, 2000, 1940, 28, 4, 128),
    "Q1b": Shape(8, 29, 40, 1500, 1440, 28, 4, 128),
    "Q1c": Shape(8, 37, 40, 1000, 960, 32, 8, 128),
    "Q3": Shape(16, 6, 150, 620, 576, 28, 4, 128),
    "Q4": Shape(4, 33, 40, 611, 576, 32, 32, 128),
    "Q1d": Shape(8, 25, 40, 730, 700, 14, 2, 64),
}
TOY = {
    "Q1": Shape(2, 3, 5, 40, 33, 6, 2, 16),
    "Q2": Shape(2, 4, 1, 60, 50, 6, 2, 16),
    "Q1b": Shape(2, 2, 3, 60, 52, 4, 2, 16),
}
OPTIONS = (
    {},
    {"num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 3, "num_warps": 8},
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_stages": 2, "num_warps": 8},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 3, "num_warps": 4},
)
Build = Callable[[Shape, Inputs, str], Run]


def ways(name: str, device: str, dtype: torch.dtype) -> dict[str, tuple[Build, tuple[str, ...]]]:
    """For a shape: each way and the workloads it is timed on. `name` decides how much the peers are tuned."""
    gated, cuda = name in ("Q1", "Q2"), device.startswith("cuda")
    mine = ("plain", "sweep", "dropped", "swapped") if name == "Q1b" else ("plain", "sweep")
    found: dict[str, tuple[Build, tuple[str, ...]]] = {}
    if cuda or triton_path.interpreted():
        found["triton"] = partial(ours, "triton"), mine
    found["torch"] = partial(ours, "torch"), ("plain", "sweep")
    if cuda:
        for kind in ("cudnn", "flash"):
            found[f"two_calls_{kind}"] = partial(two_calls, kind, False), ("plain",)
            found[f"two_calls_{kind}.packed"] = partial(two_calls, kind, True), ("plain",)
    else:
        found["two_calls_cpu"] = partial(two_calls, "cpu", False), ("plain",)
        found["two_calls_cpu.packed"] = partial(two_calls, "cpu", True), ("plain",)
    found["masked"] = partial(masked, None), ("sweep",)
    if cuda and dtype != torch.float32:
        found["masked_cudnn"] = partial(masked, SDPBackend.CUDNN_ATTENTION), ("sweep",)
    for layout, build in (("flattened", flex_flattened), ("by_row", flex_by_row)):
        if layout == "by_row" and name != "Q2":  # no bar is held to it elsewhere
            continue
        for number, options in enumerate(OPTIONS if gated and cuda else OPTIONS[1:2]):
            found[f"flex_{layout}.{number}"] = partial(build, options, False), ("sweep",)
        if gated and cuda:
            found[f"flex_{layout}.tuned"] = partial(build, {}, True), ("sweep",)
    return found


def seconds(sides: dict[str, list[Run]], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Median seconds of one run of each side, eager and in a graph; each round begins with another side."""
    timers: dict[tuple[str, str], Callable[[], float]] = {}
    for name, runs in sides.items():
        timers[name, "eager"] = partial(_timed, runs, device)
        if (
            device.startswith("cuda") and name != "torch"
        ):  # the torch path makes its index tensors at each call
            try:
                timers[name, "graph"] = partial(_timed, [_graph(runs)], device, len(runs))
            except Exception as e:  # a peer that cannot be captured is reported without a graph
                if name == "triton":
                    raise
                print(f"  {name}: no graph: {_one_line(e)}", file=sys.stderr)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in timers}
    keys = list(timers)
    for turn in range(-2, repeats):
        first = turn % len(keys)
        for key in [*keys[first:], *keys[:first]]:
            spent = timers[key]()
            if turn >= 0:
                samples[key].append(spent)
    found: dict[str, dict[str, float]] = {name: {} for name in sides}
    for (name, how), values in samples.items():
        found[name][how] = statistics.median(values)
    return found


def _timed(runs: list[Run], device: str, each: int = 1) -> float:
    """Seconds of one of `runs`, which hold `each` runs."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - start) / len(runs) / each
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for run in runs:
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / len(runs) / each


def _graph(runs: list[Run]) -> Run:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run() for run in runs]

    def replay() -> torch.Tensor:
        graph.replay()
        return kept[-1]

    return replay


def measure(name: str, shape: Shape, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """All ways on one shape: {workload: {way: {eager, graph, error} or {failed}}}. Raises RuntimeError if
    ours is wrong."""
    dtype = getattr(torch, args.dtype)
    sets = max(2, min(6, -(-2 * CACHE // shape.bytes(dtype.itemsize)))) if args.preset != "toy" else 2
    inputs = [make_inputs(shape, dtype, args.device, seed) for seed in range(sets)]
    tolerance = 1e-2 if dtype.itemsize == 2 else 1e-5
    found: dict[str, Any] = {}
    for workload in ("plain", "sweep", "dropped", "swapped"):
        chosen = {n: b for n, (b, w) in ways(name, args.device, dtype).items() if workload in w}
        if not chosen:
            continue
        right = exact(shape, inputs[0], workload)
        sides: dict[str, list[Run]] = {}
        results: dict[str, dict[str, Any]] = {}
        for way, build in chosen.items():
            if time.perf_counter() > deadline and way != "triton":
                results[way] = {"failed": "no time left"}
                continue
            try:
                runs = [build(shape, each, workload) for each in inputs]
                out, *_ = [run() for run in runs]
                results[way] = {"error": float((out.double() - right).norm() / right.norm())}
                if not results[way]["error"] < tolerance:
                    raise RuntimeError(f"relative error {results[way]['error']:.2g}")
                sides[way] = runs
            except Exception as e:  # a peer that fails here is reported, and not timed
                if way in ("triton", "torch"):
                    raise
                results[way] = {"failed": _one_line(e)}
        for way, times in seconds(sides, args.repeats, args.device).items():
            results[way] |= times
        found[workload] = results
        if args.device.startswith("cuda"):
            del sides
            torch.cuda.empty_cache()
    return found


def best(
    times: dict[str, dict[str, Any]], names: tuple[str, ...], own: dict[str, Any]
) -> tuple[float, str] | None:
    """How many times as long as `own` the fastest way takes whose name begins with one of `names`, and as
    what both ran: a graph against a graph where both are one, else eager against eager."""
    found = []
    for name, t in times.items():
        how = "graph" if "graph" in t and "graph" in own else "eager"
        if name.split(".")[0] in names and how in t and how in own:
            found.append((t[how] / own[how], how))
    return min(found, default=None)


def bars(shapes: dict[str, Shape], results: dict[str, Any]) -> list[dict[str, Any]]:
    """K1 to K8 of the shapes that were measured. K6 is a share of the chip's measured peak."""

    def ratio(
        shape: str, workload: str, over: tuple[str, ...], under: str = "sweep"
    ) -> tuple[float, str] | None:
        times = results.get(shape, {})
        return best(times.get(workload, {}), over, times.get(under, {}).get("triton", {}))

    mine = results.get("Q1", {}).get("plain", {}).get("triton", {})
    how = next((each for each in ("graph", "eager") if each in mine), None)
    share = (shapes["Q1"].flops / PEAK / mine[how], how) if how else None
    two = ("two_calls_flash", "two_calls_cudnn")
    wanted = [
        ("K1", "masked / ours, Q1", ">=", 5.0, ratio("Q1", "sweep", ("masked", "masked_cudnn"))),
        ("K2", "flex flattened / ours, Q1", ">=", 1.2, ratio("Q1", "sweep", ("flex_flattened",))),
        ("K3", "two calls and merge / ours, Q1", ">=", 1.0, ratio("Q1", "plain", two, "plain")),
        ("K4", "flex by row / ours, Q2", ">=", 20.0, ratio("Q2", "sweep", ("flex_by_row",))),
        ("K5", "flex flattened / ours, Q2", ">=", 3.0, ratio("Q2", "sweep", ("flex_flattened",))),
        ("K6", "share of peak, Q1", ">=", 0.40, share),
        ("K7", "all dropped / none, Q1b", "<=", 0.15, ratio("Q1b", "dropped", ("triton",), "plain")),
        ("K8", "all swapped / none, Q1b", "<=", 1.05, ratio("Q1b", "swapped", ("triton",), "plain")),
    ]
    return [
        {"id": i, "what": what, "bar": f"{sign} {bar:g}", "measured": found[0] if found else None,
         "as": found[1] if found else None,
         "met": (found[0] >= bar if sign == ">=" else found[0] <= bar) if found else None}
        for i, what, sign, bar, found in wanted
    ]  # fmt: skip


def tune(shapes: dict[str, Shape], args: argparse.Namespace) -> dict[str, Any]:
    """Ours at other block sizes, warps and stages; microseconds by shape. Only of the largest tile."""
    found: dict[str, Any] = {}
    dtype = getattr(torch, args.dtype)
    before = dict(configs.FORWARD)
    for name, shape in shapes.items():
        key = dtype.itemsize, max(64, configs.block_d(shape.width))
        inputs, found[name] = [make_inputs(shape, dtype, args.device, seed) for seed in range(3)], {}
        for m, n in ((64, 64), (64, 128), (128, 32), (128, 64), (128, 128)):
            for warps, stages in ((4, 2), (4, 3), (4, 4), (8, 2), (8, 3), (8, 4)):
                config = configs.Config(m, n, warps, stages)
                configs.FORWARD = {**before, key: (config,)}
                triton_path._plan.cache_clear()
                try:
                    runs = [ours("triton", shape, each, "sweep") for each in inputs]
                    for run in runs:
                        run()
                    times = seconds({"triton": runs}, 10, args.device)["triton"]
                    found[name][str(tuple(config))] = times.get("graph", times["eager"]) * 1e6
                except Exception as e:  # does not fit the chip
                    found[name][str(tuple(config))] = _one_line(e)
        configs.FORWARD = before
        triton_path._plan.cache_clear()
        fits = {c: t for c, t in found[name].items() if isinstance(t, float)}
        for config, spent in sorted(fits.items(), key=lambda item: item[1])[:5]:
            print(f"{name} {config}: {spent:.1f} us", flush=True)
    return found


def table(shapes: dict[str, Shape], results: dict[str, Any]) -> str:
    """Microseconds, graph and eager, by shape, workload and way."""
    lines = [f"{'shape':<6}{'rows':<9}{'way':<20}{'graph us':>11}{'eager us':>11}{'TFLOP/s':>9}{'error':>10}"]
    for name, by_workload in results.items():
        for workload, times in by_workload.items():
            for way, t in times.items():
                head = f"{name:<6}{workload:<9}{way:<20}"
                if "failed" in t:
                    lines.append(f"{head}  {t['failed']}")
                    continue
                graph, eager = (f"{t[k] * 1e6:11.1f}" if k in t else f"{'-':>11}" for k in ("graph", "eager"))
                rate = shapes[name].flops / t.get("graph", t["eager"]) / 1e12
                speed = f"{rate:9.1f}" if workload == "plain" else f"{'':>9}"
                lines.append(f"{head}{graph}{eager}{speed}{t['error']:10.1e}")
    return "\n".join(lines)


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:90] if text else ''}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@torch.no_grad()
def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the JSON."""
    start = time.perf_counter()
    shapes = {n: s for n, s in (TOY if args.preset == "toy" else SHAPES).items() if n in args.shapes}
    how = "interpreted" if triton_path.interpreted() else "compiled" if triton_path.compiled() else None
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(args.device),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("vfl-train", "torch", "triton")},
        "cuda": torch.version.cuda, "preset": args.preset, "dtype": args.dtype, "repeats": args.repeats,
        "triton": how,
        "shapes": {
            name: asdict(s)
            | {"flops": s.flops, "bytes": s.bytes(), "row_replicated_bytes": s.replicated_bytes()}
            for name, s in shapes.items()
        },
    }  # fmt: skip
    if args.tune:
        return report | {"tune": tune(shapes, args)}
    results: dict[str, Any] = {}
    for name, shape in shapes.items():
        results[name] = measure(name, shape, args, start + args.minutes * 60)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return report | {"results": results, "bars": [] if args.preset == "toy" else bars(shapes, results)}


def main() -> int:
    """Exit code 1: --check and a bar is missed or could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=["h200", "toy"], default="h200")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16; toy: float32"
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), type=lambda text: text.split(","))
    parser.add_argument("--repeats", type=int, default=20, help="rounds that count")
    parser.add_argument(
        "--minutes", type=float, default=8, help="after these, peers that are left are skipped"
    )
    parser.add_argument("--tune", action="store_true", help="time other configurations of ours instead")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every bar is met")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.preset == "toy" else "bfloat16")
    if unknown := set(args.shapes) - set(SHAPES):
        parser.error(f"no shape {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    if args.check and (args.repeats < 20 or args.preset == "toy"):
        parser.error("--check needs the preset h200 and at least 20 repeats")

    report = bench(args)
    save(report, args.output)
    if args.tune:
        return 0
    print(f"{report['hardware']}, {args.dtype}, {report['versions']}, {report['date']}")
    print(table(TOY if args.preset == "toy" else SHAPES, report["results"]))
    for bar in report["bars"]:
        value = "not measured" if bar["measured"] is None else f"{bar['measured']:.3f}"
        verdict = {True: "met", False: "MISSED", None: "open"}[bar["met"]]
        print(
            f"{bar['id']:<4}{bar['what']:<34}{value:>14} {bar['as'] or '':<6} bar {bar['bar']:<8} {verdict}"
        )
    return int(args.check and not all(bar["met"] for bar in report["bars"]))


if __name__ == "__main__":
    sys.exit(main())
