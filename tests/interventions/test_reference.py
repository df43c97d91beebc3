"""The reference path against independent implementations: hooks on masks, and edited KV caches."""

from __future__ import annotations

import pytest
import torch
from pictures import picture
from tiny_models import FAMILIES, LAYERS, VARIANTS, tiny_vlm
from transformers import DynamicCache

from vfl_train.errors import ConfigError
from vfl_train.interventions import NOISE, Intervention, Row, drop, read_out, swap
from vfl_train.interventions.reference import _PLAN, Plan, _installed

ANSWER = (7, 11, 5)
QUESTION = "what text is written here ?"


@pytest.fixture(params=[*FAMILIES, *VARIANTS])
def vlm(request):
    return tiny_vlm(request.param)


@pytest.fixture
def host(vlm):
    return vlm.prompt(QUESTION, [picture(0)])


@pytest.fixture
def donor(vlm):
    return vlm.prompt(QUESTION, [picture(1)])


def logprobs(logits: torch.Tensor, prompt, answer=ANSWER) -> torch.Tensor:
    """Log-probabilities of the forced answer from full logits [T, V]."""
    start = prompt.length - 1
    scores = logits[start : start + len(answer)].log_softmax(-1)
    return scores.gather(1, torch.tensor(answer)[:, None])[:, 0]


def inputs_of(prompt, answer=ANSWER) -> dict[str, torch.Tensor]:
    """Plain model inputs of one prompt with its answer."""
    out = dict(prompt.inputs)
    extra = torch.tensor([answer])
    ids = out["input_ids"]
    for key, tensor in list(out.items()):
        if tensor.shape == ids.shape:
            tail = extra if key == "input_ids" else torch.full_like(extra, int(key == "attention_mask"))
            out[key] = torch.cat([tensor, tail], dim=1)
    return out


def found(vlm, rows) -> list[torch.Tensor]:
    return [torch.tensor(r.logprobs) for r in read_out(vlm, rows, "reference")]


