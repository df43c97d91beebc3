"""scripts/bench_kernel.py at a toy size: every way that a CPU has is right and reported, and the bars are
read off the right figures."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_kernel.py"


@pytest.fixture
def bench(monkeypatch):
    """The script as a module, with its folder on the path as Python puts it there."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("bench_kernel")


@pytest.mark.slow
def test_every_way_is_right(tmp_path):
    output = tmp_path / "bench.json"
    arguments = ["--preset", "toy", "--device", "cpu", "--repeats", "1", "--output", output]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SCRIPT, *arguments], check=True, timeout=300, env=environment)
    report = json.loads(output.read_text())
    assert report["triton"] == "interpreted" and report["bars"] == []
    assert report["results"].keys() == {"Q1", "Q2", "Q1b"}
    found = {
        (workload, way)
        for shape in report["results"].values()
        for workload, times in shape.items()
        for way, t in times.items()
        if t["error"] < 1e-5 and t["eager"] > 0
    }
    assert found == {
        *(("plain", way) for way in ("triton", "torch", "two_calls_cpu", "two_calls_cpu.packed")),
        *(("sweep", way) for way in ("triton", "torch", "masked", "flex_flattened.0", "flex_by_row.0")),
        ("dropped", "triton"), ("swapped", "triton"),
    }  # fmt: skip
    assert not any("failed" in t for s in report["results"].values() for w in s.values() for t in w.values())


def test_a_wrong_result_is_not_timed(bench, monkeypatch):
    """A peer's is reported; ours stops the run."""
    attention = importlib.import_module("bench.attention")
    args = bench.argparse.Namespace(dtype="float32", device="cpu", preset="toy", repeats=1)

    def wrong(*_):
        return lambda: torch.zeros(6, 6, 5, 16)

    monkeypatch.setattr(bench, "masked", wrong)
    monkeypatch.setattr(bench.triton_path, "interpreted", lambda: False)
    results = bench.measure("Q1", bench.TOY["Q1"], args, float("inf"))
    assert "relative error 1" in results["sweep"]["masked"]["failed"]
    assert "eager" not in results["sweep"]["masked"] and "eager" in results["sweep"]["torch"]
    monkeypatch.setattr(bench, "ours", wrong)
    with pytest.raises(RuntimeError, match="relative error"):
        bench.measure("Q1", bench.TOY["Q1"], args, float("inf"))
    assert attention.ours is not wrong


def test_time_that_is_up_skips_peers_only(bench):
    args = bench.argparse.Namespace(dtype="float32", device="cpu", preset="toy", repeats=1)
    results = bench.measure("Q2", bench.TOY["Q2"], args, deadline=0.0)
    assert results["sweep"]["masked"] == {"failed": "no time left"}
    if "triton" in results["sweep"]:
        assert results["sweep"]["triton"]["eager"] > 0


def test_bars_take_the_best_peer_and_graphs(bench):
    def t(graph):
        return {"graph": graph, "eager": 9.0, "error": 0.0}

    sweep = {"triton": t(1e-4), "masked": t(8e-4), "masked_cudnn": t(6e-4), "flex_flattened.0": t(2e-4),
             "flex_flattened.tuned": t(1.1e-4), "flex_by_row.1": {"failed": "no time left"}}  # fmt: skip
    plain = {"triton": t(1.0e-4), "two_calls_flash": t(1.2e-4), "two_calls_cudnn": t(0.9e-4)}
    results = {"Q1": {"plain": plain, "sweep": sweep}, "Q2": {"sweep": sweep}}
    found = {bar["id"]: bar for bar in bench.bars(bench.SHAPES, results)}
    expected = {"K1": 6.0, "K2": 1.1, "K3": 0.9, "K5": 1.1}
    assert {i: found[i]["measured"] for i in expected} == pytest.approx(expected)
    assert found["K6"]["measured"] == pytest.approx(82.5e9 / 0.78e15 / 1e-4, rel=0.01)
    met = {"K1": True, "K2": False, "K3": False, "K4": None, "K5": False, "K6": True, "K7": None, "K8": None}
    assert {i: bar["met"] for i, bar in found.items()} == met


def test_a_graph_is_compared_with_graphs_only(bench):
    """A peer that could not be captured runs against ours without a graph; the smallest ratio counts."""
    ours = {"graph": 1e-4, "eager": 3e-4, "error": 0.0}
    peers = {"masked": {"eager": 6e-4}, "masked_cudnn": {"graph": 4e-4, "eager": 5e-4}}
    sweep = {"triton": ours, **peers}
    found = {bar["id"]: bar for bar in bench.bars(bench.SHAPES, {"Q1": {"sweep": sweep}})}
    assert (found["K1"]["measured"], found["K1"]["as"]) == (pytest.approx(2.0), "eager")
    del sweep["masked"]
    found = {bar["id"]: bar for bar in bench.bars(bench.SHAPES, {"Q1": {"sweep": sweep}})}
    assert (found["K1"]["measured"], found["K1"]["as"]) == (pytest.approx(4.0), "graph")
    assert found["K2"]["as"] is None and found["K2"]["met"] is None


def test_shapes_are_those_of_the_bars(bench):
    """FLOPs and bytes of the table the bars come from, G = 1e9."""
    flops = {"Q1": 82.5, "Q1b": 202, "Q1c": 198, "Q1d": 21.5, "Q2": 13.3, "Q3": 143, "Q4": 54.6}
    assert {n: s.flops / 1e9 for n, s in bench.SHAPES.items()} == pytest.approx(flops, rel=0.01)
    assert bench.SHAPES["Q1"].bytes() == pytest.approx(162e6, rel=0.01)
    assert bench.SHAPES["Q2"].replicated_bytes() == pytest.approx(1.9e9, rel=0.02)
