"""`generate` under a drop plan, against the masked reference and against hooks on plain masks."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from pictures import picture
from precision import as_dtype, with_float64_decoder
from processors import llava_processor
from tiny_models import FAMILIES, LAYERS, VARIANTS, louder, tiny_vlm
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vfl_train.interventions import Row, drop, drop_plan, read_out
from vfl_train.interventions.drop_plan import drop_images_from
from vfl_train.interventions.generation import generate_under
from vfl_train.interventions.text_cache import TextOnlyLayer
from vfl_train.models import VisionLanguageModel
from vfl_train.models.batching import stack

QUESTION = "what text is written here ?"
ALL = [*FAMILIES, *VARIANTS]
ANSWERS = ((7, 11, 5), (9, 30, 8, 14), (12,), (6, 6))
CAP = 6


def prompts_of(vlm: VisionLanguageModel) -> list:
    """Of unequal length, with one image, a larger one, two images, and none."""
    return [
        vlm.prompt(QUESTION, [picture(0)]),
        vlm.prompt("three cats, 12 dogs. " + QUESTION, [picture(1, (64, 32))]),
        vlm.prompt("three cats", [picture(2), picture(3, (64, 32))]),
        vlm.prompt(QUESTION, []),
    ]


def image_tokens(prompts, left: bool, extra: int = 0) -> torch.Tensor:
    """bool [B, T]: whole spans, separators of an image's pieces included."""
    width = max(p.length for p in prompts) + extra
    out = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, p in enumerate(prompts):
        for start, stop in p.spans:
            shift = width - p.length if left else 0
            out[i, shift + start : shift + stop] = True
    return out


