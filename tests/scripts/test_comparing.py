"""scripts/bench/comparing.py and tables.py: runs are kept one by one and found again; tables in Markdown."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def module(monkeypatch):
    """A module of scripts/bench by name, with the scripts' folder on the path as Python puts it there."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return lambda name: importlib.import_module(f"bench.{name}")


def test_runs_that_stand_in_the_output_are_found_again(module, tmp_path):
    comparing = module("comparing")
    words = ["--profile", "p.json", "--seeds", "2,3", "--output", str(tmp_path / "out")]
    arguments = comparing.parser_of("").parse_args(words)
    assert arguments.seeds == [2, 3]
    first = comparing.Comparison(arguments)
    assert first.runs == []
    first.add({"arm": "vfl", "seed": 2})
    assert comparing.Comparison(arguments).runs == [{"arm": "vfl", "seed": 2}]
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert found == {"model": "phantom", "function": "ocr", "runs": [{"arm": "vfl", "seed": 2}]}


def test_tables(module):
    tables = module("tables")
    rows = [["vfl", tables.mean_and_each([1.0, 2.04])], ["none", tables.mean_and_each([])]]
    assert tables.markdown(["arm", "gain"], rows) == [
        "| arm | gain |", "|---|---|", "| vfl | 1.5 (1.0, 2.0) |", "| none | - |"
    ]  # fmt: skip
