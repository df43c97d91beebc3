"""What the benchmarks share around what they measure: options, the head of the report, bars, the file."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench.measuring import hardware

from vfl_train.cpu import keep_freed_memory

REPEATS_TO_CHECK = 7  # a median of fewer rounds decides nothing


def parser_of(
    text: str | None, presets: Iterable[str], dtypes: Iterable[str], repeats: int = 7, threads: int = 2
) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; `--check` is its bars' own (`add_check`)."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", "--shape", choices=list(presets), default="cpu")
    parser.add_argument("--device", help="default: cuda for 7b, else cpu")
    parser.add_argument("--dtype", choices=list(dtypes), help="default: bfloat16 for 7b")
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not, after a first run of each")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.set_defaults(check=False)
    return parser


def add_check(parser: argparse.ArgumentParser) -> None:
    """`--check`, for a benchmark with bars."""
    text = f"exit with 1 if a bar is missed; needs at least {REPEATS_TO_CHECK} repeats"
    parser.add_argument("--check", action="store_true", help=text)


def add_sizes(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Options that replace sizes of the preset."""
    for name in names:
        parser.add_argument(f"--{name}", type=int, help="default: the preset's")


def names_in(known: Collection[str], text: str) -> list[str]:
    """The names of `a,b`. Raises argparse's error for one that is not `known`."""
    names = text.split(",")
    if unknown := sorted(set(names) - set(known)):
        raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def settled(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments with device and dtype filled in; the threads are set."""
    args = parser.parse_args()
    if args.check and args.repeats < REPEATS_TO_CHECK:
        parser.error(f"--check needs at least {REPEATS_TO_CHECK} repeats")
    large = args.preset == "7b"
    args.device = args.device or ("cuda" if large else "cpu")
    args.dtype = args.dtype or ("bfloat16" if large else "float32")
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    return args


def circumstances(args: argparse.Namespace, packages: Iterable[str]) -> dict[str, Any]:
    """When, on what and with which versions of `packages` it was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(args.device),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "dtype": args.dtype,
    }


def held_to(bars: Iterable[tuple[str, str, float]], measured: dict[str, float]) -> list[dict[str, Any]]:
    """The bars (what, `>=` or `<=`, bar) that what was measured can be held to."""
    out = []
    for what, sign, bar in bars:
        if (value := measured.get(what)) is not None:
            met = value >= bar if sign == ">=" else value <= bar
            out.append({"what": what, "bar": f"{sign} {bar:.4g}", "measured": value, "met": met})
    return out


def bar_lines(report: dict[str, Any]) -> list[str]:
    """The report's bars, a line each."""
    return [
        f"{bar['what']:<28}{bar['measured']:>8.3f}  bar {bar['bar']:<10}{'met' if bar['met'] else 'MISSED'}"
        for bar in report["bars"]
    ]


def save(report: dict[str, Any], path: Path) -> None:
    """Write the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def concluded(args: argparse.Namespace, report: dict[str, Any], text: str) -> int:
    """Save the report and print `text`. Returns the exit code, 1: a bar is missed and --check was given."""
    save(report, args.output)
    print(text)
    return int(args.check and not all(bar["met"] for bar in report["bars"]))
