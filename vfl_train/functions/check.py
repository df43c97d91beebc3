"""`vfl-train probes check`: which pairs of a probe folder are unusable, and why."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console

from vfl_train.errors import DataError
from vfl_train.functions.probes import BadPair, LoadedPair, scan
from vfl_train.schemas import MIN_ANSWERED_PAIRS

if TYPE_CHECKING:
    from vfl_train.config import ProbesConfig


def check_probes(config: ProbesConfig) -> None:
    """Print counts per function and every bad line. Raises DataError (exit 3) if any pair is unusable."""
    console = Console(soft_wrap=True, highlight=False)
    usable: Counter[str] = Counter()
    bad: list[BadPair] = []
    for pair in scan(config.folder):  # one at a time: the images of a large set need not fit in memory
        if isinstance(pair, LoadedPair):
            usable[pair.pair.function] += 1
        else:
            bad.append(pair)
    total = usable.total() + len(bad)
    for name, count in usable.items():
        few = f"  (fewer than {MIN_ANSWERED_PAIRS}: not measurable)" if count < MIN_ANSWERED_PAIRS else ""
        console.print(f"{name}: {count} usable pairs{few}", markup=False)
    for line in bad:
        console.print(f"line {line.line}: {line.reason}", markup=False)
    console.print(f"{total} pairs = {usable.total()} usable + {len(bad)} unusable", markup=False)
    if bad or not usable:
        raise DataError(f"{config.folder}: {len(bad)} of {total} pairs are unusable", "mend or remove them")
