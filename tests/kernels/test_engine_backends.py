"""The engine says the same on every backend of its attention."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_cases import DEVICE
from pictures import picture
from tiny_models import LAYERS, tiny_vlm

from vfl_train.interventions import Row, drop, engine, read_out, swap
from vfl_train.interventions.readout import Cost
from vfl_train.kernels.vision_kv import triton_path
from vfl_train.models import VisionLanguageModel

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton_path.interpreted(), reason="no GPU, and TRITON_INTERPRET is not 1"
)


@pytest.mark.parametrize("phase", ["text", "decode"])
def test_triton_under_the_engine(monkeypatch, phase):
    """Drops and swaps in a pair, grouped-query attention: log-probabilities as by the torch path, and as by
    the reference path, which has no such attention at all."""
    shared = tiny_vlm("qwen2_5_vl")  # stays where it is
    vlm = VisionLanguageModel(copy.deepcopy(shared.model).to(DEVICE), shared.processor, shared.name_or_path)
    a, b = (vlm.prompt("what text is written here ?", [picture(seed)]) for seed in (0, 1))
    rows = [Row(a, (7, 11)), Row(b, (9,))]
    rows += [Row(a, (7, 11), drop([k], phase=phase)) for k in range(LAYERS)]
    rows += [Row(b, (9,), swap([k], "d", phase=phase), {"d": a}) for k in (0, LAYERS - 1)]
    used = []
    attention = triton_path.attention
    monkeypatch.setattr(triton_path, "attention", lambda *a: used.append(1) or attention(*a))
    found = {}
    for backend, path in (("triton", "engine"), ("torch", "engine"), (None, "reference")):
        monkeypatch.setattr(engine, "BACKEND", backend)
        cost = Cost()
        found[backend] = list(read_out(vlm, rows, path, cost=cost))
        assert path == "reference" or cost.reference_rows == 0
    assert len(used) == LAYERS
    for other in ("torch", None):
        for ours, theirs in zip(found["triton"], found[other], strict=True):
            assert ours.predicted == theirs.predicted
            torch.testing.assert_close(
                torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=2e-5, rtol=1e-5
            )
