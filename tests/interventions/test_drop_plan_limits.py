"""What a drop plan leaves as it was, what it refuses in one sentence, and which layer a profile names."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES, LAYERS, VARIANTS, tiny_vlm
from transformers import AttentionInterface, DynamicCache, StaticCache

from vfl_train.errors import ConfigError
from vfl_train.interventions import Row, read_out
from vfl_train.interventions.drop_plan import drop_images_from, layer_of
from vfl_train.models import VisionLanguageModel
from vfl_train.models.batching import stack
from vfl_train.schemas import ModelInfo, Profile

ALL = [*FAMILIES, *VARIANTS]
CAP = 6


def prompts_of(vlm: VisionLanguageModel) -> list:
    """Of unequal length."""
    images = [Image.new("RGB", size, "red") for size in ((32, 32), (64, 32))]
    return [vlm.prompt("what text is written here ?", images[:count]) for count in (1, 2)]


# --- no plan, no difference ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("name", ["vfl", {"text_config": "vfl"}], ids=str)
def test_without_a_plan_the_attention_is_sdpa(family, name):
    """Bit for bit, padded and not, prefill, decode and the vision tower."""
    vlm = tiny_vlm(family)
    model, prompts = vlm.model, prompts_of(vlm)
    options = {"max_new_tokens": CAP, "return_dict_in_generate": True, "output_logits": True}
    for batch in (prompts, prompts[:1]):
        inputs, found = stack(vlm, [(p, ()) for p in batch], left=True), []
        for attention in ("sdpa", name):
            model.set_attn_implementation(attention)
            assert vlm.text_config._attn_implementation == ("vfl" if attention is name else "sdpa")
            try:
                found.append(torch.stack(model.generate(**inputs, **options).logits))
            finally:
                model.set_attn_implementation("sdpa")
        assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_nothing_is_left_behind(family, fails, monkeypatch):
    vlm = tiny_vlm(family)
    monkeypatch.setattr(vlm.layers[3], "forward", vlm.layers[3].forward)  # somebody else's, which must stay
    modules = {name: dict(m.__dict__) for name, m in vlm.model.named_modules()}
    inputs = stack(vlm, [(p, ()) for p in prompts_of(vlm)], left=True)
    before, signature = vlm.model(**inputs).logits, inspect.signature(vlm.model.forward)
    raised = []

    def fail(*args):
        raised.append(1)
        raise RuntimeError("stop")

    try:
        with drop_images_from(vlm.model, 1):
            assert inspect.signature(vlm.model.forward) == signature, "generate asks for it"
            assert not torch.equal(vlm.model(**inputs).logits, before)
            if fails:
                handle = vlm.layers[2].mlp.register_forward_pre_hook(fail)
                try:
                    vlm.model.generate(**inputs, max_new_tokens=2)
                finally:
                    handle.remove()
    except RuntimeError:
        assert fails
    assert bool(raised) == fails
    assert torch.equal(vlm.model(**inputs).logits, before)
    assert vlm.text_config._attn_implementation == "sdpa"
    for name, module in vlm.model.named_modules():
        assert module.__dict__.get("forward") is modules[name].get("forward"), name
        assert module.__dict__.keys() == modules[name].keys()


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def vlm():
    return tiny_vlm("qwen2_5_vl")


@pytest.fixture
def inputs(vlm):
    return stack(vlm, [(p, ()) for p in prompts_of(vlm)], left=True)


@pytest.mark.parametrize("layer", [-1, LAYERS + 1])
def test_layers_that_are_not_there(vlm, layer):
    with (
        pytest.raises(ConfigError, match=f"layer {layer} is outside 0-{LAYERS}"),
        drop_images_from(vlm.model, layer),
    ):
        pass


def test_one_plan_at_a_time(vlm):
    refused = pytest.raises(ConfigError, match="already under a drop plan")
    with drop_images_from(vlm.model, 1), refused, drop_images_from(vlm.model, 2):
        pass


def offloaded(vlm):
    cache = DynamicCache(config=vlm.text_config)
    cache.offloading = True  # making one needs an accelerator
    return cache


def filled(vlm):
    cache = DynamicCache(config=vlm.text_config)
    vlm.model(torch.tensor([[7, 8]]), past_key_values=cache)
    return cache


def of_unknown_layers(vlm):
    cache = DynamicCache(config=vlm.text_config)
    cache.layers = [type("OddLayer", (type(layer),), {})() for layer in cache.layers]
    return cache


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda vlm: StaticCache(vlm.text_config, 200), "StaticCache"),
        (offloaded, "an offloaded cache"),
        (of_unknown_layers, "OddLayer"),
        (filled, "filled outside of this drop plan"),
    ],
)
def test_caches_that_cannot_be_shortened(vlm, inputs, build, reason):
    cache = build(vlm)
    with drop_images_from(vlm.model, 2), pytest.raises(ConfigError, match=reason):
        vlm.model(**inputs, past_key_values=cache)


def test_a_static_cache_made_by_generate(vlm, inputs):
    with drop_images_from(vlm.model, 2), pytest.raises(ConfigError, match="cannot shorten StaticCache"):
        vlm.model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


@torch.no_grad()
def test_a_shortened_cache_is_of_no_use_without_its_plan(vlm, inputs):
    cache = DynamicCache()
    with drop_images_from(vlm.model, 2):
        vlm.model(**inputs, past_key_values=cache)
    with pytest.raises(ConfigError, match="filled under a drop plan"):
        vlm.model(torch.tensor([[7]] * len(inputs["input_ids"])), past_key_values=cache)
    with drop_images_from(vlm.model, 3), pytest.raises(ConfigError, match="filled under a drop plan"):
        vlm.model(torch.tensor([[7]] * len(inputs["input_ids"])), past_key_values=cache)


def test_other_ways_into_the_model(vlm, inputs):
    refused = {
        "the model's own forward": lambda: vlm.model.model(**inputs),
        "image_tokens": lambda: vlm.model(inputs_embeds=torch.zeros(1, 3, vlm.hidden_size)),
        "additive": lambda: vlm.model(
            inputs["input_ids"], attention_mask=torch.zeros_like(inputs["input_ids"])[:, None, None].float()
        ),
        "layers take odd": lambda: vlm.model(**inputs, odd=torch.zeros(1)),
        "has a video": lambda: vlm.model(torch.tensor([[7, vlm.config.video_token_id]])),
        "take tokens back": lambda: vlm.model.generate(
            **stack(vlm, [(prompts_of(vlm)[0], ())]), prompt_lookup_num_tokens=2, max_new_tokens=4
        ),
    }
    with torch.no_grad(), drop_images_from(vlm.model, 0):
        for reason, call in refused.items():
            with pytest.raises(ConfigError, match=reason):
                call()
        for path in ("engine", "reference"):
            with pytest.raises(ConfigError, match=f"attention is 'vfl', not 'vfl_{path}'"):
                list(read_out(vlm, [Row(prompts_of(vlm)[0])], path))
    with (
        drop_images_from(vlm.model, 0, torch.zeros(3, 60)),
        pytest.raises(ConfigError, match="3 rows, the batch 2"),
    ):
        vlm.model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_an_image_at_the_end_of_any_row(vlm, left):
    """generate would read logits that are not computed. Padding after it is not the end of the row's text."""
    long, short = prompts_of(vlm)[1], prompts_of(vlm)[0]
    inputs = stack(vlm, [(p, ()) for p in (long, short)], left=True)
    ids = inputs["input_ids"]
    row = 1 if left else 0
    ids = ids.clone()
    ids[row, -1] = vlm.image_token_id
    mask = inputs["attention_mask"]
    with drop_images_from(vlm.model, 2), pytest.raises(ConfigError, match="no row may end with an image"):
        vlm.model(input_ids=ids, attention_mask=mask)
    tokens = torch.zeros_like(ids, dtype=torch.bool)
    tokens[row, -1] = True
    with (
        drop_images_from(vlm.model, 2, tokens),
        pytest.raises(ConfigError, match="no row may end with an image"),
    ):
        vlm.model(**inputs)


