"""scripts/in_context.py on the phantom, which has never seen two images: examples confuse it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from vfl_train.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "scripts" / "in_context.py"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the script; returns its table's rows and its record."""
    spec = importlib.util.spec_from_file_location("in_context", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*arguments: str) -> tuple[list[str], dict]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(tmp_path), *arguments])
        script.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| count")]
        return lines, json.loads((tmp_path / "in_context.json").read_text(encoding="utf-8"))

    return call


def test_examples_mislead_the_phantom_where_it_counts(run):
    """Count is read at layer 5: without the examples' images from there on the answers are right again, from
    the layer after it on nothing changes, and without the question's image they are not."""
    lines, record = run("--functions", "count", "--drop-from", "6,5", "--pairs", "4", "--shots", "0,1")
    alone, with_one = ({k: v["accuracy"] for k, v in record["functions"]["count"][s].items()} for s in "01")
    assert alone == {"untouched": 1.0, "6 all": 1.0, "5 all": 0.0}
    assert with_one["5 examples"] == 1.0 > with_one["untouched"]
    assert {with_one[f"6 {whose}"] for whose in ("all", "examples", "question")} == {with_one["untouched"]}
    assert with_one["5 question"] < 0.5
    assert [line.count("|") for line in lines] == [5] * 7 and "| - |" in lines[2]
    assert 0 < record["reference_rows"] < record["rows"]


def test_more_examples_than_there_are_is_refused(run):
    with pytest.raises(ConfigError, match="9 examples, but 4 questions"):
        run("--functions", "count", "--drop-from", "5", "--pairs", "4", "--shots", "9")
