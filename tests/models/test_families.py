"""What every supported family must keep to; a new one is added to tests/support/tiny_models.py."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES as TINY
from tiny_models import tiny_vlm

from vfl_train.data.rows import Message, Text, user_message
from vfl_train.interventions import Row, drop, read_out, swap
from vfl_train.models.families import FAMILIES, Family, family_of
from vfl_train.models.generation import generate


@pytest.fixture(params=TINY)
def vlm(request):
    return tiny_vlm(request.param)


def test_the_tiny_models_cover_every_family():
    assert set(FAMILIES) == set(TINY)
    assert family_of("nobody_knows_it") == Family()


def test_named_modules_are_in_every_layer(vlm):
    for layer in vlm.layers:
        assert hasattr(layer, vlm.family.attention) and hasattr(layer, vlm.family.mlp)
        assert getattr(layer, vlm.family.attention).layer_idx in range(vlm.num_layers)


def test_forced_own_output_holds(vlm):
    """Generation with a cache and teacher forcing without one agree on what the model says."""
    prompts = [vlm.prompt("three cats ?", [Image.new("RGB", (32, 32), c)]) for c in ("red", "blue", "white")]
    own = generate(vlm, prompts, 5)
    assert all(r.holds for r in read_out(vlm, [Row(p, g.tokens) for p, g in zip(prompts, own, strict=True)]))


def test_a_swap_everywhere_equals_the_donor(vlm):
    """Text that reads the donor's image at every layer says what it says of the donor."""
    host, donor = (vlm.prompt("three cats ?", [Image.new("RGB", (32, 32), c)]) for c in ("red", "blue"))
    branch = swap(range(vlm.num_layers), "donor")
    swapped, wanted = read_out(vlm, [Row(host, (5, 7), branch, {"donor": donor}), Row(donor, (5, 7))])
    torch.testing.assert_close(
        torch.tensor(swapped.logprobs), torch.tensor(wanted.logprobs), atol=2e-5, rtol=1e-5
    )


def test_a_drop_everywhere_forgets_the_image(vlm):
    images = [Image.new("RGB", (32, 32), c) for c in ("red", "blue")]
    blind = [Row(vlm.prompt("three cats ?", [i]), (5, 7), drop(range(vlm.num_layers))) for i in images]
    first, second = read_out(vlm, blind)
    torch.testing.assert_close(
        torch.tensor(first.logprobs), torch.tensor(second.logprobs), atol=2e-5, rtol=1e-5
    )


def test_a_conversation_is_located_like_a_prompt(vlm):
    """The images of a training row are found as those of a question."""
    images = [Image.new("RGB", (32, 32), c) for c in ("red", "blue")]
    messages = [user_message("three cats ?", 2), Message("assistant", (Text("12 dogs"),))]
    encoded = vlm.encoder.encode(messages, images)
    prompt = vlm.located(encoded.inputs, 2)
    assert prompt.spans == vlm.prompt("three cats ?", images).spans
    assert not encoded.answer_mask[: prompt.spans[-1][1]].any()