def test_a_model_spread_over_devices(vlm, monkeypatch):
    monkeypatch.setattr(vlm.model, "hf_device_map", {"visual": 0, "language_model": 1}, raising=False)
    with pytest.raises(ConfigError, match="on one device"), drop_images_from(vlm.model, 1):
        pass
    monkeypatch.setattr(vlm.model, "hf_device_map", {"visual": "cpu", "language_model": "cpu"})
    with drop_images_from(vlm.model, 1):
        pass


def test_layers_without_self_attention_over_all_tokens(vlm, inputs, monkeypatch):
    """Attention of the layer's own making, and attention to something else than the tokens."""
    attention = vlm.attention(2)

    def beside(hidden_states, **kwargs):
        return hidden_states, None

    def across(hidden_states, **kwargs):
        features = torch.zeros(2, 1, 99, attention.head_dim)
        call = AttentionInterface()["vfl"]
        return call(attention, features[:, :, : hidden_states.shape[1]], features, features, None)

    for forward, reason in ((beside, "layer 2 has no self-attention"), (across, "other tokens than its own")):
        monkeypatch.setattr(attention, "forward", forward)
        with torch.no_grad(), drop_images_from(vlm.model, 1), pytest.raises(ConfigError, match=reason):
            vlm.model(**inputs)


