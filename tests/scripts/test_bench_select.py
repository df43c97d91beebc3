"""scripts/bench_select.py at a toy size: the sides compute the same, and the JSON says what was measured."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_select.py"


def test_all_sides_agree_and_the_sweep_executes_what_the_formula_says(tmp_path):
    output = tmp_path / "bench.json"
    arguments = ["--preset", "tiny", "--repeats", "2", "--threads", "1", "--output", output]
    subprocess.run([sys.executable, SCRIPT, *arguments], check=True, timeout=300)
    report = json.loads(output.read_text())
    sides = {"plain", "ours", "ours_deep", "naive", "gradient", "gradient_gc"}

    same = report["loss_difference"]
    assert same.keys() == (sides - {"ours", "ours_deep"}) | {"largest_effect"}
    assert same["largest_effect"] > 1e-3
    assert all(same[side] < 1e-5 for side in sides - {"ours", "ours_deep"})

    for counted in report["token_layers"].values():
        assert counted["token_layers"] == counted["formula"] and counted["reference_rows"] == 0
    deep, spread = (report["token_layers"][side]["token_layers"] for side in ("ours_deep", "ours"))
    assert deep == 2 * (30 * 2 + 6 * 2 * 6) > spread
    assert report["ratios"]["limit_naive_over_ours_deep"] == pytest.approx(7 / (1 + 6 * 6 / 30))

    median = report["seconds_median"]
    assert median.keys() == report["seconds"].keys() == sides
    assert all(median[side] == statistics.median(report["seconds"][side]["wall"]) for side in sides)
    assert report["ratios"]["naive_over_ours"] == pytest.approx(median["naive"] / median["ours"])
    assert report["ratios"]["ours_over_gradient_gc"] == pytest.approx(median["ours"] / median["gradient_gc"])
    speed = report["throughput"]
    assert speed["hours_for_665k"] == pytest.approx(665_000 / speed["samples_per_second"] / 3600)
    assert report["bars"] == []


@pytest.fixture
def bench(monkeypatch):
    """The script as a module, with its folder on the path as Python puts it there."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("bench_select")


def test_bars_are_held_to_the_most_expensive_sweep(bench):
    measured = {
        "naive_over_ours": 9.0, "naive_over_ours_deep": 4.1, "ours_deep_over_gradient_gc": 0.5,
        "ours_deep_over_gradient": 0.79,
    }  # fmt: skip
    found = {bar["what"]: bar["met"] for bar in bench.bars("cpu", measured)}
    assert found == {
        "naive_over_ours_deep": False, "ours_deep_over_gradient_gc": True, "ours_deep_over_gradient": False,
    }  # fmt: skip


def test_the_limit_of_the_bar(bench):
    shape = bench.PRESETS["cpu"]
    runs = {name: bench.Runs([1.0], [1.0]) for name in bench.SIDES}
    assert bench.ratios(runs, shape, 5)["limit_naive_over_ours_deep"] == pytest.approx(5.09, abs=0.01)


def test_disagreement_stops_the_run(bench):
    ours, other = torch.zeros(3, 1), torch.ones(1, 1)
    with pytest.raises(SystemExit, match="disagree"):
        bench.agreement({"ours": ours, "gradient": other}, tolerance=0.5)
