"""scripts/bench_drop_plan.py at a toy size: plan and masks agree, and the JSON says what was measured."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_drop_plan.py"
SIDES = ["untouched", "masked 1", "plan 1", "masked 2", "plan 2"]


def test_the_toy_mode(tmp_path):
    output = tmp_path / "bench.json"
    arguments = ["--preset", "tiny", "--batch", "2", "--new", "4", "--repeats", "3", "--output", output]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], check=True, timeout=300, capture_output=True)
    report = json.loads(output.read_text())
    assert all(side in done.stdout.decode() for side in SIDES)
    assert (report["prompt_tokens"], report["image_tokens"]) == (27, 20)

    assert list(report["median"]) == list(report["seconds"]) == SIDES
    for side, seconds in report["seconds"].items():
        assert all(len(runs) == 4 and min(runs) >= 0 for runs in seconds.values()), "a warm-up and three"
        assert report["median"][side]["prefill"] == sorted(seconds["prefill"][1:])[1]

    over = report["over_untouched"]
    for k, left in (("1", 1 - 20 / 30 * 2 / 3), ("2", 1 - 20 / 30 * 1 / 3)):
        same = report["same"][k]
        assert same["tokens"] and same["difference"] < 1e-5 < 1e-3 < same["effect"]
        assert over[f"plan {k}"]["cache_bytes"] == pytest.approx(left)
        assert report["expected"][k]["cache_bytes"] == pytest.approx(left)
        assert over[f"masked {k}"]["cache_bytes"] == 1
        assert over[f"plan {k}"]["prefill_flops"] < over[f"masked {k}"]["prefill_flops"] == 1


@pytest.fixture
def bench(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_drop_plan", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_disagreement_stops_the_run_but_not_what_follows_a_tie(bench):
    torch = bench.torch
    tokens, zeros = torch.tensor([[1, 2, 3]]), torch.zeros(1, 3, 4)
    other, later = torch.tensor([[1, 5, 3]]), torch.zeros(1, 3, 4)
    later[0, 2] = 9.0

    def found(ours, logits):
        return {"untouched": (tokens, zeros), "masked 1": (tokens, zeros), "plan 1": (ours, logits)}

    assert bench.agreement(found(other, later), [1], 0.1)["1"] == {
        "tokens": False,
        "difference": 0.0,
        "effect": 0.0,
    }
    with pytest.raises(SystemExit, match=r"from layer 1 differ by 9\.0"):
        bench.agreement(found(tokens, later), [1], 0.1)
