"""The estimate before a run, beside what the run then counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfl_train.config import ProfileConfig
from vfl_train.phantom.datasets import probe_set
from vfl_train.profiling.estimate import estimate, shared_forwards, summary
from vfl_train.profiling.measure import measure


@pytest.mark.parametrize(("prefix", "suffix", "depth"), [(600, 40, 12), (1400, 60, 28), (68, 12, 12)])
def test_single_layers_cost_what_the_design_says(prefix, suffix, depth):
    wanted = 1 + suffix * (depth + 1) / (2 * (prefix + suffix))
    assert shared_forwards(prefix, suffix, depth, range(depth)) == pytest.approx(wanted)
    # Sets that start at the bottom cost a whole suffix each.
    up_to = 1 + depth * suffix / (prefix + suffix)
    assert shared_forwards(prefix, suffix, depth, [0] * depth) == pytest.approx(up_to)
    assert shared_forwards(prefix, suffix, depth, []) == 1


@pytest.mark.parametrize("intervention", ["swap", "drop-from"])
@pytest.mark.parametrize("phase", ["text", "decode"])
def test_the_estimate_is_near_what_is_counted(phantom, intervention, phase):
    config = ProfileConfig(
        output=Path("unused"), functions=("ocr",), pairs=2, control_pairs=0, intervention=intervention,
        phase=phase, model="phantom",
    )  # fmt: skip
    probes = probe_set({"ocr": 2}, 4)
    (expected,) = estimate(phantom, probes, config)
    found = measure(phantom, probes, config).functions["ocr"]
    assert found.pairs_answered == 2
    counted = found.details["cost"]["token_layers"] / found.details["cost"]["plain_forwards"]
    assert counted == pytest.approx(
        4 * (expected.prefix + expected.suffix - (phase == "decode")) * 11, rel=0.05
    )
    # The formula counts the last layer in, and half of the cumulative flips.
    assert found.details["cost"]["plain_forwards"] == pytest.approx(expected.forwards, rel=0.3)
    assert found.details["cost"]["sweep_forwards"] == pytest.approx(found.details["cost"]["plain_forwards"])
    assert expected.seconds > 0 and str(expected.rows) in summary([expected])