@contextmanager
def masked(model, layer: int, dropped: torch.Tensor):
    """The plan the slow way: eager attention, and a hook that blocks the image's columns in the masks of
    the layers from `layer` on. Not for sliding layers that forget keys."""

    def hook(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        columns = torch.zeros(len(mask), mask.shape[-1], dtype=torch.bool)
        repeats = len(mask) // len(dropped)
        columns[:, : dropped.shape[1]] = dropped.repeat_interleave(repeats, dim=0)[:, : mask.shape[-1]]
        mask = mask.masked_fill(columns[:, None, None], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "eager"
    layers = model.get_decoder().layers
    handles = [m.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for m in layers[layer:]]
    try:
        yield
    finally:
        config._attn_implementation = before
        for handle in handles:
            handle.remove()


@torch.no_grad()
def forced(vlm: VisionLanguageModel, prompts, layer: int, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities of the answers in one right-padded batch under the plan."""
    rows = list(zip(prompts, ANSWERS, strict=False))
    with drop_images_from(vlm.model, layer, tokens):
        logits = vlm.model(**stack(vlm, rows), use_cache=False).logits.log_softmax(
            -1, torch.promote_types(vlm.model.dtype, torch.float32)
        )
    return torch.stack(
        [logits[i, p.length - 1 + j, t] for i, (p, a) in enumerate(rows) for j, t in enumerate(a)]
    )


def reference(vlm: VisionLanguageModel, prompts, layer: int) -> torch.Tensor:
    rows = [Row(p, a, drop(range(layer, LAYERS))) for p, a in zip(prompts, ANSWERS, strict=False)]
    return torch.tensor([x for r in read_out(vlm, rows, "reference") for x in r.logprobs])


def said(vlm: VisionLanguageModel, prompts, **options) -> list[tuple[int, ...]]:
    """What plain `generate` says in one left-padded batch, up to its end or an image placeholder."""
    inputs = stack(vlm, [(p, ()) for p in prompts], left=True)
    options = {"max_new_tokens": CAP, "do_sample": False, "pad_token_id": vlm.pad_token_id, **options}
    out = vlm.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    ends = {*vlm.eos_token_ids, vlm.image_token_id}
    cuts = [next((i + 1 for i, t in enumerate(row) if t in ends), CAP) for row in out.tolist()]
    return [tuple(row[:cut]) for row, cut in zip(out.tolist(), cuts, strict=True)]


# --- the same as with masks ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_forced_answers_are_as_exact_as_the_reference(family):
    """At most four times as far from float64 as the reference: both round the same sums, in other orders."""
    vlm = tiny_vlm(family)
    prompts = prompts_of(vlm)
    exact, untouched = with_float64_decoder(vlm), reference(vlm, prompts, LAYERS)
    for layer in (0, 2, LAYERS - 1, LAYERS):
        theirs, ours = reference(vlm, prompts, layer), forced(vlm, prompts, layer)
        truth = reference(exact, prompts, layer).double()
        allowed = 4 * (theirs - truth).abs().max() + 2**-22 * truth.abs().max()
        assert (ours - truth).abs().max() <= allowed
        if layer < 2:
            assert (ours - untouched).abs().max() > 1000 * allowed, "the drop is not felt"


def test_bfloat16_error_is_of_the_references_size():
    """Root mean square over families and layers, against float32 on the same rounded weights."""
    squares = {"plan": 0.0, "reference": 0.0}
    for family in ALL:
        half = as_dtype(tiny_vlm(family), torch.bfloat16)
        full, prompts = as_dtype(half, torch.float32), prompts_of(half)
        for layer in (0, 2, LAYERS - 1):
            truth = reference(full, prompts, layer)
            squares["plan"] += float((forced(half, prompts, layer).float() - truth).square().sum())
            squares["reference"] += float((reference(half, prompts, layer) - truth).square().sum())
    assert squares["plan"] <= 2**2 * squares["reference"]


@pytest.mark.parametrize("family", ALL)
def test_generate_says_what_the_reference_says(family):
    vlm = tiny_vlm(family)
    prompts, outputs = prompts_of(vlm), set()
    for layer in range(LAYERS + 1):
        rows = [Row(p, (), drop(range(layer, LAYERS))) for p in prompts]
        expected = generate_under(vlm, rows, CAP, "reference")
        with drop_images_from(vlm.model, layer):
            assert [said(vlm, [p])[0] for p in prompts] == expected
            assert said(vlm, prompts) == expected
        outputs.add(tuple(expected))
    assert len(outputs) > 2, "the plans say the same: the test shows nothing"


def test_marks_between_the_pieces_of_an_image_go_with_it_if_told():
    """Without `image_tokens` they count as text."""
    vlm = tiny_vlm("idefics3")
    prompts = prompts_of(vlm)
    tokens, left = image_tokens(prompts, left=False, extra=9), image_tokens(prompts, left=True)
    for layer in range(LAYERS):
        torch.testing.assert_close(forced(vlm, prompts, layer, tokens), reference(vlm, prompts, layer))
        expected = generate_under(vlm, [Row(p, (), drop(range(layer, LAYERS))) for p in prompts], CAP)
        with drop_images_from(vlm.model, layer, left):
            assert said(vlm, prompts) == expected
    assert (forced(vlm, prompts, 2) - reference(vlm, prompts, 2)).abs().max() > 0.01


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5, "top_k": 20},
        {"use_cache": False},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_any_way_of_generating_equals_masks(family, options):
    vlm = tiny_vlm(family)
    prompts = prompts_of(vlm)
    outputs = []
    for plan in (drop_images_from(vlm.model, 1), masked(vlm.model, 1, image_tokens(prompts, left=True))):
        torch.manual_seed(0)
        with plan:
            outputs.append(said(vlm, prompts, **options))
    assert outputs[0] == outputs[1] and outputs[0] != said(vlm, prompts, **options)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5, "top_k": 20}],
    ids=str,
)
def test_given_image_tokens_follow_the_rows(options):
    """Beams and several sequences a prompt: the batch is a multiple of what was given."""
    vlm = tiny_vlm("qwen2_5_vl")
    prompts, found = prompts_of(vlm), []
    for tokens in (None, image_tokens(prompts, left=True)):
        torch.manual_seed(0)
        with drop_images_from(vlm.model, 1, tokens):
            found.append(said(vlm, prompts, **options))
    assert found[0] == found[1]


@torch.no_grad()
@pytest.mark.parametrize("given", [False, True])
def test_a_prefill_token_by_token_knows_its_images(given):
    """Forwards of one image token each are an image's, as in one forward of them all."""
    vlm, cache = tiny_vlm("llava"), DynamicCache()
    ids, start, stop = torch.arange(20, 32)[None].clone(), 3, 8
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    dropped[:, start:stop] = True
    ids[dropped] = vlm.image_token_id
    with masked(vlm.model, 1, dropped):
        whole = vlm.model(input_ids=ids, use_cache=False).logits
    with drop_images_from(vlm.model, 1, dropped if given else None):
        parts = [vlm.model(input_ids=one, past_key_values=cache).logits for one in ids.split(1, 1)]
    text = ~dropped
    torch.testing.assert_close(torch.cat(parts, 1)[text], whole[text], atol=2e-4, rtol=1e-4)
    untouched = vlm.model(input_ids=ids, use_cache=False).logits
    assert (whole[text] - untouched[text]).abs().max() > 0.01, "the drop is not felt"


@torch.no_grad()
def test_unequal_images_in_equal_lengths(monkeypatch):
    """No padding, so that transformers makes no mask at all: what one row has more of image is filled, and
    every filler sees something."""
    vlm, masks = tiny_vlm("llava"), []
    two, one = vlm.prompt("three cats", [picture(2), picture(3)]), vlm.prompt("three cats", [picture(0)])
    start, stop = two.spans[1]
    ids = two.inputs["input_ids"].repeat(2, 1)
    ids[1, start:stop] = torch.arange(20, 20 + stop - start)
    pixels = torch.cat([two.inputs["pixel_values"], one.inputs["pixel_values"]])
    options = {
        "max_new_tokens": CAP,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }

    def recording(module, query, key, value, mask, **kwargs):
        masks.append(mask)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(drop_plan, "sdpa_attention_forward", recording)
    found = []
    for plan in (drop_images_from(vlm.model, 1), masked(vlm.model, 1, ids == vlm.image_token_id)):
        with plan:
            out = vlm.model.generate(ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **options)
            found.append((out.sequences, torch.stack(out.logits)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-4, rtol=1e-4)
    assert masks[0] is None, "below the plan's layer"
    assert all(mask.any(-1).all() for mask in masks if mask is not None) and masks[1] is not None


def sliding_llava() -> VisionLanguageModel:
    """Every layer slides; the window is shorter than a prompt."""
    processor = llava_processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    text = MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(processor.tokenizer), sliding_window=14,
        eos_token_id=ids("</s>"), pad_token_id=ids("<pad>"), bos_token_id=ids("<s>"),
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=8, projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text, vision_config=vision, image_token_id=ids("<image>"), vision_feature_layer=-1
        )
    )
    return VisionLanguageModel(louder(model), processor, "sliding-llava")


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("build", [lambda: tiny_vlm("llava"), sliding_llava], ids=["full", "sliding"])
def test_a_second_turn_with_another_image_goes_on_from_the_cache(build, layer):
    """Two forwards with a cache, the rows ragged in both, and single tokens after them, against one forward
    of everything under masks."""
    vlm = build()
    turns = [[prompts_of(vlm)[i] for i in order] for order in ((0, 2, 3), (2, 0, 1))]
    parts = [stack(vlm, [(p, ()) for p in turn], left=True) for turn in turns]
    tail = torch.tensor([[7, 9, 8], [11, 30, 5], [5, 14, 6]])
    ids = torch.cat([*(part["input_ids"] for part in parts), tail], 1)
    mask = torch.cat([*(part["attention_mask"] for part in parts), torch.ones_like(tail)], 1)
    dropped = torch.cat([image_tokens(turn, left=True) for turn in turns], 1)
    # The placeholders of the whole follow row by row, of the turns turn by turn.
    counts = [[len(p.spans) for p in turn] for turn in turns]
    pixels = [part["pixel_values"].split(count) for part, count in zip(parts, counts, strict=True)]
    both = torch.cat([p for row in zip(*pixels, strict=True) for p in row])
    with masked(vlm.model, layer, dropped):
        whole = vlm.model(input_ids=ids, attention_mask=mask, pixel_values=both, use_cache=False).logits

    cache, done = DynamicCache(config=vlm.text_config), 0
    with drop_images_from(vlm.model, layer):
        for new, images in [(p["input_ids"], p["pixel_values"]) for p in parts] + [
            (t, None) for t in tail.split(1, 1)
        ]:
            end = done + new.shape[1]
            out = vlm.model(
                input_ids=new, attention_mask=mask[:, :end], pixel_values=images, past_key_values=cache
            ).logits
            read = (mask[:, done:end] == 1) & ~torch.nn.functional.pad(dropped, (0, 3))[:, done:end]
            torch.testing.assert_close(out[read], whole[:, done:end][read], atol=2e-4, rtol=1e-4)
            done = end
    assert cache.get_seq_length() == ids.shape[1]


def test_an_adapted_model():
    from peft import LoraConfig, get_peft_model

    plain = tiny_vlm("qwen2_5_vl")
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    vlm = VisionLanguageModel(get_peft_model(copy.deepcopy(plain.model), config), plain.processor, "adapted")
    prompts = prompts_of(vlm)
    torch.testing.assert_close(forced(vlm, prompts, 2), reference(vlm, prompts, 2), atol=2e-5, rtol=1e-5)
    assert (forced(vlm, prompts, 2) - forced(plain, prompts, 2)).abs().max() > 0.01
    with drop_images_from(vlm.model, 2):
        out = said(vlm, prompts)
    assert out == generate_under(vlm, [Row(p, (), drop(range(2, LAYERS))) for p in prompts], CAP)


# --- and less of it ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_image_tokens_are_neither_computed_nor_cached(family):
    vlm, layer, seen = tiny_vlm(family), 2, []
    prompts = prompts_of(vlm)
    text = max(p.length - sum(stop - start for start, stop in p.spans) for p in prompts)
    handles = [
        m.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1])) for m in vlm.layers
    ]
    try:
        with drop_images_from(vlm.model, layer):
            inputs = stack(vlm, [(p, ()) for p in prompts], left=True)
            out = vlm.model.generate(
                **inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True
            )
    finally:
        for handle in handles:
            handle.remove()
    whole = inputs["input_ids"].shape[1]
    assert seen == [*[whole] * layer, *[text] * (LAYERS - layer), *[1] * 2 * LAYERS]
    for index in range(layer, LAYERS):
        keys, window = out.past_key_values.layers[index].keys, out.past_key_values.layers[index].window
        assert keys.shape[2] <= text + 2 and (window or keys.shape[2] == text + 2)
    assert out.past_key_values.get_seq_length(LAYERS - 1) == whole + 2, "to the model it is as long as ever"


