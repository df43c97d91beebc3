"""The phantom's planted layers, found exactly and nowhere else. scripts/check_phantom.py does it with more
probe seeds, and the twin beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfl_train.config import ProfileConfig
from vfl_train.phantom.architecture import PLANTED
from vfl_train.phantom.datasets import probe_set
from vfl_train.profiling.measure import measure_function
from vfl_train.profiling.sweep import Sweeper

FAR = 2  # layers from the planted one at which a swap must change next to nothing


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", PLANTED)
def test_each_function_is_found_at_its_planted_layer_and_nowhere_far(phantom, name, seed):
    pairs = probe_set({name: 24}, seed).pairs[name]
    config = ProfileConfig(output=Path("unused"), control_pairs=2, model="phantom")
    sweeper = Sweeper(phantom, config.phase, config.path, config.batch_tokens, name)
    found = measure_function(sweeper, pairs, config).function
    k = PLANTED[name]
    assert found.status == "ok" and found.peak_layer == k and found.flip_block == [k]
    assert found.flip_rate[k] >= 0.9 and sweeper.cost.reference_rows == 0
    far = [rate for layer, rate in enumerate(found.change_rate) if abs(layer - k) >= FAR]
    assert max(far) <= 0.1
