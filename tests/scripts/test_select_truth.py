"""scripts/select_truth.py on a small labelled pool: what `select` must make of the phantom's world."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "select_truth.py"


@pytest.mark.slow
def test_buckets_and_wrong_labels_of_a_labelled_pool(tmp_path):
    """The bars: 95 % of image rows and of language rows, wrong labels at least three times rarer."""
    arguments = ["--rows", "1200", "--ablations", "block", "--output", tmp_path]
    subprocess.run([sys.executable, SCRIPT, *arguments], check=True, timeout=900)
    report = json.loads((tmp_path / "truth.json").read_text(encoding="utf-8"))
    found = report["forms"]["block"]
    assert found["quarantined"] == found["corrupt"] > 0
    ours = found["rules"]["ours"]
    assert ours["image_rows"] >= 0.95
    assert ours["language_rows"] == 1.0 and ours["functions"]["language"]["recall"] >= 0.95
    assert ours["image_rows"] > max(
        rule["image_rows"] for name, rule in found["rules"].items() if name != "ours"
    )
    assert found["wrong_labels"]["share_in_pool"] > 0.02
    assert found["wrong_labels"]["rarer_by"] >= 3
    assert (
        found["wrong_labels"]["flagged_of_wrong"]
        > 0.5
        > 10 * found["wrong_labels"]["flagged_of_right_printed"]
    )