@torch.no_grad()
def test_base_equals_a_plain_forward(vlm, host):
    expected = logprobs(vlm.model(**inputs_of(host)).logits[0], host)
    (base,) = found(vlm, [Row(host, ANSWER)])
    torch.testing.assert_close(base, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def drop_by_mask_hooks(vlm, prompt, layers, first_bound) -> torch.Tensor:
    """Drop, independently: eager attention, and a hook that blocks image columns in the layer's mask."""
    (start, stop), handles = prompt.spans[0], []

    def hook(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[:, :, first_bound:, start:stop] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    before = vlm.text_config._attn_implementation
    vlm.text_config._attn_implementation = "eager"
    try:
        handles = [vlm.layers[k].self_attn.register_forward_pre_hook(hook, with_kwargs=True) for k in layers]
        return logprobs(vlm.model(**inputs_of(prompt)).logits[0], prompt)
    finally:
        vlm.text_config._attn_implementation = before
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("layers", [[0], [2], [1, 3], range(LAYERS)], ids=str)
@pytest.mark.parametrize("phase", ["text", "decode"])
def test_drop_equals_hooked_masks(vlm, host, layers, phase):
    first_bound = host.spans[0][1] if phase == "text" else host.length - 1
    expected = drop_by_mask_hooks(vlm, host, layers, first_bound)
    base, dropped = found(vlm, [Row(host, ANSWER), Row(host, ANSWER, drop(layers, phase))])
    torch.testing.assert_close(dropped, expected, atol=2e-5, rtol=1e-5)
    windows = [getattr(vlm.layers[k].self_attn, "sliding_window", None) for k in layers]
    if all(window and first_bound - host.spans[0][1] + 1 >= window for window in windows):
        # Within rounding: the two are different rows of one product.
        torch.testing.assert_close(
            dropped, base, atol=2e-6, rtol=0
        )  # the image is out of these layers' sight
    else:
        assert (dropped - base).abs().max() > 1e-3, "the model does not feel the drop: the test shows nothing"


@torch.no_grad()
def swap_by_edited_cache(vlm, host, donor, layers) -> torch.Tensor:
    """Swap, independently: prefill both prefixes into KV caches, copy the donor's image K and V at
    `layers`, and run the text after the image on the edited cache."""
    (start, stop), full = host.spans[0], inputs_of(host)
    caches = []
    positions = {}
    if "image_grid_thw" in full:  # M-RoPE
        rope, _ = vlm.model.model.get_rope_index(
            full["input_ids"], full["mm_token_type_ids"], image_grid_thw=full["image_grid_thw"]
        )
        positions = {"position_ids": rope}
    for prompt in (host, donor):
        cache = DynamicCache()  # without the configuration, so that it keeps what is out of a window
        prefix = {
            k: v[:, :stop] if v.shape == prompt.inputs["input_ids"].shape else v
            for k, v in prompt.inputs.items()
        }
        vlm.model(
            **prefix,
            **{k: v[..., :stop] for k, v in positions.items()},
            past_key_values=cache,
            use_cache=True,
        )
        caches.append(cache)
    ours, theirs = caches
    for k in layers:
        ours.layers[k].keys[:, :, start:stop] = theirs.layers[k].keys[:, :, start:stop]
        ours.layers[k].values[:, :, start:stop] = theirs.layers[k].values[:, :, start:stop]
    rest = {"input_ids": full["input_ids"][:, stop:], "attention_mask": full["attention_mask"]}
    logits = vlm.model(
        **rest, **{k: v[..., stop:] for k, v in positions.items()}, past_key_values=ours, use_cache=True
    ).logits[0]
    scores = logits[host.length - 1 - stop :][: len(ANSWER)].log_softmax(-1)
    return scores.gather(1, torch.tensor(ANSWER)[:, None])[:, 0]


@pytest.mark.parametrize("layers", [[0], [2], [1, 2], range(LAYERS)], ids=str)
def test_swap_equals_an_edited_cache(vlm, host, donor, layers):
    expected = swap_by_edited_cache(vlm, host, donor, layers)
    rows = [Row(host, ANSWER), Row(host, ANSWER, swap(layers, "d"), {"d": donor})]
    base, swapped = found(vlm, rows)
    torch.testing.assert_close(swapped, expected, atol=2e-5, rtol=1e-5)
    assert (swapped - base).abs().max() > 1e-3, "the model does not feel the swap: the test shows nothing"


def test_self_swap_is_bit_equal_to_base(vlm, host):
    rows = [Row(host, ANSWER)] + [Row(host, ANSWER, swap([k], "me"), {"me": host}) for k in range(LAYERS)]
    base, *swapped = found(vlm, rows)
    assert all(torch.equal(base, s) for s in swapped)


def test_noise_swap_changes_and_is_repeatable(vlm, host):
    row = Row(host, ANSWER, swap(range(LAYERS), NOISE))
    (base, once), (_, again) = (found(vlm, [Row(host, ANSWER), row]) for _ in range(2))
    assert torch.equal(once, again)
    assert (base - once).abs().max() > 1e-3


@torch.no_grad()
def test_knockout_equals_zeroed_projections(vlm, host):
    layer = vlm.layers[1]
    saved = layer.self_attn.o_proj.weight.clone()
    layer.self_attn.o_proj.weight.zero_()
    try:
        expected = logprobs(vlm.model(**inputs_of(host)).logits[0], host)
    finally:
        layer.self_attn.o_proj.weight.copy_(saved)
    knocked = found(vlm, [Row(host, ANSWER), Row(host, ANSWER, (Intervention("knockout", frozenset([1])),))])[
        1
    ]
    torch.testing.assert_close(knocked, expected, atol=2e-5, rtol=1e-5)


def test_rows_do_not_depend_on_their_batch(vlm, host, donor):
    rows = [Row(host, ANSWER, swap([k], "d"), {"d": donor}) for k in range(LAYERS)] + [Row(donor, (9,))]
    for a, b in zip(
        found(vlm, rows),
        [torch.tensor(r.logprobs) for r in read_out(vlm, rows, "reference", batch_tokens=1)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_two_images_are_dropped_one_by_one(vlm):
    prompt = vlm.prompt(QUESTION, [picture(0), picture(1)])
    assert len(prompt.spans) == 2
    rows = [Row(prompt, ANSWER, drop([1], spans=s)) for s in (None, [0], [1], [0, 1])]
    both, first, second, named = found(vlm, rows)
    assert torch.equal(both, named)
    assert not torch.equal(first, second)


def test_targets_inside_the_prompt_are_read(vlm, host):
    with_answer = vlm.located(inputs_of(host), 1)
    targets = tuple(range(host.length, host.length + len(ANSWER)))
    forced, read = found(vlm, [Row(host, ANSWER), Row(with_answer, targets=targets)])
    torch.testing.assert_close(forced, read, atol=1e-6, rtol=1e-6)


# --- nothing is left behind (R18), and what is refused ------------------------------------------


def hooks_of(vlm) -> list:
    return [hook for m in vlm.model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]


@torch.no_grad()
def test_model_is_untouched_after_a_sweep_and_after_an_exception(vlm, host, donor):
    before = vlm.model(**inputs_of(host)).logits
    hooks = hooks_of(vlm)  # transformers itself leaves some in vision towers
    found(vlm, [Row(host, ANSWER, swap([0], "d"), {"d": donor}), Row(host, ANSWER, drop([1]))])
    knockout = Plan(silenced={(0, "self_attn"): [0], (1, "mlp"): [0]})
    with pytest.raises(RuntimeError, match="boom"), _installed(vlm, knockout), _installed(vlm, Plan()):
        raise RuntimeError("boom")
    assert torch.equal(before, vlm.model(**inputs_of(host)).logits)
    assert _PLAN.get() is None
    assert hooks_of(vlm) == hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vlm.layers.modules())


def test_layers_and_images_that_do_not_exist_are_named(vlm, host):
    with pytest.raises(ConfigError, match=f"layer {LAYERS} is outside"):
        found(vlm, [Row(host, ANSWER, drop([LAYERS]))])
    with pytest.raises(ConfigError, match="image 3"):
        found(vlm, [Row(host, ANSWER, drop([0], spans=[3]))])


def test_unequal_grids_are_refused():
    vlm = tiny_vlm("qwen2_5_vl")
    host, donor = vlm.prompt(QUESTION, [picture(0, 32)]), vlm.prompt(QUESTION, [picture(1, 64)])
    with pytest.raises(ConfigError, match="grids differ"):
        found(vlm, [Row(host, ANSWER, swap([0], "d"), {"d": donor})])


def test_a_path_that_is_not_there_is_refused(vlm, host):
    with pytest.raises(ConfigError, match="no path"):
        read_out(vlm, [Row(host, ANSWER)], path="magic")
