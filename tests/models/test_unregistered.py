"""A family nobody registered works by what transformers says of it, or is refused in one sentence."""

from __future__ import annotations

import pytest
from pictures import picture
from tiny_models import TEXT, tiny_vlm
from transformers import MllamaConfig, MllamaForConditionalGeneration

from vfl_train.errors import ConfigError
from vfl_train.interventions import Row, drop, read_out, swap
from vfl_train.models import VisionLanguageModel
from vfl_train.models.families import FAMILIES
from vfl_train.models.generation import generate


@pytest.fixture
def vlm():
    found = tiny_vlm("idefics3")
    assert found.model_type not in FAMILIES
    return found


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


def test_images_read_by_cross_attention_are_refused():
    llava = tiny_vlm("llava")
    config = MllamaConfig(
        text_config={
            **TEXT, "vocab_size": len(llava.processor.tokenizer), "cross_attention_layers": [1],
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 32, "patch_size": 8, "max_num_tiles": 1,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
            "vision_output_dim": 64,
        },
        image_token_index=llava.image_token_id,
    )  # fmt: skip
    vlm = VisionLanguageModel(MllamaForConditionalGeneration(config), llava.processor, "mllama")
    row = Row(llava.prompt("three cats ?", [picture(0, 64)]), (5,), drop([0, 1]))
    for path in ("reference", "engine"):
        with pytest.raises(ConfigError, match=r"layer 1 of this mllama .* no self-attention over the image"):
            list(read_out(vlm, [row], path))
