"""scripts/reproduce_vfl.sh in its smoke form: every command it gives a GPU user runs, on the phantom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from world_rows import world_rows, write_jsonl

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reproduce_vfl.sh"


def run(**variables: str) -> subprocess.CompletedProcess:
    """The script with this environment's vfl-train first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "120", **variables}
    return subprocess.run(
        ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_every_step_runs_on_the_phantom(tmp_path):
    data = write_jsonl(tmp_path / "textvqa.jsonl", world_rows(tmp_path, ["ocr"], seed=5))
    out = tmp_path / "out"
    result = run(
        MODEL="phantom", PAIRS="2", FUNCTIONS="emotion,ocr", DROP_FROM="11,10", TEXTVQA=str(data),
        OUTPUT=str(out),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert set(json.loads((out / "profile" / "profile.json").read_text())["functions"]) == {"emotion", "ocr"}
    for name, function in (("probes", "ocr"), ("TEXTVQA", "textvqa")):
        card = json.loads((out / f"drop-{name}" / "scorecard.json").read_text())
        left = {k: d["accuracy"] for k, d in card["functions"][function]["drop_from"].items()}
        assert left == {"11": 1.0, "10": 0.0}
    for name in ("OCRBENCH", "CHARTQA", "POPE", "SQA"):
        assert f"{name}: skipped" in result.stdout


def test_a_failing_step_stops_the_script(tmp_path):
    """Nothing after it runs, and its exit code is the script's."""
    result = run(MODEL="phantom", PAIRS="0", OUTPUT=str(tmp_path / "out"))
    assert result.returncode == 2 and "--pairs must be at least 1" in result.stderr
    assert "skipped" not in result.stdout
