"""How `select` bears a large pool: peak memory and time, with a stand-in for the model.

    python scripts/select_scale.py --rows 1000000 --check --output DIR

Writes a JSONL of synthetic text rows, opens it as `select` does, scores it shard by shard with random numbers
in place of a model's, then ranks it and writes the selection, each in a process of its own. Peak memory is
that of the process (`resource.getrusage`). --check fails above 2 GB or above 60 s of ranking.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vfl_train.config import SelectConfig
from vfl_train.data.pool import open_pool
from vfl_train.data.rows import Rejected, Row
from vfl_train.data_select.rank import rank, with_duplicates
from vfl_train.data_select.scoring import Scores
from vfl_train.data_select.shards import read_shards, score_shards
from vfl_train.interventions.readout import Cost
from vfl_train.runs import SHARDS
from vfl_train.schemas import BUILTIN_FUNCTIONS

MOST_BYTES, MOST_SECONDS = 2e9, 60.0
STEPS = ("score", "rank")


@dataclass
class StandIn:
    """A scorer that draws its numbers; one row in a thousand is refused, one in a hundred a copy."""

    by_layer: bool = False
    rejected: list[Rejected] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Scores that depend on the row's number alone."""
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> Scores:
        rng = np.random.default_rng(row.row)
        full, *losses = rng.exponential(1.0, 1 + len(BUILTIN_FUNCTIONS)).tolist()
        per_function = dict(zip(BUILTIN_FUNCTIONS, losses, strict=True))
        deltas = {f: loss - full for f, loss in per_function.items()}
        like = np.random.default_rng(row.row - row.row % 100) if row.row % 100 == 1 else rng
        return Scores(row, 5, full, per_function, deltas, losses[0] - full, (), row.row % 50, like.bytes(32))


def write_rows(path: Path, rows: int) -> None:
    """Text rows of the usual length, from twenty sources."""

    def lines() -> Iterable[str]:
        for i in range(rows):
            turns = [{"role": "user", "content": f"What is seen in picture {i}? " + "Please say it. " * 10}]
            turns.append({"role": "assistant", "content": f"A thing with number {i * 7919 % 10007}."})
            yield json.dumps({"messages": turns, "source": f"set-{i % 20}"}) + "\n"

    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(lines())


def step(name: str, folder: Path, rows: int) -> None:
    """One step in this process; prints its seconds and peak bytes as JSON."""
    started = time.perf_counter()
    pool = open_pool(folder / "rows.jsonl")
    if name == "score":
        score_shards(pool, len(pool), StandIn(), BUILTIN_FUNCTIONS, folder / SHARDS, "stand-in")
        picked = 0
    else:
        config = SelectConfig(
            profile="none", data="none", output=folder, budget="0.2", mix="ocr=0.5,count=0.5",
            cap_per_source="0.2",
        )  # fmt: skip
        scored = with_duplicates(read_shards(folder / SHARDS, rows, BUILTIN_FUNCTIONS))
        selection = rank(config, scored, ["ocr", "count"], BUILTIN_FUNCTIONS)
        ranked = time.perf_counter() - started
        pool.write(selection.column("row")[selection.chosen].tolist(), folder / "selected.jsonl")
        picked = len(selection.chosen)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {"seconds": seconds, "peak_bytes": peak, "picked": picked}
            | ({"ranking_seconds": ranked} if name == "rank" else {})
        )
    )


def measure(folder: Path, rows: int) -> dict[str, dict[str, float]]:
    """Every step in a fresh process."""
    write_rows(folder / "rows.jsonl", rows)
    found = {}
    for name in STEPS:
        command = [sys.executable, __file__, "--step", name, "--rows", str(rows), "--output", str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Exit code 1: a bar is missed and --check was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--step", choices=STEPS, help="run this step alone, in this process")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.step:
        step(args.step, args.output, args.rows)
        return 0
    found = measure(args.output, args.rows)
    peak = max(f["peak_bytes"] for f in found.values())
    seconds = found["rank"]["ranking_seconds"]
    (args.output / "scale.json").write_text(json.dumps({"rows": args.rows, **found}, indent=1) + "\n")
    print(
        f"{args.rows} rows: peak {peak / 1e9:.2f} GB, ranked in {seconds:.1f} s, written in all "
        f"{found['rank']['seconds']:.1f} s, read and stored by one process in "
        f"{found['score']['seconds']:.0f} s"
    )
    return int(args.check and not (peak < MOST_BYTES and seconds < MOST_SECONDS))


if __name__ == "__main__":
    sys.exit(main())