def test_a_sliding_layer_forgets_text_beyond_its_window():
    vlm = sliding_llava()
    prompt = vlm.prompt("three cats, 12 dogs. " + QUESTION, [picture(0)])
    with drop_images_from(vlm.model, 1):
        out = vlm.model.generate(
            **stack(vlm, [(prompt, ())]), max_new_tokens=20, min_new_tokens=20, return_dict_in_generate=True
        )
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [13] * LAYERS


@pytest.mark.parametrize(("window", "kept"), [(1, []), (2, [4]), (9, [0, 1, 2, 3, 4])])
def test_a_window_keeps_one_key_less(window, kept):
    """The next token is its last; of a window of one nothing stays."""
    layer, keys = TextOnlyLayer(window), torch.arange(5.0)[None, None, :, None]
    layer.grow(torch.arange(5)[None], 5, False)
    seen, _ = layer.update(keys, keys)
    assert seen.flatten().tolist() == [0, 1, 2, 3, 4] and layer.keys.flatten().tolist() == kept
    layer.grow(torch.arange(6)[None], 6, False)
    seen, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
    assert seen.flatten().tolist() == [*kept, 0]


def test_a_shortened_layer_follows_its_rows():
    layer, keys = TextOnlyLayer(), torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 4)
    layer.grow(torch.tensor([[0, 7], [1, 7], [-1, 7]]), 8, True)
    layer.update(keys, keys)
    for change, rows in (
        (lambda: layer.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda: layer.batch_repeat_interleave(2), [2, 2, 0, 0, 1, 1]),
        (lambda: layer.batch_select_indices(torch.tensor([1, 2])), [2, 0]),
    ):
        change()
        assert layer.keys[:, 0, 0, 0].tolist() == rows
        assert layer.columns[:, 0].tolist() == [{0: 0, 1: 1, 2: -1}[row] for row in rows]
    assert (layer.get_seq_length(), layer.get_mask_sizes(1)) == (8, (9, 0))
    layer.reset()
    assert (layer.get_seq_length(), layer.columns, layer.keys, layer.ragged) == (0, None, None, False)