def test_training_is_refused(inputs):
    model = copy.deepcopy(tiny_vlm("qwen2_5_vl").model).train()
    with drop_images_from(model, 0), pytest.raises(ConfigError, match="for inference"):
        model(**inputs)


# --- which layer ---------------------------------------------------------------------------------


def profile(**changes) -> Profile:
    plans = {
        name: {"from_layer": k, "points_lost": 0.0, "allowed_points": 1.0}
        for name, k in (("ocr", 22), ("count", 7))
    }
    values = {
        "model": ModelInfo("m", None, "llava", 28, 64), "intervention": "swap", "phase": "text",
        "path": "engine", "dtype": "float32", "seed": 0, "versions": {}, "probe_set": {}, "functions": {},
        "drop_plan": plans,
    }  # fmt: skip
    return Profile(**{**values, **changes})


def test_layer_of_takes_the_deepest_of_what_is_wanted():
    assert layer_of(profile(), ["count"]) == 7
    assert layer_of(profile(), ["count", "ocr"]) == layer_of(profile()) == 22


def test_layer_of_reads_a_file(tmp_path):
    (tmp_path / "profile.json").write_text(json.dumps(profile().to_json()))
    assert layer_of(tmp_path, ["count"]) == layer_of(tmp_path / "profile.json", ["count"]) == 7


@pytest.mark.parametrize(
    ("changes", "functions", "reason"),
    [
        ({}, ["ocr", "emotion"], "no drop plan for emotion .it has one for: ocr, count"),
        ({}, [], "any function"),
        ({"drop_plan": {}}, None, "any function"),
        ({"phase": "decode"}, ["ocr"], "phase 'decode'"),
        ({"drop_plan": {"ocr": {"from_layer": 29}}}, ["ocr"], "no layer from 0 to 28"),
        ({"drop_plan": {"ocr": {"from_layer": True}}}, ["ocr"], "no layer"),
        ({"drop_plan": {"ocr": 3}}, ["ocr"], "no layer"),
    ],
)
def test_layer_of_says_what_is_missing(changes, functions, reason):
    with pytest.raises(ConfigError, match=reason):
        layer_of(profile(**changes), functions)
