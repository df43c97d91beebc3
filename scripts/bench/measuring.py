"""Time and memory of competing functions, for benchmarks."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Side = Callable[[], Any]


@dataclass
class Runs:
    """Seconds of each counted run of one side: `wall`, and `cpu` summed over threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(
    sides: dict[str, Side], repeats: int, warmup: int, device: str, often: Sequence[str] = ()
) -> dict[str, Runs]:
    """`rounds` of sides that do not time themselves."""

    def timed(side: Side) -> tuple[float, float]:
        _wait(device)
        wall, cpu = time.perf_counter(), time.process_time()
        side()
        _wait(device)
        return time.perf_counter() - wall, time.process_time() - cpu

    return rounds({name: partial(timed, side) for name, side in sides.items()}, repeats, warmup, often)


def rounds(
    sides: dict[str, Callable[[], tuple[float, float]]],
    repeats: int,
    warmup: int,
    often: Sequence[str] = (),
) -> dict[str, Runs]:
    """Seconds (wall, processor) that each side returns. Every round runs all sides, so that what slows the
    machine for a while slows all of them; the short ones named in `often` run before each of the others,
    which gives them as much of that while."""
    runs = {name: Runs() for name in sides}
    for turn in range(-warmup, repeats):
        for name in _order(list(sides), often, turn):
            wall, cpu = sides[name]()
            if turn >= 0:
                runs[name].wall.append(wall)
                runs[name].cpu.append(cpu)
        print(f"round {turn + 1} of {repeats}", file=sys.stderr, flush=True)
    return runs


def _order(names: list[str], often: Sequence[str], turn: int) -> list[str]:
    """The sides of one round; each round begins with another one."""
    others = [name for name in names if name not in often]
    if not others:
        return list(often)
    start = turn % len(others)
    return [name for other in others[start:] + others[:start] for name in (*often, other)]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(run: Side, device: str) -> int:
    """The most bytes of tensors that were alive at one time during `run` beyond those before it: every
    allocation and release, workspace inside operators included. CPU: from the profiler's record of the
    allocator; CUDA: from the caching allocator's counters."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def hardware(device: str) -> str:
    """The processor in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def agreement(
    results: dict[str, torch.Tensor], tolerance: float, ours: Sequence[str] = ("ours",)
) -> dict[str, float]:
    """Largest difference in nats between ours [branches, ...] (the first side so named) and each other side
    (its first branches), and the largest effect of a branch for comparison (without one, agreement would
    mean nothing). Raises SystemExit beyond `tolerance`."""
    mine = results[ours[0]]
    different = {
        name: float((mine[: len(r)] - r).abs().max()) for name, r in results.items() if name not in ours
    }
    if max(different.values()) > tolerance:
        raise SystemExit(f"the sides disagree by more than {tolerance} nats: {different}")
    return different | {"largest_effect": float((mine[1:] - mine[:1]).abs().max())}


def medians(runs: dict[str, Runs]) -> tuple[dict[str, float], dict[str, float]]:
    """(wall, processor) seconds of each side."""
    return (
        {name: statistics.median(each.wall) for name, each in runs.items()},
        {name: statistics.median(each.cpu) for name, each in runs.items()},
    )
