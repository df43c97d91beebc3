"""Llama 3.2 Vision reads images by cross-attention: interventions against definitions written out here, by
what transformers itself does with fewer images, other pixels, or a layer replaced by hand."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from pictures import picture
from tiny_models import tiny_vlm

from vfl_train.data.collator import collate
from vfl_train.data.rows import Image, Message, Text, user_message
from vfl_train.errors import DataError
from vfl_train.interventions import NOISE, Row, drop, knockout, read_out, rerun, swap, uniform
from vfl_train.interventions.standing import standing
from vfl_train.models.batching import stack
from vfl_train.models.generation import generate
from vfl_train.training.prefix_start import refusal

QUESTION, ANSWER = "three cats ?", (7, 11, 5)
CROSS, ALL = (1, 3), range(4)


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm("mllama")


@pytest.fixture(scope="module")
def host(vlm):
    return vlm.prompt(QUESTION, [picture(0, 64), picture(1, 64)])


@pytest.fixture(scope="module")
def donor(vlm):
    return vlm.prompt(QUESTION, [picture(2, 64), picture(3, 64)])


def inputs_of(vlm, prompt) -> dict:
    return stack(vlm, [(prompt, ANSWER)])


@torch.no_grad()
def said(vlm, prompt, inputs) -> torch.Tensor:
    """Log-probabilities of the answer in transformers' own forward."""
    logits = vlm.model(**inputs, use_cache=False).logits[0, prompt.length - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ANSWER)[:, None])[:, 0]


def ours(vlm, prompt, branch, donor=None) -> torch.Tensor:
    row = Row(prompt, ANSWER, branch, {} if donor is None else {"d": donor})
    return torch.tensor(next(read_out(vlm, [row], "reference")).logprobs)


def same(one, other) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@contextmanager
def replaced(layer, forward):
    """`layer` runs `forward(hidden, its own forward, its arguments)` inside."""
    own = layer.forward
    layer.forward = lambda hidden, **given: forward(hidden, own, given)
    try:
        yield
    finally:
        del layer.forward


