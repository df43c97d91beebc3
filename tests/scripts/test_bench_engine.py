"""scripts/bench_engine.py at a toy size: the sides compute the same, and the JSON says what was measured."""

from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_engine.py"
no_nnsight = pytest.mark.skipif(
    importlib.util.find_spec("nnsight") is None, reason="the extra `bench` is not installed"
)


@pytest.mark.parametrize("peers", ["naive", pytest.param("nnsight,nnsight_skip", marks=no_nnsight)])
def test_all_sides_agree_and_the_engine_executes_what_the_formula_says(peers, tmp_path):
    output = tmp_path / "bench.json"
    arguments = ["--preset", "tiny", "--peers", peers, "--repeats", "3", "--threads", "1"]
    subprocess.run([sys.executable, SCRIPT, *arguments, "--output", output], check=True, timeout=300)
    report = json.loads(output.read_text())
    sides = {"plain", "ours", *peers.split(",")}

    same = report["logprob_difference"]
    assert same.keys() == (sides - {"ours"}) | {"largest_effect"}
    assert same["largest_effect"] > 1e-2
    assert all(same[side] < 1e-5 for side in sides - {"ours"})

    assert report["token_layers"]["token_layers"] == report["token_layers"]["formula"]
    assert report["token_layers"]["reference_rows"] == 0
    assert report["limits"]["ours_over_plain"] == pytest.approx(1 + 6 * (3 + 1) / (2 * (24 + 6)))

    assert report["seconds"].keys() == report["seconds_median"].keys() == sides
    for side, runs in report["seconds"].items():
        often = len(peers.split(",")) if side in ("plain", "ours") else 1  # once before each peer
        assert len(runs["wall"]) == len(runs["cpu"]) == 3 * often
        assert report["seconds_median"][side] == statistics.median(runs["wall"])
    for peer in peers.split(","):
        ratio = report["seconds_median"][peer] / report["seconds_median"]["ours"]
        assert report["ratios"][f"{peer}_over_ours"] == pytest.approx(ratio)


@pytest.fixture
def bench(monkeypatch):
    """The script as a module, with its folder on the path as Python puts it there."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("bench_engine")


def test_bars(bench):
    measured = {"naive_over_ours": 7.7, "of_limit": 0.85, "extra_over_replicated": 0.2}
    found = {bar["what"]: bar["met"] for bar in bench.bars("cpu", bench.PRESETS["cpu"], measured)}
    assert found == {"naive_over_ours": False, "of_limit": True, "extra_over_replicated": False}


def test_an_unknown_peer_is_named(bench):
    assert bench.command.names_in(bench.PEERS, "nnsight,naive") == ["nnsight", "naive"]
    with pytest.raises(bench.argparse.ArgumentTypeError, match="no torch; there are naive, nnsight"):
        bench.command.names_in(bench.PEERS, "naive,torch")


def test_disagreement_stops_the_run(bench):
    ours, other = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    with pytest.raises(SystemExit, match="disagree"):
        bench.agreement({"ours": ours, "naive": other}, tolerance=0.5)


def test_peak_bytes_counts_what_lives_at_the_same_time(bench):
    def run():
        first, second = (torch.empty(n << 20, dtype=torch.uint8) for n in (5, 2))
        del first
        return second, torch.empty(1 << 20, dtype=torch.uint8)

    assert bench.peak_bytes(run, "cpu") == pytest.approx(7 << 20, rel=0.01)
