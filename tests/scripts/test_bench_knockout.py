"""scripts/bench_knockout.py at a toy size: the counts are those of the formula."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_knockout.py"


def test_the_table_says_what_is_executed():
    sizes = ["--layers", "6", "--width", "64", "--tokens", "20", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *sizes], check=True, timeout=300, capture_output=True, text=True
    )
    rows = [
        [cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line[:2] == "| "
    ]
    executed = {(kind, how): float(forwards) for _, kind, how, forwards, *_ in rows[1:]}
    assert executed["knockout", "one forward a branch"] == 7
    shared = (6 + 6 * 7 / 2) / 6 * 21 / 22  # the last token of an answer is predicted, not fed
    assert abs(executed["knockout", "shared"] - shared) < 0.06
    assert executed["knockout", "shared, tight"] > executed["knockout", "shared"]
    assert executed["rerun at the end", "shared"] < 2.05
