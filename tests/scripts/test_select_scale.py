"""scripts/select_scale.py with few rows: it runs to its end, and memory does not grow with the rows' text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "select_scale.py"
ROWS = 6000


def test_a_pool_is_scored_and_ranked_within_the_bars(tmp_path):
    arguments = ["--rows", str(ROWS), "--check", "--output", tmp_path]
    subprocess.run([sys.executable, SCRIPT, *arguments], check=True, timeout=600)
    found = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))
    assert found["rank"]["picked"] == ROWS // 5
    lines = (tmp_path / "selected.jsonl").read_bytes().splitlines()
    assert len(lines) == len(set(lines)) == ROWS // 5
    sources = [json.loads(line)["source"] for line in lines]
    assert max(map(sources.count, set(sources))) <= ROWS // 5 // 5
