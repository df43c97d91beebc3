"""Standing branches: plain `generate` with a KV cache says what the cache-free way says."""

from __future__ import annotations

import pytest
import torch
from pictures import picture
from tiny_models import FAMILIES, LAYERS, VARIANTS, tiny_vlm
from transformers import DynamicCache, GenerationConfig

from vfl_train.errors import ConfigError
from vfl_train.interventions import BASE, Row, drop, knockout, rerun, uniform
from vfl_train.interventions.generation import generate_under
from vfl_train.interventions.standing import standing
from vfl_train.models.generation import generate

CAP = 5
QUESTION = "what text is written here ?"
BRANCHES = {
    "base": BASE,
    "attention": knockout([1]),
    "mlp": knockout([2], "mlp"),
    "both": knockout([0, 3], "both"),
    "uniform": uniform([1]),
    "end": rerun([1]),
    "itself": rerun([1], "itself"),
    "all of them": knockout([0]) + uniform([2]) + rerun([1], "itself") + rerun([3]),
    "two at the end": rerun([0, 2]),
    "the last one": rerun([LAYERS - 1], "itself"),
}


@pytest.fixture(params=[*FAMILIES, *VARIANTS])
def vlm(request):
    return tiny_vlm(request.param)


def prompts_of(vlm) -> list:
    return [vlm.prompt(QUESTION, [picture(seed, 64)]) for seed in (0, 1)]


@pytest.mark.parametrize("name", BRANCHES)
def test_generate_says_what_the_cache_free_way_says(vlm, name):
    """Both prompts in one batch, an answer cut at an image's placeholder, which the other cannot force."""
    prompts, branch = prompts_of(vlm), BRANCHES[name]
    with standing(vlm, branch):
        cached = [found.tokens for found in generate(vlm, prompts, CAP)]
    expected = generate_under(vlm, [Row(prompt, (), branch) for prompt in prompts], CAP, "reference")
    placeholder = vlm.image_token_id
    cut = [c[: c.index(placeholder) + 1] if placeholder in c else c for c in cached]
    assert cut == expected
    assert max(map(len, expected)) > 1, "nothing is read from the cache: the test shows nothing"


def test_branches_change_what_is_said():
    vlm = tiny_vlm("qwen2_5_vl")
    prompts = prompts_of(vlm)
    said = {}
    for name, branch in BRANCHES.items():
        with standing(vlm, branch):
            said[name] = tuple(found.tokens for found in generate(vlm, prompts, CAP))
    assert len(set(said.values())) > len(BRANCHES) / 2


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(vlm, fails):
    (prompt, _), plain = prompts_of(vlm), {}
    before = vlm.model(**prompt.inputs).logits
    modules = {id(m): dict(m.__dict__) for m in vlm.layers.modules()}
    if fails:
        with pytest.raises(RuntimeError, match="boom"), standing(vlm, BRANCHES["all of them"]):
            raise RuntimeError("boom")
    else:
        with standing(vlm, BRANCHES["all of them"]):
            plain["changed"] = vlm.model(**prompt.inputs).logits
        assert not torch.allclose(plain["changed"], before, atol=1e-3)
    assert vlm.text_config._attn_implementation == "sdpa"
    assert all(m.__dict__.keys() == modules[id(m)].keys() for m in vlm.layers.modules())
    assert [layer.self_attn.layer_idx for layer in vlm.layers] == list(range(LAYERS))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vlm.layers.modules())
    assert torch.equal(before, vlm.model(**prompt.inputs).logits)


def test_a_failing_rerun_gives_the_layer_its_slot_back(monkeypatch):
    vlm = tiny_vlm("llava")
    (prompt, _) = prompts_of(vlm)

    def boom(*args, **kwargs):
        raise RuntimeError("boom")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="boom"), standing(vlm, rerun([1])):
        patch.setattr(vlm.layers[1].mlp, "forward", boom)
        vlm.model(**prompt.inputs)
    assert [layer.self_attn.layer_idx for layer in vlm.layers] == list(range(LAYERS))


@torch.no_grad()
def test_caches():
    """One that grows by itself works, one of fixed size is refused; what is left is the model's layers'."""
    vlm = tiny_vlm("llava")
    (prompt, _) = prompts_of(vlm)
    with standing(vlm, rerun([1])):
        expected = vlm.model(**prompt.inputs, use_cache=False).logits
        cache = DynamicCache()
        torch.testing.assert_close(vlm.model(**prompt.inputs, past_key_values=cache).logits, expected)
        assert len(cache.layers) == LAYERS + 1
        config = GenerationConfig(max_new_tokens=2, do_sample=False, cache_implementation="static")
        with pytest.raises(ConfigError, match="no room for a layer run again"):
            vlm.model.generate(**prompt.inputs, generation_config=config)


@pytest.mark.parametrize("beams", [2])
def test_beams_reorder_the_slot_of_a_rerun_too(beams):
    """Two beams with a cache say what two beams without one say."""
    vlm = tiny_vlm("llava")
    (prompt, _) = prompts_of(vlm)
    said = []
    for use_cache in (True, False):
        config = GenerationConfig(
            max_new_tokens=CAP, num_beams=beams, do_sample=False, use_cache=use_cache,
            eos_token_id=list(vlm.eos_token_ids), pad_token_id=vlm.pad_token_id,
        )  # fmt: skip
        with standing(vlm, rerun([1])):
            said.append(vlm.model.generate(**prompt.inputs, generation_config=config).tolist())
    assert said[0] == said[1]


def test_what_cannot_stand_is_refused(vlm):
    refused = {
        "cannot stand": drop([1]), "outside": knockout([LAYERS]), "runs again": rerun([1]) + uniform([1])
    }  # fmt: skip
    for message, branch in refused.items():
        with pytest.raises(ConfigError, match=message), standing(vlm, branch):
            pass
