"""scripts/bench_train.py at a toy size: the sides train the same thing, visit what they should, and the JSON
says what was measured."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_train.py"
SIDES = ["trl", "all", "all_supervised", "ours", "ours_recomputed", "cached"]


def test_a_toy_run_of_all_sides(tmp_path):
    output = tmp_path / "bench.json"
    arguments = ["--shape", "tiny", "--repeats", "2", "--warmup", "0", "--threads", "1"]
    subprocess.run([sys.executable, SCRIPT, *arguments, "--output", output], check=True, timeout=300)
    report = json.loads(output.read_text())

    assert list(report["seconds"]) == SIDES
    for side, runs in report["seconds"].items():
        assert len(runs["wall"]) == len(runs["cpu"]) == 2
        assert report["seconds_median"][side] == statistics.median(runs["wall"])
        assert report["peak_bytes"][side] > 0
    ratio = report["seconds_median"]["all"] / report["seconds_median"]["cached"]
    assert report["ratios"]["all_over_cached"] == pytest.approx(ratio)
    assert max(report["loss_difference"].values()) < 1e-4 and "cached_to_ours" in report["loss_difference"]

    def visits(side: str) -> tuple[int, ...]:
        """Of four decoder layers (layer 2 adapted) and two vision blocks, a step."""
        names = ("layers_forward", "layers_backward", "vision_forward", "vision_backward")
        return tuple(report["per_step"][side].get(name, 0) for name in names)

    assert visits("trl") == (8, 4, 4, 2)  # what its defaults do
    assert visits("all") == (4, 4, 2, 0)
    assert visits("all_supervised") == (4, 4, 2, 0)
    assert visits("ours") == (4, 2, 2, 0)
    assert visits("ours_recomputed") == (6, 2, 2, 0)
    assert visits("cached") == (2, 2, 0, 0)
    saved = {side: report["per_step"][side]["saved_bytes"] for side in SIDES}
    assert saved["ours_recomputed"] < saved["ours"] < saved["all_supervised"] < saved["all"]


@pytest.fixture
def bench(monkeypatch):
    """The script as a module, with its folder on the path as Python puts it there."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("bench_train")


def test_the_unit_model_is_that_of_the_reference(bench):
    """Qwen2.5-VL-7B, T = 700, 15 % supervised, layers from 20 of 28: V = 9.6, H = 0.35, partial 46.3, cached
    16.7; 1.43x and 3.97x against all layers, 2.45x against TRL's default."""
    shape = bench.SHAPES["7b"]
    assert (shape.tokens, shape.lowest) == (700, 20)
    assert bench.units(shape) == pytest.approx({"V": 9.6, "H": 0.35}, rel=0.03)
    steps = bench.predicted(shape)
    assert steps["ours"] == pytest.approx(46.3, rel=0.01) and steps["cached"] == pytest.approx(16.7, rel=0.01)
    found = bench.ratios(steps)
    assert found["all_over_ours"] == pytest.approx(1.43, abs=0.01)
    assert found["all_over_cached"] == pytest.approx(3.97, abs=0.02)
    assert found["trl_over_ours"] == pytest.approx(2.45, abs=0.01)


@pytest.mark.parametrize("shape", ["cpu", "7b"])
def test_bars_leave_room_below_the_unit_model(bench, shape):
    sizes = bench.SHAPES[shape]
    expected = bench.ratios(bench.predicted(sizes)) | {
        "saved_ours_over_all": (sizes.layers - sizes.lowest) / sizes.layers
    }
    found = bench.bars(shape, expected, expected)
    assert len(found) == len(bench.BARS[shape]) and all(bar["met"] for bar in found)
    tower = bench.units(sizes)["V"]
    assert tower == pytest.approx(sizes.layers / 3, rel=0.1)  # as Qwen2.5-VL-7B's


def test_bars(bench):
    measured = {"trl_over_ours": 1.89, "all_over_ours": 1.25, "all_over_cached": 2.4}
    found = {bar["what"]: bar["met"] for bar in bench.bars("cpu", measured, measured)}
    assert found == {"trl_over_ours": False, "all_over_ours": True, "all_over_cached": False}


def test_disagreement_stops_the_run(bench):
    sides = {
        "ours": SimpleNamespace(losses=[2.0, 1.5]),
        "cached": SimpleNamespace(losses=[2.0, 1.4]),
    }
    with pytest.raises(SystemExit, match="disagree"):
        bench.agreement(sides, tolerance=1e-4)
    sides["cached"].losses[1] = 1.5
    assert max(bench.agreement(sides, tolerance=1e-4).values()) == 0
    sides["ours"].losses[0] = 1.9
    with pytest.raises(SystemExit, match="disagree"):
        bench.agreement(sides, tolerance=1e-4)
