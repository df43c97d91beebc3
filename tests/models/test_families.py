"""What every supported family must keep to; a new one is added to tests/support/tiny_models.py."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES as TINY
from tiny_models import VARIANTS, tiny_vlm

from vfl_train.data.rows import Message, Text, user_message
from vfl_train.interventions import Row, drop, read_out, swap
from vfl_train.models.families import FAMILIES, Family, family_of
from vfl_train.models.generation import generate
from vfl_train.training.plan import build_plan, choose_layers
from vfl_train.training.skeleton import load_skeleton

QUESTION = "three cats ?"


@pytest.fixture(params=[*TINY, *VARIANTS])
def vlm(request):
    return tiny_vlm(request.param)


@pytest.fixture(params=["reference", "engine"])
def path(request):
    return request.param


def plain(color: str) -> Image.Image:
    return Image.new("RGB", (32, 32), color)


def same(one, other) -> None:
    """Equal log-probabilities, to fp32 rounding."""
    torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-5, rtol=1e-5)


def test_the_tiny_models_cover_every_family():
    assert set(FAMILIES) == set(TINY)
    assert family_of("nobody_knows_it") == Family()


def test_boxes_are_written_as_each_family_was_trained_to():
    boxes = {name: family.box for name, family in FAMILIES.items()}
    assert boxes == {
        "qwen2_vl": "relative-1000", "qwen2_5_vl": "pixels", "qwen3_vl": "relative-1000",
        "internvl": "relative-1000", "llava": None, "gemma3": None,
    }  # fmt: skip


def test_named_modules_are_in_every_layer(vlm):
    for layer in vlm.layers:
        assert hasattr(layer, vlm.family.attention) and hasattr(layer, vlm.family.mlp)
        assert getattr(layer, vlm.family.attention).layer_idx in range(vlm.num_layers)


@pytest.mark.parametrize("family", TINY)
def test_a_plan_adapts_the_linears_of_its_layers_alone(folder_of, family):
    skeleton = load_skeleton(str(folder_of(family)))
    plan = build_plan(choose_layers(skeleton.info, layers="1-2"), skeleton, lora_r=4)
    linears = {n for n, m in skeleton.base.named_modules() if isinstance(m, torch.nn.Linear)}
    inside = {n for n in linears if n.startswith(tuple(f"{skeleton.layer_names[k]}." for k in (1, 2)))}
    assert set(plan.module_names) == inside and len(inside) == 2 * 7
    assert sum(group["linears"] for group in plan.skipped) == len(linears - inside)


def test_forced_own_output_holds(vlm, path):
    """Generation with a cache and teacher forcing without one agree on what the model says."""
    prompts = [vlm.prompt(QUESTION, [plain(c)]) for c in ("red", "blue", "white")]
    own = generate(vlm, prompts, 5)
    rows = [Row(p, g.tokens) for p, g in zip(prompts, own, strict=True)]
    assert all(r.holds for r in read_out(vlm, rows, path))


def test_a_swap_everywhere_equals_the_donor(vlm, path):
    """Text that reads the donor's image at every layer says what it says of the donor."""
    host, donor = (vlm.prompt(QUESTION, [plain(c)]) for c in ("black", "white"))
    branch = swap(range(vlm.num_layers), "donor")
    rows = [Row(host, (5, 7), branch, {"donor": donor}), Row(donor, (5, 7)), Row(host, (5, 7))]
    swapped, wanted, own = read_out(vlm, rows, path)
    same(swapped, wanted)
    assert abs(own.logprobs[0] - wanted.logprobs[0]) > 1e-3, "the images make no difference: it shows nothing"


def test_a_drop_everywhere_forgets_the_image(vlm, path):
    blind = [
        Row(vlm.prompt(QUESTION, [plain(c)]), (5, 7), drop(range(vlm.num_layers))) for c in ("red", "blue")
    ]
    same(*read_out(vlm, blind, path))


def test_prompts_with_and_without_images_share_a_batch(vlm, path):
    prompts = [vlm.prompt(QUESTION, [plain("red")] * count) for count in (1, 0, 2)]
    rows = [Row(p, (5, 7), branch) for p in prompts for branch in ((), drop([1]))]
    together = read_out(vlm, rows, path)
    alone = [next(read_out(vlm, [row], path)) for row in rows]
    for one, other in zip(together, alone, strict=True):
        same(one, other)
    assert alone[2].logprobs == alone[3].logprobs  # nothing to drop


def test_a_conversation_is_located_like_a_prompt(vlm):
    """The images of a training row are found as those of a question."""
    images = [plain("red"), plain("blue")]
    messages = [user_message(QUESTION, 2), Message("assistant", (Text("12 dogs"),))]
    encoded = vlm.encoder.encode(messages, images)
    prompt = vlm.located(encoded.inputs, 2, encoded.places)
    asked = vlm.prompt(QUESTION, images)
    assert (prompt.spans, prompt.grids) == (asked.spans, asked.grids)
    assert not encoded.answer_mask[: prompt.spans[-1][1]].any()
