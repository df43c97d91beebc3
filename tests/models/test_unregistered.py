"""A family nobody registered works by what transformers says of it, or is refused in one sentence."""

from __future__ import annotations

import pytest
from pictures import picture
from tiny_models import ALL

from vfl_train.errors import ConfigError
from vfl_train.interventions import Row, drop, read_out, swap
from vfl_train.models import VisionLanguageModel
from vfl_train.models.families import FAMILIES
from vfl_train.models.generation import generate


@pytest.fixture
def vlm(monkeypatch):
    monkeypatch.delitem(FAMILIES, "idefics3")
    return VisionLanguageModel(*ALL["idefics3"](), "a stranger")


def test_an_image_in_tiles_is_one_span(vlm):
    prompt = vlm.prompt("three cats ?", [picture(0, 64), picture(1, (64, 32))])
    ids = prompt.inputs["input_ids"][0]
    placeholders = [int((ids[a:b] == vlm.image_token_id).sum()) for a, b in prompt.spans]
    assert placeholders == [5 * 4, 3 * 4]  # four or two tiles and a thumbnail, of 4 tokens each
    assert prompt.spans[0][1] - prompt.spans[0][0] > 5 * 4


def test_layouts_of_equal_length_are_told_apart(vlm):
    wide, high = (vlm.prompt("?", [picture(0, size)]) for size in ((64, 32), (32, 64)))
    assert wide.grids != high.grids
    assert wide.grids == vlm.prompt("?", [picture(1, (64, 32))]).grids


def test_both_paths_and_generation_work(vlm):
    host, donor = (vlm.prompt("three cats ?", [picture(i, 64)]) for i in range(2))
    several = vlm.prompt("three cats ?", [picture(2, (64, 32)), picture(3, (32, 32))])
    (own,) = generate(vlm, [donor], 4)
    rows = [
        Row(host, own.tokens, branch, {"d": donor})
        for branch in ((), drop([1]), swap([1], "d"), swap(range(vlm.num_layers), "d"))
    ]
    rows += [Row(donor, own.tokens), Row(several, (5, 7)), Row(several, (5, 7), drop([2], spans=[1]))]
    reference, engine = (list(read_out(vlm, rows, path)) for path in ("reference", "engine"))
    for one, other in zip(reference, engine, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
    base, dropped, swapped, everywhere, wanted = (r.logprobs[0] for r in engine[:5])
    assert min(abs(dropped - base), abs(swapped - base)) > 1e-3
    assert everywhere == pytest.approx(wanted, abs=2e-5) and engine[4].holds


def test_layers_without_self_attention_are_refused(monkeypatch):
    """What a layer without it reads of the image cannot be told: here, Llama 3.2 Vision's cross-attention."""
    monkeypatch.delitem(FAMILIES, "mllama")
    with pytest.raises(ConfigError, match="2 of 4 decoder layers have cross_attn in place of self-attention"):
        VisionLanguageModel(*ALL["mllama"](), "a stranger")