def without(prompt, image: int, inputs: dict) -> dict:
    """The inputs of `prompt` as if `image` had not been given; its token stays."""
    keep = [i for i in range(len(prompt.spans)) if i != image]
    kept = {key: inputs[key][:, keep] for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    return {**inputs, **kept, "cross_attention_mask": inputs["cross_attention_mask"][:, :, keep]}


# --- drop -------------------------------------------------------------------------------------------


def test_all_images_dropped_everywhere_is_the_model_without_images(vlm, host):
    inputs = inputs_of(vlm, host)
    blind = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    wanted = said(vlm, host, blind)
    assert (said(vlm, host, inputs) - wanted).abs().max() > 1e-2
    same(ours(vlm, host, drop(ALL)), wanted)


def test_an_image_dropped_everywhere_is_the_model_without_it(vlm, host):
    """The second of two: the token of the first, before it, sees the first alone."""
    wanted = said(vlm, host, without(host, 1, inputs_of(vlm, host)))
    assert (said(vlm, host, inputs_of(vlm, host)) - wanted).abs().max() > 1e-3
    same(ours(vlm, host, drop(ALL, spans=[1])), wanted)


def test_text_between_images_has_nothing_left_to_see(vlm):
    """It reads the image before it alone, and skips the layers when that one is dropped."""
    parts = (Image(0), Text("12 dogs. "), Image(1), Text(QUESTION))
    prompt = vlm.prompt_of([Message("user", parts)], [picture(0, 64), picture(1, 64)])
    inputs = inputs_of(vlm, prompt)
    sees = inputs["cross_attention_mask"][0].any(-1)
    between = sees[:, 0] & ~sees[:, 1]
    assert between.sum() > 2 and (sees[:, 1] & ~sees[:, 0]).any()

    def forward(hidden, own, given):
        """Dropping image 0 leaves this layer to what sees image 1; the tokens before both see it, too."""
        cut = without(prompt, 0, inputs)
        states = vlm.model.model.vision_model(
            cut["pixel_values"], cut["aspect_ratio_ids"], cut["aspect_ratio_mask"]
        ).last_hidden_state
        states = vlm.model.model.multi_modal_projector(states).flatten(0, -3)
        mask = given["cross_attention_mask"][..., states.shape[0] * states.shape[1] :]
        out = own(hidden, **{**given, "cross_attention_states": states, "cross_attention_mask": mask})
        return torch.where(between[None, :, None], hidden, out)

    with replaced(vlm.layers[1], forward):
        wanted = said(vlm, prompt, inputs)
    same(ours(vlm, prompt, drop([1], spans=[0])), wanted)
    assert (wanted - said(vlm, prompt, inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("layer", CROSS)
def test_a_layer_with_nothing_to_see_changes_nothing(vlm, host, layer):
    with replaced(vlm.layers[layer], lambda hidden, own, given: hidden):
        wanted = said(vlm, host, inputs_of(vlm, host))
    same(ours(vlm, host, drop([layer])), wanted)


def test_phase_decode_leaves_the_prompt_alone(vlm, host):
    def forward(hidden, own, given):
        return torch.cat([own(hidden, **given)[:, : host.length - 1], hidden[:, host.length - 1 :]], dim=1)

    with replaced(vlm.layers[1], forward), replaced(vlm.layers[3], forward):
        wanted = said(vlm, host, inputs_of(vlm, host))
    same(ours(vlm, host, drop(ALL, "decode")), wanted)
    assert (ours(vlm, host, drop(ALL)) - wanted).abs().max() > 1e-3


def test_other_layers_read_no_image(vlm, host, donor):
    """What text reads there are text tokens' keys."""
    rows = [
        Row(host, ANSWER, b, {"d": donor}) for b in ((), drop([0, 2]), swap([0, 2], "d"), swap([0, 2], NOISE))
    ]
    assert len({found.logprobs for found in read_out(vlm, rows, "reference")}) == 1


def test_transformers_lets_tokens_before_an_image_read_it(vlm, host, donor):
    """The reason why all tokens are bound. If this changes, so does `interventions.cross_attention`."""
    with torch.no_grad():
        first = [
            vlm.model(**stack(vlm, [(p, ())]), output_hidden_states=True).hidden_states[2][0, 0]
            for p in (host, donor)
        ]
    assert (first[0] - first[1]).abs().max() > 1e-3


# --- swap and knockout --------------------------------------------------------------------------------


def test_a_swap_at_one_layer_reads_the_donors_keys(vlm, host, donor):
    """The keys are made of the vision tower's output: the layer is given the donor's."""
    given_to: dict = {}
    with replaced(vlm.layers[1], lambda h, own, given: (given_to.update(given), own(h, **given))[1]):
        said(vlm, donor, inputs_of(vlm, donor))
    states = given_to["cross_attention_states"]

    def forward(hidden, own, given):
        return own(hidden, **{**given, "cross_attention_states": states})

    with replaced(vlm.layers[1], forward):
        wanted = said(vlm, host, inputs_of(vlm, host))
    same(ours(vlm, host, swap([1], "d"), donor), wanted)
    assert (wanted - said(vlm, host, inputs_of(vlm, host))).abs().max() > 1e-3


def test_a_swap_of_one_image_is_the_model_with_the_donors(vlm, host, donor):
    inputs = inputs_of(vlm, host)
    pixels = torch.cat([inputs["pixel_values"][:, :1], inputs_of(vlm, donor)["pixel_values"][:, 1:]], dim=1)
    same(
        ours(vlm, host, swap(ALL, "d", spans=[1]), donor),
        said(vlm, host, {**inputs, "pixel_values": pixels}),
    )


def test_a_knockout_silences_the_cross_attention(vlm, host):
    def hook(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:])

    handle = vlm.layers[1].cross_attn.register_forward_hook(hook)
    try:
        wanted = said(vlm, host, inputs_of(vlm, host))
    finally:
        handle.remove()
    same(ours(vlm, host, knockout([1])), wanted)
    with standing(vlm, knockout([1])):
        same(said(vlm, host, inputs_of(vlm, host)), wanted)


# --- batches ------------------------------------------------------------------------------------------


def test_prompts_with_unlike_images_share_no_batch(vlm, monkeypatch):
    """Tokens before an image would read the picture that pads the other row."""
    prompts = [vlm.prompt("three", [picture(0, 64)] * 2), vlm.prompt("three cats", [picture(1, 64)])]
    assert prompts[0].length == prompts[1].length
    found = [r.logprobs for r in read_out(vlm, [Row(p, ANSWER) for p in prompts], "reference")]
    for own, prompt in zip(found, prompts, strict=True):
        same(torch.tensor(own), said(vlm, prompt, inputs_of(vlm, prompt)))
    batches: list[int] = []
    record = lambda vlm, rows: (batches.append(len(rows)), stack(vlm, rows))[1]  # noqa: E731
    monkeypatch.setattr("vfl_train.models.generation.stack", record)
    generate(vlm, [*prompts, *prompts], 1)
    assert batches == [2, 2]


@pytest.mark.parametrize("path", ["reference", "engine"])
def test_without_an_image_the_layers_are_skipped(vlm, path):
    prompt = vlm.prompt(QUESTION, [])
    branches = [(), knockout([1]), uniform([1]), rerun([1]), rerun([3], "itself"), drop(ALL)]
    found = {r.logprobs for r in read_out(vlm, [Row(prompt, ANSWER, b) for b in branches], path)}
    assert len(found) == 1


def test_training_batches(vlm):
    """Different numbers of images are padded; rows without one would be given another's pixels."""
    samples = [
        vlm.encoder.encode(
            [user_message(QUESTION, n), Message("assistant", (Text("12 dogs"),))],
            [picture(i, 64) for i in range(n)],
        )
        for n in (1, 2, 0)
    ]
    batch = collate(samples[:2], 0)
    assert batch["cross_attention_mask"].shape == (2, samples[1].length, 2, 4)
    assert not batch["cross_attention_mask"][0, :, 1].any() and batch["pixel_values"].shape[:2] == (2, 2)
    with pytest.raises(DataError, match="rows with and without images cannot share a batch"):
        collate(samples, 0)


def test_a_cached_prefix_would_lack_the_image(vlm):
    assert "read the image, which the cache would lack" in str(refusal(vlm, {}, 1, None))
