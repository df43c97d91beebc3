"""`grids`: equal exactly where two images may be swapped, that is where each of their tokens comes from the
same part of the picture. Shown by pictures whose colors say where a pixel is, whatever their size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_vlm
from transformers import LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from vfl_train.models.families import FAMILIES

SIZES = ((32, 32), (64, 32), (32, 64), (64, 64), (64, 48), (48, 64), (96, 32), (64, 30), (128, 64))
FOLLOW_SIZE = (
    "qwen2_5_vl", "glm4v", "internvl", "llava_next", "llava_onevision", "idefics3", "smolvlm", "mistral3",
    "aya_vision", "cohere2_vision",
)  # fmt: skip


def ramp(size: tuple[int, int]) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(*((np.arange(side) + 0.5) / side for side in size))
    return Image.fromarray((np.stack([x, y, 1 - x], -1) * 255).astype(np.uint8))


@pytest.mark.parametrize("family", FOLLOW_SIZE)
def test_grids_are_equal_exactly_where_tokens_show_the_same(family):
    vlm = tiny_vlm(family)
    prompts = [vlm.prompt("?", [ramp(size)]) for size in SIZES]
    for n, one in enumerate(prompts):
        for other in prompts[:n]:
            mine, theirs = one.inputs["pixel_values"], other.inputs["pixel_values"]
            same = one.spans == other.spans and mine.shape == theirs.shape
            if same:  # standard deviations of color; padding at a picture's edge makes up to a quarter of one
                difference = float((mine - theirs).abs().mean())
                assert difference < 0.3 or difference > 0.6
                same = difference < 0.3
            assert (one.grids == other.grids) == same


@pytest.mark.parametrize("family", ["internvl", "aya_vision", "cohere2_vision", "qwen2_5_vl"])
def test_layouts_that_the_tokens_do_not_tell_are_told(family):
    vlm = tiny_vlm(family)
    wide, high = (vlm.prompt("?", [ramp(size)]) for size in ((64, 32), (32, 64)))
    assert wide.inputs["input_ids"].tolist() == high.inputs["input_ids"].tolist()
    assert wide.grids != high.grids


def test_layouts_of_equal_length_of_the_released_llava_next_are_told_apart():
    """24 rows of 32 and 72 rows of 10, with a newline each, are both 792 tokens."""
    tokenizer = tiny_vlm("llava_next").processor.tokenizer
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    sizes = (448, 336), (140, 1008)
    tokens = [len(processor(images=[ramp(s)], text=["<image>"])["input_ids"][0]) for s in sizes]
    assert tokens[0] == tokens[1] == 1 + 24 * 24 + 792
    tiles = FAMILIES["llava_next"].tiles
    assert [tiles(processor, size, 1) for size in sizes] == [(32, 24), (10, 72)]


def test_llava_onevision_cuts_none_of_several_images():
    vlm = tiny_vlm("llava_onevision")
    two = [vlm.prompt("?", [ramp(size), ramp((64, 64))]) for size in ((64, 32), (32, 64))]
    assert two[0].grids == two[1].grids
    alone = [vlm.prompt("?", [ramp(size)]) for size in ((64, 32), (32, 64))]
    assert alone[0].grids != alone[1].grids
