"""scripts/reproduce_lora.sh in its smoke form: every command it gives a GPU user runs, on the phantom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from world_rows import world_rows, write_jsonl

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reproduce_lora.sh"


@pytest.mark.slow
def test_every_step_runs_on_the_phantom(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", world_rows(tmp_path, ["ocr"] * 4, seed=5))
    out = tmp_path / "out"
    variables = {
        "MODEL": "phantom", "DATA": str(data), "CVBENCH": str(data), "LAYERS": "9-10", "PAIRS": "2",
        "ARMS": "vfl reversed", "STEPS": "1", "ROWS_A_STEP": "4", "ROWS_A_DEVICE": "2", "OUTPUT": str(out),
    }  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", str(SCRIPT)], env={**os.environ, "PATH": path, **variables}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    trained = {
        arm: json.loads((out / f"lora-{arm}" / "plan.json").read_text()) for arm in ("vfl", "reversed")
    }
    assert trained["vfl"]["layers"] == [9, 10] and trained["vfl"]["control"] is None
    assert trained["reversed"]["layers"] == [0, 1] and trained["reversed"]["control"] == "reversed"
    for arm in trained:
        card = json.loads((out / f"probes-{arm}" / "scorecard.json").read_text())
        assert len(card["functions"]) == 6 and card["functions"]["ocr"]["base_accuracy"] == 1.0
        card = json.loads((out / f"cvbench-{arm}" / "scorecard.json").read_text())
        assert card["functions"]["rows"]["n"] == 4
        assert not (out / f"chartqa-{arm}").exists()


def test_without_data_it_says_so():
    result = subprocess.run(
        ["bash", str(SCRIPT)], env={k: v for k, v in os.environ.items() if k != "DATA"}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode != 0 and "give the training rows as DATA=FILE" in result.stderr
